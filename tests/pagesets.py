"""Page sets for tests, out of bitmaps."""

from __future__ import annotations

from collections.abc import Mapping

from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.memory.ram import RamBlock

PAGE = 4096


def block(name: str, npages: int, page_size: int = PAGE) -> RamBlock:
    """A block that is nowhere."""
    return RamBlock(name, npages * page_size, page_size, 0, 0, 0)


def blocks(npages: Mapping[str, int]) -> tuple[RamBlock, ...]:
    """Blocks that are nowhere, of pages of 4 KiB."""
    return tuple(block(name, n) for name, n in npages.items())


def page_set(bitmaps: Mapping[str, DirtyBitmap], page_size: int = PAGE) -> PageSet:
    """These bitmaps, of blocks that are nowhere."""
    return PageSet([block(n, b.npages, page_size) for n, b in bitmaps.items()], bitmaps)
