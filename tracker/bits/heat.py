"""How often each page was written, and how long ago: what one bitmap after another leaves behind.

Four bytes a page: its *age*, which tells the working set of any time that has passed, and its
*heat*, which tells what is written over and over from what was written once.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.words import ONE, ZERO, Words, fits, kernel
from tracker.errors import BitmapError

MEMORY_S = 10.0
"""Seconds after which what was written weighs 1/e of what is written now."""

NEVER = 0xFFFF
HOTTEST = 0xFFFF

Counters = NDArray[np.uint16]


@kernel
def note(words: Words, ages: Counters, heats: Counters, gain: int) -> None:
    """Take in one more bitmap.

    :param ages: for each page, how many bitmaps came after the last one it was in; ``NEVER`` if
        it was in none, or too long ago
    :param heats: for each page, how much of the time it was written, in 1/65535, the latest bitmaps
        counting most
    :param gain: 1 to 65536: the weight of this bitmap, in 1/65536
    """
    fits(words, len(ages))
    if len(heats) != len(ages):
        raise BitmapError("ages and heats of different lengths")
    if gain < 1 or gain > 0x10000:
        raise BitmapError("a weight that is no share of 65536")
    for page in range(len(ages)):
        heat = np.int64(heats[page])
        heat -= (heat * gain + 0xFFFF) >> 16  # rounded up: what is never written again cools to 0
        if (words[page >> 6] >> np.uint64(page & 63)) & ONE != ZERO:
            ages[page] = 0
            heat = min(heat + gain, HOTTEST)
        elif ages[page] != NEVER:
            ages[page] += 1
        heats[page] = heat


@kernel
def count_younger(ages: Counters, than: int) -> int:
    """Count the pages whose age is less."""
    count = 0
    for age in ages:
        if age < than:
            count += 1
    return count


@kernel
def average(heats: Counters, cells: NDArray[np.float64]) -> None:
    """Divide the pages into ranges as equal as they can be; set ``cells`` to their mean heats.

    :param cells: of each range, 0 to 1
    :raise BitmapError: more ranges than pages
    """
    if len(cells) > len(heats):
        raise BitmapError("more cells than pages")
    stop = 0
    for cell in range(len(cells)):
        start, stop = stop, (cell + 1) * len(heats) // len(cells)
        total = 0
        for page in range(start, stop):
            total += np.int64(heats[page])
        cells[cell] = total / (HOTTEST * (stop - start))


class History:
    """What was written of one RAM block, and when.

    :ivar npages: pages of the block
    """

    def __init__(self, npages: int) -> None:
        self.npages = npages
        self._ages: Counters = np.full(npages, NEVER, np.uint16)
        self._heats: Counters = np.zeros(npages, np.uint16)
        self._weight = 0.0  # of all bitmaps so far: 1 after long enough

    def note(self, written: DirtyBitmap, seconds: float) -> None:
        """Take in the pages that were written in the time since the last call.

        :param seconds: how long that was, more than 0
        :raise BitmapError: a bitmap of another number of pages
        """
        if written.npages != self.npages:
            raise BitmapError(f"a bitmap of {written.npages} pages for {self.npages}")
        gain = max(1, round(0x10000 * -math.expm1(-seconds / MEMORY_S)))
        note(written.words, self._ages, self._heats, gain)
        self._weight += (1 - self._weight) * gain / 0x10000

    def written_in(self, last: int) -> int:
        """Count the pages that were in any of the last so many bitmaps, at most 65535."""
        return int(count_younger(self._ages, last))

    def strip(self, cells: int) -> NDArray[np.float64]:
        """Heat of the block from its first page to its last.

        :return: shape ``(cells,)``, or ``(npages,)`` if that is less: how much of the time that is
            remembered the pages of each range were written, on average, 0 to 1
        """
        found = np.zeros(min(cells, self.npages), np.float64)
        average(self._heats, found)
        return np.minimum(found / (self._weight or 1.0), 1.0)


def warm_up() -> None:
    """Compile every kernel, or load it from disk."""
    counters = np.zeros(1, np.uint16)
    note(np.zeros(1, np.uint64), counters, counters.copy(), 1)
    count_younger(counters, 1)
    average(counters, np.zeros(1, np.float64))
