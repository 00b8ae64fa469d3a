"""Pages of all blocks at once: a bitmap for each, by the name of the block."""

from __future__ import annotations

from collections.abc import Mapping

from tracker.bits.bitmap import DirtyBitmap

Bitmaps = Mapping[str, DirtyBitmap]
MutableBitmaps = dict[str, DirtyBitmap]


def no_pages(npages: Mapping[str, int]) -> MutableBitmaps:
    """No page of any block.

    :param npages: pages by block
    """
    return {name: DirtyBitmap.empty(n) for name, n in npages.items()}


def union(first: Bitmaps, *others: Bitmaps) -> MutableBitmaps:
    """Pages that are in any of them; the caller's to change."""
    found = {name: pages.copy() for name, pages in first.items()}
    for other in others:
        for name, pages in other.items():
            found[name] |= pages
    return found


def without(pages: Bitmaps, others: Bitmaps) -> MutableBitmaps:
    """Pages that are not in ``others``; the caller's to change."""
    return {name: bitmap.minus(others[name]) for name, bitmap in pages.items()}


def count(bitmaps: Bitmaps) -> int:
    """How many pages, of whatever size."""
    return sum(bitmap.count() for bitmap in bitmaps.values())


def any_of(bitmaps: Bitmaps) -> bool:
    """Whether there is a page."""
    return any(bitmap.any() for bitmap in bitmaps.values())
