"""What preflight found out, for the migration to go by."""

from __future__ import annotations

from dataclasses import dataclass

from migrator.qemu.qmp import MemoryBackend
from migrator.tracking.readings import Tracking
from tracker.memory.ram import GuestRange, RamBlock


@dataclass(frozen=True)
class Plan:
    """What preflight found out, for the migration to go by.

    :ivar source: the source's RAM blocks, by name
    :ivar destination: the destination's, in the same order
    :ivar was_running: whether the guest ran; one that was paused stays paused
    :ivar other_ram_bytes: RAM that QEMU sends itself: ROMs, video memory
    :ivar backends: the source's memory backends, to be compared again later
    :ivar guest_ranges: where the source's guest sees its RAM
    :ivar direct_io: whether a disk of the source is read past the page cache, into pages that were
        marked as written before
    :ivar stop_first: whether the guest has to be stopped, and the devices' dirty bits read, before
        QEMU's own migration is started
    :ivar unstoppable_devices: whether a device may go on writing while the guest stands
    :ivar tracker: which source of CPU writes is used: its name
    :ivar warnings: sentences about both sides for people; none is a reason not to migrate
    """

    source: tuple[RamBlock, ...]
    destination: tuple[RamBlock, ...]
    was_running: bool
    other_ram_bytes: int
    backends: tuple[MemoryBackend, ...]
    guest_ranges: tuple[GuestRange, ...] = ()
    direct_io: bool = False
    stop_first: bool = False
    unstoppable_devices: bool = False
    tracker: str = "uffd"
    warnings: tuple[str, ...] = ()

    @property
    def guest_bytes(self) -> int:
        """Size of the guest's RAM."""
        return sum(block.size for block in self.source)

    @property
    def tracking(self) -> Tracking:
        """What is tracked of the source."""
        return Tracking(self.source, self.backends, self.guest_ranges, self.tracker, self.direct_io)
