"""The process that answers write faults: started by :mod:`tracker.answered.uffdsync`, for one
tracking.

A writer that meets a protected page stands still until somebody answers. It is a process of its own
so that no interpreter lock and no other work of the tracker stand in the way, and it alone holds
the userfaultfd: when it ends, however it ends, the kernel lifts all protection and wakes every
writer, also those that it lets wait. It ends when whoever asked says so, or is gone.

It is given the userfaultfd, whose memory is registered; a memfd for the bits that are taken; the
ranges of :mod:`tracker.answered.faults`, in JSON; and a SOCK_SEQPACKET socket as standard input. It
answers each ``take`` there with ``taken``, after it has protected what was written, the first time
everything; or with the errno at which it ended. Bits that the memfd has by then are of chunks to be
taken too. It answers ``pace PERCENT NS`` with ``paced``: from then on each writer is made to wait
for so much of its time, at most so long at once; with zeros none is, and nobody waits any more.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import socket

import numpy as np
from numpy.typing import NDArray

from tracker.answered.faults import release, serve, take
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.words import or_into

_MESSAGES = 1024
_WRITERS = 64  # threads that are known at the same time
_DONE = {b"take": b"taken", b"pace": b"paced"}


def words_of(ranges: NDArray[np.int64]) -> int:
    """How many words the chunks of all ranges take up."""
    _, length, size, first = ranges[-1].tolist()
    return int(first + (-(-length // size) + 63) // 64)


def main(uffd: int, taken_fd: int, ranges_text: str) -> None:
    """Answer faults, and what is asked on standard input, until that ends."""
    control = socket.socket(fileno=0)
    ranges = np.array(json.loads(ranges_text), np.int64)
    messages = np.zeros((_MESSAGES, 4), np.uint64)
    opened = np.zeros(words_of(ranges), np.uint64)
    for _, length, size, first in ranges.tolist():  # as written, what was never protected
        chunks = DirtyBitmap.full(-(-length // size))
        opened[first : first + len(chunks.words)] = chunks.words
    taken = np.frombuffer(mmap.mmap(taken_fd, opened.nbytes), np.uint64)
    writers, pace = np.zeros((_WRITERS, 5), np.int64), np.zeros(2, np.int64)
    error = 0
    with contextlib.suppress(ConnectionError):
        while not error:
            error = serve(uffd, control.fileno(), messages, ranges, opened, writers, pace)
            if not error:
                asked, *how = control.recv(64).split()[:3] or [b""]
                if not asked:
                    return
                if asked == b"pace":
                    pace[:] = [int(number) for number in how]
                    error = release(uffd, ranges, opened, writers, pace)
                else:
                    or_into(opened, taken)
                    error = take(uffd, messages, ranges, opened, taken, writers, pace)
            control.send(f"{error}".encode() if error else _DONE[asked])
