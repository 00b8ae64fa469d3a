"""A copy of a tracked process's memory, for the sources that compare with what was copied."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from tests.live.tracked import NAME, Mirror, Tracked
from tracker.bits.bitmap import DirtyBitmap
from tracker.memory.extents import data_pages
from tracker.memory.pagehash import selected_digests
from tracker.sources.coarse import Compared
from tracker.sources.contenthash import ContentHash


class Copy:
    """A copy of the memory, and the source that is told of it."""

    def __init__(self, child: Tracked, source: ContentHash | Compared) -> None:
        self.child, self.source = child, source
        self.mirror = Mirror(child)

    def collect(self) -> DirtyBitmap:
        return self.source.collect()[NAME]

    def take(self, dirty: DirtyBitmap) -> None:
        """Copy the pages, then tell what has been copied."""
        self.mirror.take(dirty, self.data())
        self.source.copies.copied(NAME, dirty, self.digests(dirty, self.mirror.copy))

    def data(self) -> DirtyBitmap:
        fd = os.open(f"/proc/self/fd/{self.child.fd}", os.O_RDWR)
        try:
            return data_pages(self.child.pid, self.child.block, fd)
        finally:
            os.close(fd)

    def digests(self, selected: DirtyBitmap, memory: NDArray[np.uint8]) -> NDArray[np.uint64]:
        found = np.zeros(selected.count(), np.uint64)
        everything = DirtyBitmap.full(selected.npages).words
        page_size, nwords = self.child.block.page_size, len(everything)
        flat, seed = memory.reshape(-1), self.source.copies.seed
        selected_digests(flat, page_size, selected.words, everything, seed, found, 0, nwords)
        return found

    def differing(self) -> list[int]:
        return self.mirror.differing()


@contextmanager
def copying(child: Tracked, source: ContentHash | Compared) -> Iterator[Copy]:
    source.start()
    try:
        yield Copy(child, source)
    finally:
        source.stop()
