"""The source's RAM as a stream cuts it: units of 4096 bytes, whatever the page size, and parts."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from migrator.transport.runs import UNIT
from tracker.bits import rescale
from tracker.bits.bitmap import DirtyBitmap
from tracker.memory.mapped import Mapped
from tracker.memory.ram import RamBlock

PART_UNITS = 16384
"""Units of a part: what one thread takes at once."""


@dataclass(frozen=True)
class Part:
    """Some units of a block that have to be looked at."""

    block: int
    first: int
    last: int


class Ram(Mapped):
    """One block of the source, in units.

    :ivar nunits: how many
    :raise OSError: its file cannot be opened or mapped
    :raise RamError: its file is not what it was
    """

    def __init__(self, pid: int, block: RamBlock) -> None:
        super().__init__(pid, block)
        self.nunits = block.size // UNIT

    def units(self, pages: DirtyBitmap) -> NDArray[np.uint64]:
        """A bit a unit."""
        if self.block.page_size == UNIT:
            return pages.words
        words = np.zeros((self.nunits + 63) // 64, np.uint64)
        rescale.spread(pages.words, 0, pages.npages, self.block.page_size, words, UNIT, 0)
        return words

    def pages(self, units: NDArray[np.uint64]) -> DirtyBitmap:
        """Pages of which any unit is set."""
        found = DirtyBitmap.empty(self.block.npages)
        rescale.spread(units, 0, self.nunits, UNIT, found.words, self.block.page_size, 0)
        return found

    def parts(self, index: int, units: NDArray[np.uint64]) -> list[Part]:
        """Parts with any of the units."""
        starts = np.arange(0, len(units), PART_UNITS // 64)
        some = np.logical_or.reduceat(units != 0, starts)
        return [
            Part(index, int(s) * 64, min(int(s) * 64 + PART_UNITS, self.nunits))
            for s in starts[some]
        ]


@dataclass
class Work:
    """What all connections do together: a queue of parts, and whether to stop."""

    parts: queue.SimpleQueue[Part]
    stop: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Work:
        """All of these."""
        work = cls(queue.SimpleQueue())
        for part in parts:
            work.parts.put(part)
        return work

    def take(self) -> Part | None:
        """The next part; ``None`` if there is none, or all is to stop."""
        if self.stop.is_set():
            return None
        try:
            return self.parts.get_nowait()
        except queue.Empty:
            return None
