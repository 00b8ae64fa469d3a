"""All dirty sources of the VM that is moved, read together: what is to be sent, what is suspect."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from migrator.errors import VmError
from migrator.preflight import Plan
from migrator.qmp import Qmp
from migrator.settle import in_thread
from tracker.bitmap import DirtyBitmap
from tracker.descriptors import vfio_descriptors
from tracker.dma import dma_sources
from tracker.holes import Holes
from tracker.merge import Merged, merge
from tracker.ram import check_unmoved
from tracker.source import DirtySource
from tracker.uffd import UffdAsync

Bitmaps = Mapping[str, DirtyBitmap]


@dataclass(frozen=True)
class Collected:
    """What one reading of all sources found.

    :ivar merged: the union, whose bitmaps are the caller's to keep and to change
    :ivar collect_ms: reading the sources
    :ivar merge_ms: making the union
    """

    merged: Merged
    collect_ms: float
    merge_ms: float


class Sources:
    """The sources of one migration.

    :ivar suspects: pages, by block, that may have been written without an exact source's saying
        so: those that only an inexact one reports, and those that a read past the page cache may
        have been under way to. They grow with each reading, until they are taken.
    """

    def __init__(self, vm: Qmp, plan: Plan) -> None:
        self._vm = vm
        self._plan = plan
        self._cpu = UffdAsync(vm.pid, plan.source)
        self._devices: Sequence[DirtySource] = ()
        self._holes = Holes(vm.pid, plan.source)
        self._npages = {block.name: block.npages for block in plan.source}
        self.suspects = self._no_pages()

    @property
    def data(self) -> Bitmaps:
        """Pages that held data at the last reading, by block; see :class:`tracker.holes.Holes`."""
        return self._holes.data

    async def start(self) -> None:
        """Begin to track: every write from now on is in some later reading.

        :raise TrackerError: a source cannot begin
        :raise OSError: the process is gone, or not ours to look at
        """
        self._vfio = await in_thread(vfio_descriptors, self._vm.pid)
        self._devices = await in_thread(
            dma_sources, self._vm.pid, self._plan.source, self._plan.guest_ranges
        )
        for source in (self._cpu, *self._devices, self._holes):
            await in_thread(source.start)

    async def collect(self, *, backends_too: bool) -> Collected:
        """Read all sources, once.

        :param backends_too: ask QEMU for its memory backends as well, which takes milliseconds
        :raise TrackerError: a source cannot tell, or RAM was mapped anew: nothing is known
        :raise VmError: memory or a device was plugged
        """
        started = time.monotonic()
        reports = await in_thread(self._read)
        # after reading, not before: the page tables of a process that has died look clean
        await self._check_nothing_moved(backends_too)
        collected = time.monotonic()
        merged = self._merge(reports)
        for name, suspects in self.suspects.items():
            suspects |= merged.suspects[name]
            if self._plan.direct_io:
                # reported when it was pinned for a read, whose data may not have arrived by now
                suspects |= reports[self._cpu.name][name]
        return Collected(
            merged, (collected - started) * 1000, (time.monotonic() - collected) * 1000
        )

    def _read(self) -> dict[str, dict[str, DirtyBitmap]]:
        reports = {source.name: source.collect() for source in (self._cpu, *self._devices)}
        # after the writes: what held data and was not written since is where new holes can be
        written = self._merge(reports).bitmaps
        return {**reports, self._holes.name: self._holes.collect(written)}

    def _merge(self, reports: Mapping[str, Bitmaps]) -> Merged:
        inexact = {source.name for source in self._devices if not source.exact}
        return merge(self._npages, reports, inexact)

    async def _check_nothing_moved(self, backends_too: bool) -> None:
        if backends_too and tuple(await self._vm.memory_backends()) != self._plan.backends:
            raise VmError(self._vm.name, "its memory backends changed (memory hotplug?)")
        await in_thread(check_unmoved, self._vm.pid, self._plan.source)
        if await in_thread(vfio_descriptors, self._vm.pid) != self._vfio:
            raise VmError(self._vm.name, "its VFIO devices changed (a device was plugged?)")

    def take_suspects(self, dirty: Bitmaps) -> dict[str, DirtyBitmap]:
        """Take the suspects, without those that are sent anyway."""
        suspects = {name: pages.minus(dirty[name]) for name, pages in self.suspects.items()}
        self.suspects = self._no_pages()
        return suspects

    def suspect_data(self) -> dict[str, DirtyBitmap]:
        """Suspects that hold data: those cost a comparison."""
        return {name: self.data[name] & pages for name, pages in self.suspects.items()}

    def _no_pages(self) -> dict[str, DirtyBitmap]:
        return {name: DirtyBitmap.empty(npages) for name, npages in self._npages.items()}

    async def stop_devices(self) -> None:
        """Let go of the devices' trackers: they stand, and what they wrote was collected."""
        for source in self._devices:
            await in_thread(source.stop)
        self._devices = ()

    async def stop(self) -> None:
        """Leave nothing behind in the source. May be called again."""
        for source in (self._cpu, *self._devices, self._holes):
            await in_thread(source.stop)
