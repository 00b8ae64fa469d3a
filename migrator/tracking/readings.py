"""What is tracked of a VM, and what one reading of all its sources gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from migrator.qemu.qmp import MemoryBackend
from tracker.bits.merge import Merged
from tracker.bits.pageset import PageSet
from tracker.memory.ram import GuestRange, RamBlock


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
class Scan:
    """The begin of a reading: what the CPU wrote, which may not be protected again yet.

    :ivar reports: what each source of CPU writes reported
    :ivar written: the union of these
    :ivar handed_over: whether pages are in it only because another source tracks them now
    :ivar spent_ms: how long it took
    """

    reports: Mapping[str, PageSet]
    written: PageSet
    handed_over: bool
    spent_ms: float


@dataclass(frozen=True)
class Collected:
    """What one reading of all sources found.

    :ivar reports: what each source reported
    :ivar merged: the union, whose pages are the caller's to keep and to change
    :ivar collect_ms: reading the sources, without the time between both calls where it was begun
        apart
    :ivar merge_ms: making the union
    :ivar backends_ms: of ``collect_ms``, asking QEMU
    :ivar handed_over: whether pages are in it only because another source tracks them now
    """

    reports: Mapping[str, PageSet]
    merged: Merged
    collect_ms: float
    merge_ms: float
    backends_ms: float
    handed_over: bool = False


class Readings(Protocol):
    """What the rounds of a migration ask of its sources; see :class:`Sources`."""

    @property
    def data(self) -> PageSet:
        """Pages that held data at the last reading."""

    @property
    def leaves(self) -> bool:
        """Whether pages can be left unprotected."""

    async def scan(self) -> Scan:
        """Begin a reading, to choose pages to leave unprotected; :meth:`collect` must follow."""

    async def collect(
        self, *, backends_too: bool, scan: Scan | None = None, left: PageSet | None = None
    ) -> Collected:
        """Read all sources, once, or end a reading that was begun."""

    def take_suspects(self, dirty: PageSet) -> PageSet:
        """Take the suspects, without those that are sent anyway."""

    def suspect_data(self) -> PageSet:
        """Suspects that hold data."""

    async def slow_writers(self, percent: int, longest_ms: float, hot: PageSet) -> None:
        """Have the guest's writers wait for a part of their time, at pages that are hot."""

    async def slow(self, percent: int, longest_ms: float) -> None:
        """Change for how long writers wait; which pages are hot stays as it is."""
