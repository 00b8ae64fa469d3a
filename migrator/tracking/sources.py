"""All dirty sources of a VM, read together: what is to be sent, what is suspect."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from migrator.aio import in_thread
from migrator.errors import VmError
from migrator.qemu.qmp import Qmp
from migrator.tracking.readings import Collected, Tracking
from tracker.answered.brake import Brake
from tracker.answered.uffdsync import UffdSync
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.merge import Merged, merge
from tracker.bits.pageset import Bitmaps, no_pages, without
from tracker.devices.descriptors import vfio_descriptors
from tracker.devices.dma import dma_sources
from tracker.memory.address import check_mapped
from tracker.memory.ram import check_unmoved
from tracker.sources.holes import Holes
from tracker.sources.source import DirtySource
from tracker.sources.uffd import Leave, UffdAsync


class Sources:
    """The sources of one migration, or of a VM that is only watched.

    :ivar suspects: pages, by block, that may have been written without an exact source's saying
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
        self._npages = {block.name: block.npages for block in tracking.blocks}
        self.suspects = no_pages(self._npages)

    @property
    def data(self) -> Bitmaps:
        """Pages that held data at the last reading, by block; see
        :class:`tracker.sources.holes.Holes`.

        Of blocks with a file: the others do not tell.
        """
        return self._holes.data

    async def data_of_ended(self) -> Bitmaps:
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

    async def collect(self, *, backends_too: bool, leave: Leave | None = None) -> Collected:
        """Read all sources, once.

        :param backends_too: ask QEMU for its memory backends as well, which takes milliseconds
        :param leave: see :meth:`tracker.sources.uffd.UffdAsync.collect`; where the source of CPU
            writes cannot leave pages unprotected, it is asked all the same
        :raise TrackerError: a source cannot tell, or RAM was mapped anew: nothing is known
        :raise VmError: memory or a device was plugged
        """
        started = time.monotonic()
        handed_over = self._brake is not None and self._brake.handed_over
        # what is reported beside pages that were written may be holes, and to read would fill them
        look = handed_over or (backends_too and isinstance(self._cpu, UffdSync))
        reports = await in_thread(self._read, look=look, leave=leave)
        # after reading, not before: the page tables of a process that has died look clean
        asked = time.monotonic()
        if backends_too:
            await self._check_nothing_plugged()
        answered = time.monotonic()
        await self._check_nothing_moved()
        collected = time.monotonic()
        merged = await in_thread(self._merge, reports)
        for name, suspects in self.suspects.items():
            suspects |= merged.suspects[name]
            if self._tracking.direct_io:
                # reported when it was pinned for a read, whose data may not have arrived by now
                suspects |= reports[self._cpu.name][name]
                if Brake.name in reports:
                    suspects |= reports[Brake.name][name]
        return Collected(
            reports,
            merged,
            collect_ms=(collected - started) * 1000,
            merge_ms=(time.monotonic() - collected) * 1000,
            backends_ms=(answered - asked) * 1000,
            handed_over=handed_over,
        )

    def _read(self, *, look: bool, leave: Leave | None) -> dict[str, dict[str, DirtyBitmap]]:
        braked = self._brake.collect() if self._brake is not None and self._brake.is_on else None
        if leave is not None and braked is not None:
            leave = _of_all(leave, braked)
        if isinstance(self._cpu, UffdAsync):
            written = self._cpu.collect(leave)
        else:
            written = self._cpu.collect()
            if leave is not None:
                leave(written)
        reports = {self._cpu.name: written}
        if braked is not None:
            reports[Brake.name] = braked
        reports |= {source.name: source.collect() for source in self._devices}
        # after the writes: what held data and was not written since is where new holes can be
        written = self._merge(reports).bitmaps
        holes = self._holes.collect(None if look else written)
        # without a file, a page that is given back counts as written
        holes |= {b.name: DirtyBitmap.empty(b.npages) for b in self._fileless}
        return {**reports, self._holes.name: holes}

    def _merge(self, reports: Mapping[str, Bitmaps]) -> Merged:
        return merge(self._npages, reports, self.inexact)

    async def _check_nothing_plugged(self) -> None:
        if tuple(await self._vm.memory_backends()) != self._tracking.backends:
            raise VmError(self._vm.name, "its memory backends changed (memory hotplug?)")

    async def _check_nothing_moved(self) -> None:
        await in_thread(check_unmoved, self._vm.pid, self._files)
        for block in self._fileless:
            await in_thread(check_mapped, self._vm.pid, block)
        if await in_thread(vfio_descriptors, self._vm.pid) != self._vfio:
            raise VmError(self._vm.name, "its VFIO devices changed (a device was plugged?)")

    async def slow_writers(self, percent: int, longest_ms: float, hot: Bitmaps) -> None:
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

    def take_suspects(self, dirty: Bitmaps) -> dict[str, DirtyBitmap]:
        """Take the suspects, without those that are sent anyway."""
        suspects = without(self.suspects, dirty)
        self.suspects = no_pages(self._npages)
        return suspects

    def suspect_data(self) -> dict[str, DirtyBitmap]:
        """Suspects that hold data: those cost a comparison."""
        return {name: self.data[name] & pages for name, pages in self.suspects.items()}

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


def _of_all(leave: Leave, braked: Bitmaps) -> Leave:
    """Ask with what was written under the brake, too: there nothing is left unprotected."""
    return lambda written: leave({name: pages | braked[name] for name, pages in written.items()})
