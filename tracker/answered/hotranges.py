"""A few ranges that hold most of some pages: what a mapping is divided into has to be few."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet

RANGES = 64
_ENOUGH = 0.99  # of the pages; what lies apart is not worth a range

Rows = NDArray[np.int64]


def hot_ranges(hot: PageSet, ranges: int = RANGES, enough: float = _ENOUGH) -> PageSet:
    """Choose ranges that hold nearly all of the pages that are hot, and few others.

    :param ranges: no more runs than this, in all blocks together; but one a block, if all are hot
    :param enough: leave out the ranges with the fewest hot pages, as long as the others hold this
        part of them
    :return: the pages of the ranges
    """
    found = PageSet.empty(hot.blocks)
    names = [name for name, pages in hot.items() if pages.any()]
    if not names:
        return found
    rows = np.concatenate([_joined(hot[name], ranges, n) for n, name in enumerate(names)])
    rows = rows[np.argsort(-rows[:, 3], kind="stable")]
    held = np.cumsum(rows[:, 3])
    needed = int(np.searchsorted(held, enough * held[-1])) + 1
    for block, first, last, _ in rows[: min(needed, ranges)].tolist():
        found[names[block]].set_range(first, last)
    return found


def _joined(pages: DirtyBitmap, ranges: int, block: int) -> Rows:
    """Join runs over the narrowest gaps until there are few enough.

    :return: shape (n, 4): block, first page, page after the last, pages that are hot
    """
    starts, lengths = pages.runs()
    stops = starts + lengths
    gaps = starts[1:] - stops[:-1]
    cuts = np.arange(len(gaps))
    if len(gaps) >= ranges:
        cuts = np.sort(np.argpartition(-gaps, ranges - 1)[: ranges - 1]) if ranges > 1 else cuts[:0]
    firsts, lasts = np.append(0, cuts + 1), np.append(cuts, len(gaps))
    held = np.append(0, np.cumsum(lengths))
    hot = held[lasts + 1] - held[firsts]
    return np.stack([np.full(len(hot), block), starts[firsts], stops[lasts], hot], axis=1)
