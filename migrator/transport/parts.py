"""The source's RAM as a stream cuts it: units of 4096 bytes, whatever the page size, and parts."""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from migrator.transport.runs import UNIT
from tracker.bits import rescale
from tracker.bits.bitmap import DirtyBitmap
from tracker.memory.ram import RamBlock, open_file

PART_UNITS = 16384
"""Units of a part: what one thread takes at once."""


@dataclass(frozen=True)
class Part:
    """Some units of a block that have to be looked at."""

    block: int
    first: int
    last: int


class Ram:
    """One block of the source, in units.

    :ivar memory: of the whole block, not to be written
    :raise OSError: its file cannot be opened or mapped
    :raise RamError: its file is not what it was
    """

    def __init__(self, pid: int, block: RamBlock) -> None:
        self.pid, self.block = pid, block
        self.nunits = block.size // UNIT
        self.fd = open_file(pid, block)
        self._map = mmap.mmap(self.fd, block.size, mmap.MAP_SHARED, mmap.PROT_READ)
        self.memory = np.frombuffer(self._map, np.uint8)

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

    def close(self) -> None:
        """Unmap it. No thread may use it any more."""
        self.memory = np.empty(0, np.uint8)
        # a view that an error's frames keep lives a little longer, and the mapping with it
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.fd)


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
