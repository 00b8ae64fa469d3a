"""The compiled loops over pages: found to be zeros, copied, compared, reserved, punched out.

Arguments are those of :mod:`tracker.bits.words`.

:raise BitmapError: whatever kernel it is: lengths that do not fit, bits past the last page
"""

from __future__ import annotations

import errno
import os

import numpy as np

from tracker.bits import native
from tracker.bits.words import (
    ONE,
    ZERO,
    Memory,
    Words,
    count_runs,
    fill,
    find_runs,
    fits,
    kernel,
    same_length,
)
from tracker.errors import BitmapError

LONGEST_COPY = 1 << 20
"""Bytes: adjacent pages are copied together up to this much; beyond, pwrite gains nothing."""

LONGEST_PUNCH = 16 << 20
"""Bytes, but for a larger page: tmpfs counts pages as free only when the call that punches them has
ended (Linux: ``mm/shmem.c:shmem_truncate_range``), and a guest may wait for them."""


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
        offset, end = starts[i] * page_size, (starts[i] + lengths[i]) * page_size
        while offset < end:
            nbytes = min(end - offset, max(LONGEST_PUNCH, page_size))
            if native.fallocate(fd, native.PUNCH_HOLE, offset, nbytes) != 0:
                return native.errno()
            offset += nbytes
    return 0


@kernel
def reserve_pages(fd: int, page_size: int, words: Words, first_word: int, last_word: int) -> int:
    """Allocate the pages of a slice of words in the file; their content stays.

    A page that was a hole reads as zeros, and stays one to SEEK_DATA until it is written.

    :return: 0, or the errno of fallocate(2): then some of them may be allocated
    """
    if first_word < 0 or last_word > len(words):
        raise BitmapError("a slice outside the bitmap")
    some = words[first_word:last_word]
    n = count_runs(some)
    starts, lengths = np.empty(n, np.int64), np.empty(n, np.int64)
    find_runs(some, starts, lengths)
    for i in range(n):
        offset, nbytes = (64 * first_word + starts[i]) * page_size, lengths[i] * page_size
        while native.fallocate(fd, 0, offset, nbytes) != 0:
            error = native.errno()
            if error != errno.EINTR:
                return error
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


def warm_up() -> None:
    """Compile every kernel, or load it from disk, for memory that may be written and may not."""
    words = np.zeros(1, np.uint64)
    memory = np.zeros(4096, np.uint8)
    mapped = memory.copy()
    mapped.flags.writeable = False  # a PROT_READ mapping is another type to numba
    seek_data(-1, 0, 4096, words[:0])
    punch_pages(-1, 4096, words)
    reserve_pages(-1, 4096, words, 0, 1)
    for a in (memory, mapped):
        zero_pages(a, 4096, words, words)
        copy_pages(a, memory, -1, 4096, words, words, words, words, 0, 0)
        for b in (memory, mapped):
            compare_pages(a, b, 4096, words, words, words, 0, 0)
