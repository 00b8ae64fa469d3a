"""The compiled loops between a RAM block and a frame (:mod:`migrator.transport.frames`).

A frame's pages are listed as *runs*: rows ``(start, length * 2 + zeros)`` of ``uint64``,
little-endian on the wire and here, in ascending order, no two with a unit in common. They count in
*units* of 4096 bytes from the start of the block, whatever its page size. The content of the runs
without ``zeros`` follows, one after the other; the others have none, and read as zeros.

For *words* and *memory* see :mod:`tracker.bits.words`. With ``NUMBA_DISABLE_JIT=1`` this file runs
as plain Python.
"""

from __future__ import annotations

import errno

import numpy as np
from numpy.typing import NDArray

from tracker.bits import native
from tracker.bits.words import ONE, ZERO, Memory, Words, fits, kernel
from tracker.errors import BitmapError
from tracker.memory.pages import is_zero

Runs = NDArray[np.uint64]

UNIT = 4096
"""Bytes."""
UNITS_PER_FRAME = 256
"""Units of content in one frame, at most: 1 MiB."""
RUNS_PER_FRAME = 1023
"""With the frame's head they are one writev(2): include/uapi/linux/uio.h, UIO_MAXIOV."""

_ONE_RUN = np.uint64(2)


@kernel
def plan(
    memory: Memory, dirty: Words, data: Words, first: int, last: int, runs: Runs
) -> tuple[int, int, int, int]:
    """List the dirty units from ``first`` on, until a frame is full or ``last`` is reached.

    Units of zeros are found by reading them; holes are not read.

    :param dirty: a bit a unit; likewise ``data``, units that hold data
    :param runs: where to list them; its length is the most that a frame takes
    :return: number of runs, of units with content, of units of zeros; and where to go on
    """
    nunits = len(memory) // UNIT
    fits(dirty, nunits)
    fits(data, nunits)
    if first < 0 or last > nunits:
        raise BitmapError("a range outside the bitmap")
    n = content = zeros = 0
    end = -1  # of the last run
    before = ZERO  # 1 if the last run is one of zeros
    at = first
    while at < last:
        word = dirty[at >> 6] >> np.uint64(at & 63)
        if word == ZERO:
            at = (at | 63) + 1
            continue
        at += native.trailing_zeros(word)
        if at >= last:
            break
        kind = ONE
        if (data[at >> 6] >> np.uint64(at & 63)) & ONE != ZERO and not is_zero(
            memory, at * UNIT, (at + 1) * UNIT
        ):
            kind = ZERO
            if content == UNITS_PER_FRAME:
                return n, content, zeros, at
        if at == end and kind == before:
            runs[n - 1, 1] += _ONE_RUN
        else:
            if n == len(runs):
                return n, content, zeros, at
            runs[n, 0] = at
            runs[n, 1] = _ONE_RUN | kind
            n += 1
        before = kind
        if kind == ZERO:
            content += 1
        else:
            zeros += 1
        at += 1
        end = at
    return n, content, zeros, last


@kernel
def check(runs: Runs, nunits: int) -> int:
    """Check runs that came from elsewhere.

    :param nunits: units of the block
    :return: units of content, or -1 if the runs are not in order, overlap, or leave the block
    """
    content = 0
    end = ZERO
    limit = np.uint64(nunits)
    for i in range(len(runs)):
        start, length = runs[i, 0], runs[i, 1] >> ONE
        if length == ZERO or length > limit or start > limit - length or start < end:
            return -1
        end = start + length
        if runs[i, 1] & ONE == ZERO:
            content += np.int64(length)
    return content


@kernel
def mark(runs: Runs, words: Words) -> None:
    """Set the units of all runs, which were checked."""
    for i in range(len(runs)):
        at = np.int64(runs[i, 0])
        stop = at + np.int64(runs[i, 1] >> ONE)
        while at < stop:
            words[at >> 6] |= ONE << np.uint64(at & 63)
            at += 1


@kernel
def gather(memory: Memory, runs: Runs, into: Memory) -> int:
    """Copy the content of the runs, one after the other.

    :return: bytes
    """
    filled = 0
    for i in range(len(runs)):
        if runs[i, 1] & ONE != ZERO:
            continue
        start = np.int64(runs[i, 0]) * UNIT
        nbytes = np.int64(runs[i, 1] >> ONE) * UNIT
        if start + nbytes > len(memory) or filled + nbytes > len(into):
            raise BitmapError("a run outside the memory")
        native.memcpy(
            into[filled : filled + nbytes].ctypes, memory[start : start + nbytes].ctypes, nbytes
        )
        filled += nbytes
    return filled


