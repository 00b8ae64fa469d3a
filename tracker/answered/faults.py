"""The compiled loops of :mod:`tracker.answered.faultserver`: from fault messages to bits, and back.

Memory is tracked in *chunks* of one size a block, and a chunk is either protected or *open*: it was
written, and everything in it may be written until it is taken. Arguments that all of them share:

- *ranges*: ``int64``, shape (nblocks, 4), a row a block: address in the process and length in
  bytes, bytes a chunk, and the word in which its chunks begin
- *opened*: ``uint64``, one bit a chunk, as in :class:`tracker.bits.bitmap.DirtyBitmap`: the open
  ones
- *messages*: ``uint64``, shape (n, 4): room for n ``struct uffd_msg`` (include/uapi/linux/
  userfaultfd.h) of 32 bytes, event in the first byte, address of the fault in the third word,
  number of the thread in the lower half of the fourth
- *writers*: those that are made to wait, as in :mod:`tracker.answered.pacing`
- *pace*: ``int64``, shape (2,): how much of its time a writer is made to wait, in percent, and the
  longest wait, in ns

One thread calls them, and nobody else protects or unprotects: so a chunk's bit and its protection
change together, and no lock is needed.
"""

from __future__ import annotations

import errno

import numpy as np
from numpy.typing import NDArray

from tracker.abi import userfaultfd
from tracker.answered.pacing import ADDRESS, NEVER, Writers, left_ns, let_go, must_wait, next_ns
from tracker.bits import native
from tracker.bits.words import ALL, ONE, ZERO, Words, kernel

Ranges = NDArray[np.int64]
Messages = NDArray[np.uint64]
Pace = NDArray[np.int64]

_WRITEPROTECT = userfaultfd.UFFDIO_WRITEPROTECT
_PROTECT = np.uint64(userfaultfd.UFFDIO_WRITEPROTECT_MODE_WP)
_PAGEFAULT = np.uint64(userfaultfd.UFFD_EVENT_PAGEFAULT)
_EVENT = np.uint64(0xFF)
_THREAD = np.uint64(0xFFFF_FFFF)
_POLLIN = 1  # include/uapi/asm-generic/poll.h
_CLOCK_MONOTONIC = 1  # include/uapi/linux/time.h
_SECOND_NS = 1_000_000_000


@kernel
def set_protection(uffd: int, start: int, nbytes: int, mode: np.uint64) -> int:
    """UFFDIO_WRITEPROTECT: ``mode`` 1 protects, 0 lifts the protection and wakes who waits for it.

    :return: 0, or the errno: ENOENT where the memory is not registered, ESRCH if the process ended
    """
    argument = np.empty(3, np.uint64)  # struct uffdio_writeprotect
    argument[0], argument[1], argument[2] = np.uint64(start), np.uint64(nbytes), mode
    if native.ioctl(uffd, _WRITEPROTECT, argument.ctypes) != 0:
        return native.errno()
    return 0


@kernel
def now_ns() -> int:
    """The monotonic clock."""
    time = np.empty(2, np.int64)  # struct timespec
    native.clock_gettime(_CLOCK_MONOTONIC, time.ctypes)
    return int(time[0] * _SECOND_NS + time[1])


@kernel
def open_chunk(uffd: int, ranges: Ranges, opened: Words, address: int) -> int:
    """Let everybody write the chunk that an address is in.

    :return: 0 or an errno: EPROTO if it is in no range
    """
    known = False
    for b in range(len(ranges)):
        start, length, size = ranges[b, 0], ranges[b, 1], ranges[b, 2]
        if not start <= address < start + length:
            continue
        known = True
        chunk = (address - start) // size
        offset = chunk * size
        opened[ranges[b, 3] + (chunk >> 6)] |= ONE << np.uint64(chunk & 63)
        error = set_protection(uffd, start + offset, min(size, length - offset), ZERO)
        if error != 0:
            return error
    return 0 if known else errno.EPROTO


