"""The compiled loops over the words of bitmaps: nothing here asks, decides or keeps anything.

These are the kernels of one bitmap or two; :mod:`tracker.bits.union` has those of many,
:mod:`tracker.bits.rescale` of pages of two sizes, :mod:`tracker.memory.pages` of memory. Two kinds
of argument, which every kernel checks before it touches memory:

- *words*: page i is bit ``i % 64`` of ``words[i // 64]``, ``uint64`` in native byte order, C order.
  Bits past the last page are zero (see :class:`tracker.bits.bitmap.DirtyBitmap`, whose methods are
  the usual way in).
- *memory*: a RAM block as a ``uint8`` array; its length is ``npages * page_size`` and says how
  many pages there are. ``page_size`` is in bytes. Read-only arrays are welcome as sources.

Kernels that take ``first_word`` and ``last_word`` do the pages of ``words[first_word:last_word]``
only. They hold no lock, so that threads may share one block's words, each with its own slice.

:raise BitmapError: whatever kernel it is: lengths that do not fit, bits past the last page

With ``NUMBA_DISABLE_JIT=1`` all of them run as plain Python.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba import njit
from numpy.typing import NDArray

from tracker.bits import native
from tracker.bits.kernelcache import fallback_directory, stamp
from tracker.errors import BitmapError

Words = NDArray[np.uint64]
Memory = NDArray[np.uint8]
Kernel = TypeVar("Kernel", bound=Callable[..., Any])

# Without exact types numba makes uint64 and int64 a float64.
ZERO = np.uint64(0)
ONE = np.uint64(1)
ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
TOP = np.uint64(63)

_log = logging.getLogger(__name__)
_keeps = True  # whether machine code is kept on disk


def kernel(function: Kernel) -> Kernel:
    """Compile at the first call, keep the machine code on disk, run without the GIL."""
    global _keeps
    if _keeps:
        try:
            return cast(Kernel, stamp(njit(cache=True, nogil=True)(function), function))
        except RuntimeError:  # numba's: it may write neither beside the function nor to HOME
            _keeps = _keep_elsewhere()
            return kernel(function)
    return cast(Kernel, njit(nogil=True)(function))


def _keep_elsewhere() -> bool:
    """Have numba keep machine code in a directory of this user's; return whether there is one.

    Processes that are started later find it in their environment.
    """
    place = fallback_directory()
    if place is None or os.environ.get("NUMBA_CACHE_DIR") == str(place):
        _log.warning("kernels are compiled anew by each process, which takes a minute")
        return False
    _log.warning("neither the program's directory nor HOME is writable: kernels are in %s", place)
    os.environ["NUMBA_CACHE_DIR"] = str(place)
    numba.config.reload_config()  # type: ignore[no-untyped-call]
    return True


@kernel
def same_length(a: Words, b: Words) -> None:
    """Check that two bitmaps have as many words."""
    if len(a) != len(b):
        raise BitmapError("bitmaps of different lengths")


@kernel
def popcount(words: Words) -> int:
    """Count the bits that are set."""
    count = 0
    for i in range(len(words)):  # by index: LLVM makes better vectors of it than of an iteration
        count += native.bit_count(words[i])
    return count


@kernel
def or_into(dst: Words, src: Words) -> None:
    """``dst |= src``."""
    same_length(dst, src)
    for i in range(len(dst)):
        dst[i] |= src[i]


@kernel
def or_count(dst: Words, src: Words) -> int:
    """``dst |= src``.

    :return: how many bits were not set in ``dst`` before
    """
    same_length(dst, src)
    new = 0
    for i in range(len(dst)):
        new += native.bit_count(src[i] & ~dst[i])
        dst[i] |= src[i]
    return new


@kernel
def minus_into(dst: Words, src: Words) -> None:
    """``dst &= ~src``."""
    same_length(dst, src)
    for i in range(len(dst)):
        dst[i] &= ~src[i]


@kernel
def fill(words: Words, start: int, stop: int) -> None:
    """Set the bits of the pages ``start <= page < stop``, which the caller has checked."""
    if start >= stop:
        return
    first, last = start >> 6, (stop - 1) >> 6
    head = ALL << np.uint64(start & 63)
    tail = ALL >> np.uint64(63 - ((stop - 1) & 63))
    if first == last:
        words[first] |= head & tail
        return
    words[first] |= head
    for i in range(first + 1, last):
        words[i] = ALL
    words[last] |= tail


@kernel
def set_ranges(words: Words, starts: NDArray[np.int64], stops: NDArray[np.int64], n: int) -> None:
    """Set the pages of the first ``n`` ranges ``[starts[i], stops[i])``.

    :raise BitmapError: a range ends before it starts, or leaves the words
    """
    if n > len(starts) or n > len(stops):
        raise BitmapError("fewer ranges than announced")
    for i in range(n):
        start, stop = starts[i], stops[i]
        if start < 0 or stop < start or stop > 64 * len(words):
            raise BitmapError("a range of pages outside the bitmap")
        fill(words, start, stop)


@kernel
def set_regions(
    words: Words, regions: NDArray[np.uint64], n: int, base: int, page_size: int
) -> None:
    """Set the pages of the first ``n`` regions that PAGEMAP_SCAN listed.

    :param regions: n or more rows of ``struct page_region`` (include/uapi/linux/fs.h): start and
        end address in bytes, categories. A region that is not aligned to ``page_size`` counts
        for every page it touches.
    :param base: address of page 0
    :param page_size: a power of two, in bytes
    :raise BitmapError: a region ends before it starts, or leaves the words
    """
    if n > len(regions) or regions.shape[1] != 3:
        raise BitmapError("not a vector of as many page regions as announced")
    if page_size < 1 or page_size & (page_size - 1):
        raise BitmapError("a page size that is no power of two")
    shift = native.trailing_zeros(np.uint64(page_size))
    limit = 64 * len(words) * page_size
    for i in range(n):
        start, end = np.int64(regions[i, 0]) - base, np.int64(regions[i, 1]) - base
        if start < 0 or end < start or end > limit:
            raise BitmapError("a region outside the bitmap")
        if end > start:
            fill(words, start >> shift, (end + page_size - 1) >> shift)


@kernel
def fits(words: Words, npages: int) -> None:
    """Check that a bitmap is one of ``npages`` pages: its bits index memory."""
    if len(words) != (npages + 63) >> 6:
        raise BitmapError("a bitmap that is not as long as the memory")
    if npages & 63 and words[-1] >> np.uint64(npages & 63):
        raise BitmapError("bits past the last page")


@kernel
def count_runs(words: Words) -> int:
    """Count the maximal runs of set bits."""
    count = 0
    before = ZERO  # the bit before the word at hand
    for i in range(len(words)):
        word = words[i]
        count += native.bit_count(word & ~((word << ONE) | before))
        before = word >> TOP
    return count


@kernel
def find_runs(words: Words, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
    """Find as many runs as :func:`count_runs` counted."""
    opened = closed = 0
    before = ZERO
    for i in range(len(words)):
        word = words[i]
        shifted = (word << ONE) | before
        before = word >> TOP
        edges = word & ~shifted
        while edges != ZERO:
            starts[opened] = 64 * i + native.trailing_zeros(edges)
            opened += 1
            edges &= edges - ONE
        edges = shifted & ~word
        while edges != ZERO:
            lengths[closed] = 64 * i + native.trailing_zeros(edges) - starts[closed]
            closed += 1
            edges &= edges - ONE
    if closed < opened:
        lengths[closed] = 64 * len(words) - starts[closed]


def runs(words: Words) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Maximal runs of set bits, in order.

    Not compiled itself: numpy gets the memory for millions of runs as huge pages, numba does not.

    :return: first page and number of pages of each
    """
    n = count_runs(words)
    starts, lengths = np.empty(n, np.int64), np.empty(n, np.int64)
    find_runs(words, starts, lengths)
    return starts, lengths


def warm_up() -> None:
    """Compile every kernel, or load it from disk, for all types of argument that occur."""
    words, count = np.zeros(1, np.uint64), np.zeros(1, np.int64)
    fill(words, 0, 0)
    popcount(words)
    or_into(words, words)
    or_count(words, words)
    minus_into(words, words)
    set_ranges(words, count, count, 1)
    set_regions(words, np.zeros((1, 3), np.uint64), 1, 0, 4096)
    runs(words)