@kernel
def send(fd: int, head: Memory, address: int, nunits: int, runs: Runs, vectors: Runs) -> int:
    """Write a frame's head, and the content of its runs straight from memory, to a blocking socket.

    :param address: of the first byte of the block, which has ``nunits`` units
    :param vectors: room for one ``struct iovec`` a run, and one more
    :return: 0, or the errno of writev(2)
    """
    vectors[0, 0], vectors[0, 1] = head.ctypes.data, len(head)
    n = 1
    for i in range(len(runs)):
        if runs[i, 1] & ONE != ZERO:
            continue
        start, length = np.int64(runs[i, 0]), np.int64(runs[i, 1] >> ONE)
        if start + length > nunits or n >= len(vectors):
            raise BitmapError("a run outside the memory")
        vectors[n, 0] = address + start * UNIT
        vectors[n, 1] = length * UNIT
        n += 1
    first = 0
    while first < n:
        written = np.int64(native.writev(fd, vectors[first:].ctypes, n - first))
        if written < 0:
            error = native.errno()
            if error != errno.EINTR:
                return error
            continue
        while first < n and written >= np.int64(vectors[first, 1]):
            written -= np.int64(vectors[first, 1])
            first += 1
        if first < n:
            vectors[first, 0] += np.uint64(written)
            vectors[first, 1] -= np.uint64(written)
    return 0


@kernel
def _add(present: Words, start: int, nbytes: int, page_size: int) -> None:
    """Set the pages that some bytes are in."""
    for page in range(start // page_size, (start + nbytes - 1) // page_size + 1):
        present[page >> 6] |= ONE << np.uint64(page & 63)


@kernel
def put(
    content: Memory, runs: Runs, memory: Memory, fd: int, page_size: int, present: Words
) -> int:
    """Write what came in a frame to the destination's RAM.

    :param content: the content of the runs, one after the other
    :param runs: checked
    :param memory: the destination's memory, mapped to be written, where ``fd`` is -1 (hugetlbfs
        takes no writes); else it may be empty
    :param present: pages that the file holds; those that were written are added, and no others: of
        a file system that is full, a hole that counts as present is a SIGBUS to whoever reads it
    :return: 0, or the errno of pwrite(2) or madvise(2)
    """
    taken = 0
    for i in range(len(runs)):
        if runs[i, 1] & ONE != ZERO:
            continue
        start = np.int64(runs[i, 0]) * UNIT
        nbytes = np.int64(runs[i, 1] >> ONE) * UNIT
        if taken + nbytes > len(content):
            raise BitmapError("less content than the runs have")
        if fd < 0:
            whole = start // page_size * page_size
            end = ((start + nbytes - 1) // page_size + 1) * page_size
            if (
                native.madvise(memory[whole:end].ctypes, end - whole, native.MADV_POPULATE_WRITE)
                != 0
            ):
                return native.errno()
            _add(present, start, nbytes, page_size)
            native.memcpy(
                memory[start : start + nbytes].ctypes,
                content[taken : taken + nbytes].ctypes,
                nbytes,
            )
            taken += nbytes
            continue
        while nbytes > 0:
            written = native.pwrite(fd, content[taken : taken + nbytes].ctypes, nbytes, start)
            if written < 0:
                return native.errno()
            if written == 0:
                return errno.EIO
            _add(present, start, written, page_size)
            taken += written
            start += written
            nbytes -= written
    return 0


@kernel
def clear(runs: Runs, seen: Memory, memory: Memory, fd: int, page_size: int, present: Words) -> int:
    """Make the runs of zeros read as zeros at the destination.

    Pages that the file does not hold do so already, and so do those that hold zeros, which stay: a
    destination that was preallocated keeps its pages. Others become holes, or, on hugetlbfs, zeros.

    :param runs: checked; others are left alone
    :param seen: the destination's memory, mapped to be read
    :param memory: see :func:`put`
    :return: 0, or the errno of fallocate(2)
    """
    per_page = page_size // UNIT
    for i in range(len(runs)):
        if runs[i, 1] & ONE == ZERO:
            continue
        at = np.int64(runs[i, 0])
        stop = at + np.int64(runs[i, 1] >> ONE)
        hole = hole_end = 0  # bytes that are still to be punched, in one go
        while at < stop:
            page = at // per_page
            word = present[page >> 6] >> np.uint64(page & 63)
            if word == ZERO:
                at = ((page | 63) + 1) * per_page
                continue
            page += native.trailing_zeros(word)
            at = max(at, page * per_page)
            if at >= stop:
                break
            start = at * UNIT
            at += 1
            if is_zero(seen, start, start + UNIT):
                continue
            if fd < 0:
                memory[start : start + UNIT] = 0
                continue
            present[page >> 6] &= ~(ONE << np.uint64(page & 63))
            if start != hole_end:
                if hole_end > hole and native.fallocate(
                    fd, native.PUNCH_HOLE, hole, hole_end - hole
                ):
                    return native.errno()
                hole = start
            hole_end = start + UNIT
        if hole_end > hole and native.fallocate(fd, native.PUNCH_HOLE, hole, hole_end - hole):
            return native.errno()
    return 0


def warm_up() -> None:
    """Compile every kernel, or load it from disk, for all types of argument that occur."""
    words = np.zeros(1, np.uint64)
    runs = np.zeros((0, 2), np.uint64)
    memory = np.zeros(UNIT, np.uint8)
    mapped = memory.copy()
    mapped.flags.writeable = False  # a PROT_READ mapping is another type to numba
    check(runs, 1)
    mark(runs, words)
    send(-1, memory, memory.ctypes.data, 1, runs, np.zeros((1, 2), np.uint64))
    for a in (memory, mapped):
        plan(a, words, words, 0, 1, runs)
        gather(a, runs, memory)
        clear(runs, a, memory, -1, UNIT, words)
    put(memory, runs, memory, -1, UNIT, words)