@kernel
def answer(
    uffd: int, messages: Messages, ranges: Ranges, opened: Words, writers: Writers, pace: Pace
) -> int:
    """Open the chunk of each fault that waits, or note that its writer is to wait for longer.

    :return: 0, also if none waits, or an errno: EPROTO for what is no fault in a range
    """
    nbytes = native.read(uffd, messages.ctypes, messages.size * 8)
    if nbytes < 0:
        error = native.errno()
        return 0 if error == errno.EAGAIN or error == errno.EINTR else error
    now = now_ns() if pace[0] != 0 else 0
    for i in range(nbytes // 32):
        if messages[i, 0] & _EVENT != _PAGEFAULT:
            return errno.EPROTO
        address = np.int64(messages[i, 2])
        if pace[0] != 0:
            thread = np.int64(messages[i, 3] & _THREAD)
            if must_wait(writers, thread, address, now, pace[0], pace[1]):
                continue
        error = open_chunk(uffd, ranges, opened, address)
        if error != 0:
            return error
    return 0


@kernel
def release(uffd: int, ranges: Ranges, opened: Words, writers: Writers, pace: Pace) -> int:
    """Open the chunk of each writer that has waited for long enough.

    :return: 0, or the errno at which it ended
    """
    if next_ns(writers, 0, 0) == NEVER:
        return 0
    now = now_ns()
    for row in range(len(writers)):
        if writers[row, ADDRESS] != 0 and left_ns(writers, row, now, pace[1]) <= 0:
            error = open_chunk(uffd, ranges, opened, writers[row, ADDRESS])
            if error != 0:
                return error
            let_go(writers, row, now, pace[1])
    return 0


@kernel
def serve(
    uffd: int,
    control: int,
    messages: Messages,
    ranges: Ranges,
    opened: Words,
    writers: Writers,
    pace: Pace,
) -> int:
    """Answer faults until there is something to read from ``control``, or it was closed.

    :param control: a descriptor that poll(2) can wait for
    :return: 0, or the errno at which it ended
    """
    polled = np.zeros((2, 2), np.int32)  # struct pollfd: descriptor; events, and revents above them
    polled[0, 0], polled[1, 0] = uffd, control
    timeout = np.zeros(2, np.int64)  # struct timespec
    no_signals = np.zeros(16, np.uint64)  # sigset_t
    while True:
        polled[0, 1] = polled[1, 1] = _POLLIN
        left = next_ns(writers, now_ns(), pace[1])
        timeout[0], timeout[1] = 3600, 0  # for ever, but for a look now and then
        if left != NEVER:
            timeout[0], timeout[1] = left // _SECOND_NS, left % _SECOND_NS
        if native.ppoll(polled.ctypes, 2, timeout.ctypes, no_signals.ctypes) < 0:
            error = native.errno()
            if error == errno.EINTR:
                continue
            return error
        if polled[0, 1] >> 16 != 0:
            error = answer(uffd, messages, ranges, opened, writers, pace)
            if error != 0:
                return error
        error = release(uffd, ranges, opened, writers, pace)
        if error != 0:
            return error
        if polled[1, 1] >> 16 != 0:
            return 0


@kernel
def take(
    uffd: int,
    messages: Messages,
    ranges: Ranges,
    opened: Words,
    taken: Words,
    writers: Writers,
    pace: Pace,
) -> int:
    """Protect every open chunk again, and move its bit to ``taken``.

    Faults are answered in between, 64 chunks apart, so that no writer waits for all of it. Their
    chunks are in this ``taken`` or stay open for the next.

    :param taken: overwritten
    :return: 0, or the errno at which it ended: then nothing is known of any chunk
    """
    for b in range(len(ranges)):
        start, length, size, first = ranges[b, 0], ranges[b, 1], ranges[b, 2], ranges[b, 3]
        nchunks = (length + size - 1) // size
        for i in range((nchunks + 63) // 64):
            todo = opened[first + i]
            taken[first + i] = todo
            if todo == ZERO:
                continue
            opened[first + i] = ZERO
            while todo != ZERO:  # run by run
                bit = native.trailing_zeros(todo)
                stop = bit + native.trailing_zeros(~(todo >> np.uint64(bit)))
                offset = (64 * i + bit) * size
                end = min((64 * i + stop) * size, length)
                error = set_protection(uffd, start + offset, end - offset, _PROTECT)
                if error != 0:
                    return error
                todo = todo & ALL << np.uint64(stop) if stop < 64 else ZERO
            error = answer(uffd, messages, ranges, opened, writers, pace)
            if error == 0:
                error = release(uffd, ranges, opened, writers, pace)
            if error != 0:
                return error
    return 0
