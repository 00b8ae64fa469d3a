"""All dirty sources of a VM, read together: what is to be sent, what is suspect."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from migrator.aio import in_thread
from migrator.errors import VmError
from migrator.qemu.qmp import Qmp
from migrator.tracking.readings import Collected, Scan, Tracking
from tracker.answered.brake import Brake
from tracker.answered.uffdsync import UffdSync
from tracker.bits.merge import Merged, merge
from tracker.bits.pageset import PageSet
from tracker.devices.descriptors import vfio_descriptors
from tracker.devices.dma import dma_sources
from tracker.memory.address import check_mapped
from tracker.memory.ram import check_unmoved
from tracker.sources.holes import Holes
from tracker.sources.source import DirtySource
from tracker.sources.uffd import UffdAsync


class Sources:
    """The sources of one migration, or of a VM that is only watched.

    :ivar suspects: pages that may have been written without an exact source's saying
        so: those that only an inexact one reports, and those that a read past the page cache may
        have been under way to. They grow with each reading, until they are taken.
    """

    def __init__(self, vm: Qmp, tracking: Tracking, cpu: DirtySource) -> None:
        """Prepare; nothing is done to the VM yet.

        :param cpu: the source of CPU writes; see :func:`migrator.tracking.strategies.cpu_source`
        """
        self._vm = vm
        self._tracking = tracking
        self._files = [block for block in tracking.blocks if block.has_file]
        self._fileless = [block for block in tracking.blocks if not block.has_file]
        self._cpu = cpu
        self._brake = Brake(vm.pid, tracking.blocks, cpu) if isinstance(cpu, UffdAsync) else None
        self._devices: Sequence[DirtySource] = ()
        self._holes = Holes(vm.pid, self._files, reads=tracking.reads)
        self.suspects = PageSet.empty(self._tracking.blocks)

    @property
    def data(self) -> PageSet:
        """Pages that held data at the last reading; see
        :class:`tracker.sources.holes.Holes`.

        Of blocks with a file: the others do not tell.
        """
        return self._holes.data

    async def data_of_ended(self) -> PageSet:
        """Pages that hold data, of a VM whose process has ended: its files tell.

        Huge pages are told from holes by page tables alone: there, all of them.

        :raise SourceError: a file does not tell its holes
        """
        return await in_thread(self._holes.data_without_process)

    @property
    def inexact(self) -> set[str]:
        """Names of the sources that report pages whether they were written or not."""
        return {source.name for source in self._devices if not source.exact}

    async def start(self) -> None:
        """Begin to track: every write from now on is in some later reading.

        :raise TrackerError: a source cannot begin
        :raise OSError: the process is gone, or not ours to look at
        """
        self._vfio = await in_thread(vfio_descriptors, self._vm.pid)
        self._devices = await in_thread(
            dma_sources, self._vm.pid, self._tracking.blocks, self._tracking.guest_ranges
        )
        for source in (self._cpu, *self._devices, self._holes):
            await in_thread(source.start)

    @property
    def leaves(self) -> bool:
        """Whether pages can be left unprotected: the source of CPU writes lets them be."""
        return isinstance(self._cpu, UffdAsync)

    async def scan(self) -> Scan:
        """Begin a reading: what the CPU wrote, before it is protected again.

        The caller chooses which of these pages to leave unprotected, and calls :meth:`collect` at
        once: what is written until then belongs to this reading.

        :raise TrackerError: see :meth:`collect`
        """
        return await in_thread(self._scan, protect=False)

    async def collect(
        self, *, backends_too: bool, scan: Scan | None = None, left: PageSet | None = None
    ) -> Collected:
        """Read all sources, once, or end a reading that was begun.

        :param backends_too: ask QEMU for its memory backends as well, which takes milliseconds
        :param scan: how it was begun
        :param left: pages to leave unprotected; see :meth:`tracker.sources.uffd.UffdAsync.protect`
        :raise TrackerError: a source cannot tell, or RAM was mapped anew: nothing is known
        :raise VmError: memory or a device was plugged
        """
        started = time.monotonic()
        before_ms = 0.0 if scan is None else scan.spent_ms
        # after reading, not before: the page tables of a process that has died look clean
        reading = await in_thread(self._read, scan, left, backends_too=backends_too)
        asked = time.monotonic()
        if backends_too:
            await self._check_nothing_plugged()
        answered = time.monotonic()
        await self._check_nothing_moved()
        spent_ms = before_ms + (time.monotonic() - started) * 1000
        merged = reading.merged
        self.suspects |= merged.suspects
        if self._tracking.direct_io:
            # reported when it was pinned for a read, whose data may not have arrived by now
            for pages in reading.scan.reports.values():
                self.suspects |= pages
        return Collected(
            reading.reports,
            merged,
            collect_ms=spent_ms - reading.merge_ms,
            merge_ms=reading.merge_ms,
            backends_ms=(answered - asked) * 1000,
            handed_over=reading.scan.handed_over,
        )

    def _scan(self, *, protect: bool) -> Scan:
        started = time.monotonic()
        handed_over = self._brake is not None and self._brake.handed_over
        braked = self._brake.collect() if self._brake is not None and self._brake.is_on else None
        if isinstance(self._cpu, UffdAsync) and not protect:
            written = self._cpu.scan()
        else:
            written = self._cpu.collect()
        reports, union = {self._cpu.name: written}, written
        if braked is not None:
            reports[Brake.name], union = braked, written | braked
        return Scan(reports, union, handed_over, (time.monotonic() - started) * 1000)

    def _read(self, scan: Scan | None, left: PageSet | None, *, backends_too: bool) -> _Reading:
        if scan is None:
            scan = self._scan(protect=True)
        elif isinstance(self._cpu, UffdAsync):
            nothing = PageSet.empty(self._tracking.blocks)
            self._cpu.protect(scan.reports[self._cpu.name], nothing if left is None else left)
        reports = {**scan.reports, **{source.name: source.collect() for source in self._devices}}
        started = time.monotonic()
        merged = merge(self._tracking.blocks, reports, self.inexact)
        merge_ms = (time.monotonic() - started) * 1000
        # what is reported beside pages that were written may be holes, and to read would fill them
        look = scan.handed_over or (backends_too and isinstance(self._cpu, UffdSync))
        # after the writes: what held data and was not written since is where new holes can be
        holes = self._holes.collect(None if look else merged.dirty.of(self._files))
        # without a file, a page that is given back counts as written
        nothing = PageSet.empty(self._fileless)
        reports[self._holes.name] = PageSet(self._tracking.blocks, {**holes, **nothing})
        started = time.monotonic()
        if holes.any():
            merged = merge(self._tracking.blocks, reports, self.inexact)
        else:
            merged.add_nothing_of(self._holes.name)
        merge_ms += (time.monotonic() - started) * 1000
        return _Reading(scan, reports, merged, merge_ms)

    async def _check_nothing_plugged(self) -> None:
        if tuple(await self._vm.memory_backends()) != self._tracking.backends:
            raise VmError(self._vm.name, "its memory backends changed (memory hotplug?)")

    async def _check_nothing_moved(self) -> None:
        await in_thread(check_unmoved, self._vm.pid, self._files)
        for block in self._fileless:
            await in_thread(check_mapped, self._vm.pid, block)
        if await in_thread(vfio_descriptors, self._vm.pid) != self._vfio:
            raise VmError(self._vm.name, "its VFIO devices changed (a device was plugged?)")

    async def slow_writers(self, percent: int, longest_ms: float, hot: PageSet) -> None:
        """Have the guest's writers wait for a part of their time; see :meth:`slow`.

        :param hot: what is written most, if not everything can be waited for
        :raise TrackerError: it cannot be; nobody waits
        """
        if self._brake is not None:
            await in_thread(self._brake.put_on, hot)
        await self.slow(percent, longest_ms)

    async def slow(self, percent: int, longest_ms: float) -> None:
        """Change for how long writers wait; see :meth:`tracker.answered.uffdsync.UffdSync.slow`.

        :raise SourceError: nobody answers writes any more
        """
        brake = self._cpu if isinstance(self._cpu, UffdSync) else self._brake
        assert brake is not None
        await in_thread(brake.slow, percent, longest_ms)

    def take_suspects(self, dirty: PageSet) -> PageSet:
        """Take the suspects, without those that are sent anyway."""
        suspects = self.suspects - dirty
        self.suspects = PageSet.empty(self._tracking.blocks)
        return suspects

    def suspect_data(self) -> PageSet:
        """Suspects that hold data: those cost a comparison."""
        return self.data & self.suspects

    async def stop_devices(self) -> None:
        """Let go of the devices' trackers: they stand, and what they wrote was collected."""
        for source in self._devices:
            await in_thread(source.stop)
        self._devices = ()

    async def stop(self) -> None:
        """Leave nothing behind in the source. May be called again."""
        brakes = () if self._brake is None else (self._brake,)
        for source in (*brakes, self._cpu, *self._devices, self._holes):
            await in_thread(source.stop)


@dataclass(frozen=True)
class _Reading:
    """Of all sources, and how long it took to unite what they reported."""

    scan: Scan
    reports: Mapping[str, PageSet]
    merged: Merged
    merge_ms: float
