"""How long each writer waits: arithmetic of :mod:`tracker.answered.faults`, without a fault.

A writer that has run for some time *owes* a part of it, and pays by waiting at its next faults. So
who writes seldom waits seldom, who only reads never does, and no writer waits for more than its
share of the time. What is owed is kept small, so that a single wait is short, and a very short one
is put off until more is owed: to sleep costs more than that.

Arguments that all of them share:

- *writers*: ``int64``, shape (n, 5), a row a thread: its number, 0 if the row is free; when it was
  let go last, or began to wait, in ns; what it owes, in ns; the address that it waits for, 0 if it
  does not wait; and for how long, in ns
- *longest_ns*: of one wait
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tracker.bits.words import kernel

Writers = NDArray[np.int64]

THREAD, SINCE, OWED, ADDRESS, WAIT = 0, 1, 2, 3, 4
LEAST_NS = 100_000
NEVER = -1


@kernel
def find(writers: Writers, thread: int) -> int:
    """Row of a thread; that of another one that has not written for longest, if it has none.

    :return: -1 if all other writers wait
    """
    oldest = -1
    for row in range(len(writers)):
        if writers[row, THREAD] == thread:
            return row
        if writers[row, ADDRESS] == 0 and (
            oldest < 0 or writers[row, SINCE] < writers[oldest, SINCE]
        ):
            oldest = row
    return oldest


@kernel
def must_wait(
    writers: Writers, thread: int, address: int, now_ns: int, percent: int, longest_ns: int
) -> bool:
    """Note a fault; tell whether its writer is to wait.

    :param percent: of a writer's time, how much it is to wait: 0 to 99
    """
    row = find(writers, thread)
    if row < 0:
        return False
    if writers[row, THREAD] != thread:  # nothing is known of it: it owes nothing
        writers[row, THREAD], writers[row, SINCE], writers[row, OWED] = thread, now_ns, 0
    if writers[row, ADDRESS] != 0:  # a signal woke it, and it has come again
        writers[row, ADDRESS] = address
        return True
    ran_ns = now_ns - writers[row, SINCE]
    owed_ns = min(writers[row, OWED] + ran_ns * percent // (100 - percent), longest_ns)
    writers[row, SINCE], writers[row, OWED] = now_ns, owed_ns
    if owed_ns < LEAST_NS:
        return False
    writers[row, ADDRESS], writers[row, WAIT] = address, owed_ns
    return True


@kernel
def left_ns(writers: Writers, row: int, now_ns: int, longest_ns: int) -> int:
    """How long a writer still has to wait; not more than 0 if it has for long enough."""
    return int(writers[row, SINCE] + min(writers[row, WAIT], longest_ns) - now_ns)


@kernel
def next_ns(writers: Writers, now_ns: int, longest_ns: int) -> int:
    """In how long the first of those that wait may go; ``NEVER`` if none waits."""
    least = NEVER
    for row in range(len(writers)):
        if writers[row, ADDRESS] != 0:
            left = max(left_ns(writers, row, now_ns, longest_ns), 0)
            if least == NEVER or left < least:
                least = left
    return least


@kernel
def let_go(writers: Writers, row: int, now_ns: int, longest_ns: int) -> None:
    """Note that a writer waits no more: what it waited in excess, it has paid in advance."""
    waited_ns = now_ns - writers[row, SINCE]
    writers[row, OWED] = max(writers[row, OWED] - waited_ns, -longest_ns)
    writers[row, SINCE], writers[row, ADDRESS] = now_ns, 0
