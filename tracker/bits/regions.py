"""How many pages of each range of memory a bitmap holds: what a picture of memory is made of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tracker.bits import native
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.words import ALL, Words, fits, kernel
from tracker.errors import BitmapError

Counts = NDArray[np.int64]


@kernel
def count_range(words: Words, start: int, stop: int) -> int:
    """Count the bits of the pages ``start <= page < stop``, which the caller has checked."""
    if start >= stop:
        return 0
    first, last = start >> 6, (stop - 1) >> 6
    head = ALL << np.uint64(start & 63)
    tail = ALL >> np.uint64(63 - ((stop - 1) & 63))
    if first == last:
        return int(native.bit_count(words[first] & head & tail))
    count = native.bit_count(words[first] & head) + native.bit_count(words[last] & tail)
    for i in range(first + 1, last):
        count += native.bit_count(words[i])
    return int(count)


@kernel
def count_regions(words: Words, npages: int, counts: Counts) -> None:
    """Divide the pages into ranges as equal as they can be; count the bits of each.

    :param counts: set to the number of pages of each range
    :raise BitmapError: words that are not of ``npages`` pages; more ranges than pages
    """
    fits(words, npages)
    if len(counts) > npages:
        raise BitmapError("more regions than pages")
    stop = 0
    for region in range(len(counts)):
        start, stop = stop, (region + 1) * npages // len(counts)
        counts[region] = count_range(words, start, stop)


def edges(npages: int, regions: int) -> Counts:
    """First page of each region, and the page after the last; shape ``(regions + 1,)``."""
    return np.arange(regions + 1, dtype=np.int64) * npages // regions


def by_region(pages: DirtyBitmap, regions: int) -> Counts:
    """Count the pages in each of so many ranges of the block, whose bounds :func:`edges` tells.

    :return: shape ``(regions,)``
    :raise BitmapError: more regions than pages
    """
    counts = np.zeros(regions, np.int64)
    count_regions(pages.words, pages.npages, counts)
    return counts


def warm_up() -> None:
    """Compile every kernel, or load it from disk."""
    count_regions(np.zeros(1, np.uint64), 1, np.zeros(1, np.int64))
