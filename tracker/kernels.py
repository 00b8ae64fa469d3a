"""The compiled loops over pages and bitmap words: nothing here asks, decides or keeps anything.

Two kinds of argument, which every kernel checks before it touches memory:

- *words*: page i is bit ``i % 64`` of ``words[i // 64]``, ``uint64`` in native byte order, C order.
  Bits past the last page are zero (see :class:`tracker.bitmap.DirtyBitmap`, whose methods are the
  usual way in).
- *memory*: a RAM block as a ``uint8`` array; its length is ``npages * page_size`` and says how
  many pages there are. ``page_size`` is in bytes. Read-only arrays are welcome as sources.

Kernels that take ``first_word`` and ``last_word`` do the pages of ``words[first_word:last_word]``
only. They hold no lock, so that threads may share one block's words, each with its own slice.

:raise BitmapError: whatever kernel it is: lengths that do not fit, bits past the last page

With ``NUMBA_DISABLE_JIT=1`` this file runs as plain Python.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tracker import native
from tracker.errors import BitmapError

Words = NDArray[np.uint64]
Memory = NDArray[np.uint8]
Kernel = TypeVar("Kernel", bound=Callable[..., Any])

# Without exact types numba makes uint64 and int64 a float64.
ZERO = np.uint64(0)
ONE = np.uint64(1)
ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
TOP = np.uint64(63)

LONGEST_COPY = 1 << 20
"""Bytes: adjacent pages are copied together up to this much; beyond, pwrite gains nothing."""


def kernel(function: Kernel) -> Kernel:
    """Compile at the first call, keep the machine code on disk, run without the GIL."""
    return cast(Kernel, njit(cache=True, nogil=True)(function))


# --- bits -----------------------------------------------------------------------------------------


@kernel
def same_length(a: Words, b: Words) -> None:
    """Check that two bitmaps have as many words."""
    if len(a) != len(b):
        raise BitmapError("bitmaps of different lengths")


@kernel
def popcount(words: Words) -> int:
    """Count the bits that are set."""
    count = 0
    for word in words:
        count += native.bit_count(word)
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
def bits_from(words: Words, first: int) -> Any:
    """64 bits from bit ``first`` on; those past the last word are zeros."""
    i, shift = first >> 6, np.uint64(first & 63)
    low = words[i] >> shift
    if shift == ZERO or i + 1 == len(words):
        return low
    return low | words[i + 1] << (np.uint64(64) - shift)


@kernel
def spread(
    bits: Words, first: int, nbits: int, bit_size: int, words: Words, page_size: int, offset: int
) -> None:
    """Set every page that a set bit touches: from pages of one size to pages of another.

    :param bits: a bitmap of pages of ``bit_size`` bytes, of which only the bits
        ``first <= bit < first + nbits`` count; what is set elsewhere is ignored
    :param bit_size: a power of two, in bytes; larger than ``page_size``, equal or smaller
    :param words: pages are added; the last word may hold fewer than 64 of them, which is the
        caller's to know: the range has to end within the last page
    :param page_size: a power of two, in bytes
    :param offset: where bit ``first`` begins, in bytes from the start of page 0, any number
    :raise BitmapError: a size that is no power of two, or a range that leaves the bits or the words
    """
    if bit_size < 1 or bit_size & (bit_size - 1) or page_size < 1 or page_size & (page_size - 1):
        raise BitmapError("a page size that is no power of two")
    if first < 0 or nbits < 0 or first + nbits > 64 * len(bits):
        raise BitmapError("a range outside the bits")
    if offset < 0 or offset + nbits * bit_size > 64 * len(words) * page_size:
        raise BitmapError("a range outside the bitmap")
    shift = native.trailing_zeros(np.uint64(page_size))
    aligned = bit_size == page_size and offset & (page_size - 1) == 0
    for i in range(0, nbits, 64):
        todo = bits_from(bits, first + i)
        if nbits - i < 64:
            todo &= ALL >> np.uint64(64 - (nbits - i))
        if todo == ZERO:
            continue
        if aligned:
            page = (offset >> shift) + i
            into, by = page >> 6, np.uint64(page & 63)
            words[into] |= todo << by
            if by != ZERO and todo >> (np.uint64(64) - by) != ZERO:
                words[into + 1] |= todo >> (np.uint64(64) - by)
            continue
        while todo != ZERO:  # run by run
            bit = native.trailing_zeros(todo)
            length = native.trailing_zeros(~(todo >> np.uint64(bit)))
            start = offset + (i + bit) * bit_size
            stop = start + length * bit_size
            fill(words, start >> shift, (stop + page_size - 1) >> shift)
            if bit + length == 64:
                break
            todo &= ALL << np.uint64(bit + length)


@kernel
def count_runs(words: Words) -> int:
    """Count the maximal runs of set bits."""
    count = 0
    before = ZERO  # the bit before the word at hand
    for word in words:
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


# --- pages ----------------------------------------------------------------------------------------


@kernel
def fits(words: Words, npages: int) -> None:
    """Check that a bitmap is one of ``npages`` pages: its bits index memory."""
    if len(words) != (npages + 63) >> 6:
        raise BitmapError("a bitmap that is not as long as the memory")
    if npages & 63 and words[-1] >> np.uint64(npages & 63):
        raise BitmapError("bits past the last page")


@kernel
def pages_in(memory: Memory, page_size: int) -> int:
    """Count the pages of ``memory``."""
    if page_size < 1 or len(memory) % page_size:
        raise BitmapError("memory that is not whole pages")
    return len(memory) // page_size


@kernel
def is_zero(memory: Memory, start: int, stop: int) -> bool:
    """Tell whether ``memory[start:stop]``, one byte or more, is all zeros.

    It is if its first byte is and each byte equals the next; memcmp stops at the first that does
    not, a vector register at a time.
    """
    head, rest = memory[start : stop - 1], memory[start + 1 : stop]
    return memory[start] == 0 and native.memcmp(rest.ctypes, head.ctypes, stop - start - 1) == 0


@kernel
def zero_pages(memory: Memory, page_size: int, words_in: Words, words_out: Words) -> None:
    """Set ``words_out`` to the pages of ``words_in`` that are all zeros; read no other page."""
    npages = pages_in(memory, page_size)
    fits(words_in, npages)
    same_length(words_in, words_out)
    for i in range(len(words_in)):
        todo, zeros = words_in[i], ZERO
        while todo != ZERO:
            bit = native.trailing_zeros(todo)
            start = (64 * i + bit) * page_size
            if is_zero(memory, start, start + page_size):
                zeros |= ONE << np.uint64(bit)
            todo &= todo - ONE
        words_out[i] = zeros


@kernel
def put(src: Memory, dst: Memory, dst_fd: int, start: int, stop: int) -> int:
    """Write ``src[start:stop]`` to the same place of the destination.

    :return: 0, or the errno of pwrite or madvise
    """
    if start == stop:
        return 0
    if dst_fd < 0:
        target, nbytes = dst[start:stop], stop - start
        if native.madvise(target.ctypes, nbytes, native.MADV_POPULATE_WRITE) != 0:
            return native.errno()
        native.memcpy(target.ctypes, src[start:stop].ctypes, nbytes)
        return 0
    while start < stop:
        written = native.pwrite(dst_fd, src[start:stop].ctypes, stop - start, start)
        if written < 0:
            return native.errno()
        if written == 0:
            return errno.EIO
        start += written
    return 0


@kernel
def copy_pages(
    src: Memory,
    dst: Memory,
    dst_fd: int,
    page_size: int,
    dirty: Words,
    data: Words,
    present: Words,
    cleared: Words,
    first_word: int,
    last_word: int,
) -> tuple[int, int, int]:
    """Make the dirty pages of ``dst`` what they are in ``src``, and leave holes holes.

    A page that is a hole in ``src`` is read on neither side: if the destination has it, it is only
    listed in ``cleared``. A page of zeros is left out where the destination has a hole. Everything
    else is copied: with pwrite(2) into ``dst_fd``, or with memcpy through ``dst`` where the file
    takes no writes (hugetlbfs).

    pwrite is the rule because a page that is not there yet costs half as much as through a mapping
    (no fault, no clearing before the copy), one that is there but not mapped by us a third, and
    because a full tmpfs is ENOSPC instead of SIGBUS. Calls on one file take turns, in the kernel.

    :param src: read only where both ``dirty`` and ``data`` are set
    :param dst: the destination's memory, of the same length; may be empty where ``dst_fd`` is given
    :param dst_fd: the destination's file, or -1 to write to ``dst``, which then is a shared mapping
    :param dirty: pages to bring over
    :param data: pages of ``src`` that hold data, as of after ``dirty`` was collected
    :param present: pages that the destination's file holds; copied ones are added before they are
        written, so that none is ever missing
    :param cleared: set to the dirty pages that the destination holds and the source does not: to be
        punched out of the destination's file, and taken from ``present``, before the next call
    :return: pages copied, pages of zeros left out (holes are in neither), and 0 or the errno at
        which it ended; then nothing is known about any dirty page of the slice: all are owed
    """
    npages = pages_in(src, page_size)
    if len(dst) != len(src) and (dst_fd < 0 or len(dst) != 0):
        raise BitmapError("memory of different lengths")
    fits(dirty, npages)
    fits(data, npages)
    fits(present, npages)
    fits(cleared, npages)
    if first_word < 0 or last_word > len(dirty):
        raise BitmapError("a slice outside the bitmap")
    copied = zeros = 0
    run_start = run_stop = 0  # bytes: adjacent pages that are still to be written, in one go
    for i in range(first_word, last_word):
        cleared[i] = dirty[i] & ~data[i] & present[i]
        todo = dirty[i] & data[i]
        while todo != ZERO:
            bit = native.trailing_zeros(todo)
            page = ONE << np.uint64(bit)
            todo ^= page
            start = (64 * i + bit) * page_size
            if present[i] & page == ZERO and is_zero(src, start, start + page_size):
                zeros += 1
                continue
            present[i] |= page
            copied += 1
            if start != run_stop or run_stop - run_start >= LONGEST_COPY:
                error = put(src, dst, dst_fd, run_start, run_stop)
                if error != 0:
                    return copied, zeros, error
                run_start = start
            run_stop = start + page_size
    return copied, zeros, put(src, dst, dst_fd, run_start, run_stop)


@kernel
def punch_pages(fd: int, page_size: int, words: Words) -> int:
    """Make the pages holes in the file: they read as zeros and take no memory.

    :return: 0, or the errno of fallocate(2)
    """
    n = count_runs(words)
    starts, lengths = np.empty(n, np.int64), np.empty(n, np.int64)
    find_runs(words, starts, lengths)
    for i in range(n):
        offset, nbytes = starts[i] * page_size, lengths[i] * page_size
        if native.fallocate(fd, native.PUNCH_HOLE, offset, nbytes) != 0:
            return native.errno()
    return 0


@kernel
def compare_pages(
    a: Memory,
    b: Memory,
    page_size: int,
    a_data: Words,
    b_data: Words,
    differing: Words,
    first_word: int,
    last_word: int,
) -> int:
    """Compare every page of the slice; a hole is equal to zeros, and is not read.

    :param a_data: pages of ``a`` that hold data, the others are holes; likewise ``b_data``
    :param differing: set to the pages that differ
    :return: how many differ
    """
    npages = pages_in(a, page_size)
    if len(a) != len(b):
        raise BitmapError("memory of different lengths")
    fits(a_data, npages)
    fits(b_data, npages)
    fits(differing, npages)
    if first_word < 0 or last_word > len(a_data):
        raise BitmapError("a slice outside the bitmap")
    count = 0
    for i in range(first_word, last_word):
        found = ZERO
        todo = a_data[i] | b_data[i]
        while todo != ZERO:
            bit = native.trailing_zeros(todo)
            page = ONE << np.uint64(bit)
            todo ^= page
            start = (64 * i + bit) * page_size
            stop = start + page_size
            if a_data[i] & page == ZERO:
                equal = is_zero(b, start, stop)
            elif b_data[i] & page == ZERO:
                equal = is_zero(a, start, stop)
            else:
                equal = native.memcmp(a[start:stop].ctypes, b[start:stop].ctypes, page_size) == 0
            if not equal:
                found |= page
                count += 1
        differing[i] = found
    return count


@kernel
def seek_data(fd: int, npages: int, page_size: int, words: Words) -> int:
    """Set ``words`` to the pages of a file that hold data, in whole or in part.

    On tmpfs and disk file systems. hugetlbfs says that everything is data.

    :param fd: its file position is moved: not a duplicate of somebody else's
    :return: 0, or the errno of lseek(2): ENXIO where the file is shorter than the pages
    """
    words[:] = ZERO
    fits(words, npages)
    nbytes = npages * page_size
    stop = 0
    while stop < nbytes:
        start = native.lseek(fd, stop, os.SEEK_DATA)
        if start < 0:
            error = native.errno()
            if error == errno.ENXIO:  # no data from here on, or the file ends: told apart below
                break
            return error
        if start >= nbytes:
            break
        stop = native.lseek(fd, start, os.SEEK_HOLE)
        if stop < 0:
            return native.errno()
        if stop > start:  # else it was punched out meanwhile
            fill(words, start // page_size, (min(stop, nbytes) + page_size - 1) // page_size)
    size = native.lseek(fd, 0, os.SEEK_END)
    if size < 0:
        return native.errno()
    return 0 if size >= nbytes else errno.ENXIO


# --- before a migration ---------------------------------------------------------------------------


def warm_up() -> None:
    """Compile every kernel, or load it from disk, for all types of argument that occur.

    The first time takes ten seconds or more: not a thing to happen between two rounds.
    """
    words, count = np.zeros(1, np.uint64), np.zeros(1, np.int64)
    memory = np.zeros(4096, np.uint8)
    mapped = memory.copy()
    mapped.flags.writeable = False  # a PROT_READ mapping is another type to numba
    fill(words, 0, 0)
    popcount(words)
    or_into(words, words)
    or_count(words, words)
    minus_into(words, words)
    set_ranges(words, count, count, 1)
    set_regions(words, np.zeros((1, 3), np.uint64), 1, 0, 4096)
    spread(words, 0, 1, 4096, words, 4096, 0)
    runs(words)
    seek_data(-1, 0, 4096, words[:0])
    punch_pages(-1, 4096, words)
    for a in (memory, mapped):
        zero_pages(a, 4096, words, words)
        copy_pages(a, memory, -1, 4096, words, words, words, words, 0, 0)
        for b in (memory, mapped):
            compare_pages(a, b, 4096, words, words, words, 0, 0)
