"""What is tracked of a VM, and what one reading of all its sources gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from migrator.qemu.qmp import MemoryBackend
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.merge import Merged
from tracker.bits.pageset import Bitmaps
from tracker.memory.ram import GuestRange, RamBlock
from tracker.sources.uffd import Leave


@dataclass(frozen=True)
class Tracking:
    """What is to be tracked, and how.

    :ivar blocks: RAM, with a file each where it is to be moved
    :ivar backends: the VM's memory backends, to be compared again later
    :ivar guest_ranges: where the guest sees its RAM
    :ivar tracker: name of the source of CPU writes
    :ivar direct_io: whether a page may be reported before the data that are read into it arrive
    :ivar reads: whether pages may be read, as they are when they are moved (see
        :class:`tracker.sources.holes.Holes`)
    """

    blocks: tuple[RamBlock, ...]
    backends: tuple[MemoryBackend, ...]
    guest_ranges: tuple[GuestRange, ...]
    tracker: str
    direct_io: bool = False
    reads: bool = True


@dataclass(frozen=True)
class Collected:
    """What one reading of all sources found.

    :ivar reports: what each source reported
    :ivar merged: the union, whose bitmaps are the caller's to keep and to change
    :ivar collect_ms: reading the sources
    :ivar merge_ms: making the union
    :ivar backends_ms: of ``collect_ms``, asking QEMU
    :ivar handed_over: whether pages are in it only because another source tracks them now
    """

    reports: Mapping[str, Bitmaps]
    merged: Merged
    collect_ms: float
    merge_ms: float
    backends_ms: float
    handed_over: bool = False


class Readings(Protocol):
    """What the rounds of a migration ask of its sources; see :class:`Sources`."""

    @property
    def data(self) -> Bitmaps:
        """Pages that held data at the last reading, by block."""

    @property
    def leaves(self) -> bool:
        """Whether pages can be left unprotected."""

    async def collect(self, *, backends_too: bool, leave: Leave | None = None) -> Collected:
        """Read all sources, once."""

    def take_suspects(self, dirty: Bitmaps) -> dict[str, DirtyBitmap]:
        """Take the suspects, without those that are sent anyway."""

    def suspect_data(self) -> dict[str, DirtyBitmap]:
        """Suspects that hold data."""

    async def slow_writers(self, percent: int, longest_ms: float, hot: Bitmaps) -> None:
        """Have the guest's writers wait for a part of their time, at pages that are hot."""

    async def slow(self, percent: int, longest_ms: float) -> None:
        """Change for how long writers wait; which pages are hot stays as it is."""
