"""Which pages are written again and again: a byte of history a page, and what is chosen by it.

The byte is eight looks, the last in its highest bit: halved at each look, plus 128 if the page was
written since the one before. So a larger number is a page that was written more recently and more
often, and 192 or more one that was in each of the last two looks.

Arguments are those of :mod:`tracker.bits.words`; besides, ``history`` is ``uint8``, an entry a
page.

:raise BitmapError: whatever kernel it is: lengths that do not fit, bits past the last page
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tracker.bits import native
from tracker.bits.words import ONE, ZERO, Words, fits, kernel, same_length
from tracker.errors import BitmapError

History = NDArray[np.uint8]
Counts = NDArray[np.int64]

WRITTEN = 128
"""Least history of a page that was written when it was looked at last."""

_BYTE = np.uint64(0xFF)
_HALVES = np.uint64(0x7F7F_7F7F_7F7F_7F7F)
# for each eight pages, the highest bits of the bytes of those that are set
_LATEST = (
    (np.unpackbits(np.arange(256, dtype=np.uint8)[:, np.newaxis], axis=1, bitorder="little") << 7)
    .view("<u8")[:, 0]
    .astype(np.uint64)
)


@kernel
def age(words: Words, history: History) -> None:
    """Add a look: these pages were written since the last one, the others were not."""
    fits(words, len(history))
    nbytes = len(history) >> 3  # of the words: of eight pages each, whose history is one word too
    eights = history[: 8 * nbytes].view(np.uint64)
    for i in range(nbytes):
        written = words[i >> 3] >> np.uint64(8 * (i & 7)) & _BYTE
        eights[i] = (eights[i] >> ONE) & _HALVES | _LATEST[written]
    for page in range(8 * nbytes, len(history)):
        latest = words[page >> 6] >> np.uint64(page & 63) & ONE
        history[page] = np.uint8(history[page] >> 1 | np.int64(latest) << 7)


@kernel
def tally(words: Words, history: History, counts: Counts) -> None:
    """Count the pages by their history: ``counts[h]`` more of history ``h``; shape ``(256,)``."""
    fits(words, len(history))
    if len(counts) != 256:
        raise BitmapError("not as many counts as there are histories")
    for i in range(len(words)):
        todo = words[i]
        while todo != ZERO:
            counts[history[64 * i + native.trailing_zeros(todo)]] += 1
            todo &= todo - ONE


@kernel
def count(history: History, counts: Counts) -> None:
    """Count all pages by their history: ``counts[h]`` more of history ``h``; shape ``(256,)``."""
    if len(counts) != 256:
        raise BitmapError("not as many counts as there are histories")
    never = 0
    for past in history:
        if past == 0:  # most of them
            never += 1
        else:
            counts[past] += 1
    counts[0] += never


@kernel
def choose(words: Words, history: History, least: int, limit: int, chosen: Words) -> int:
    """Set ``chosen`` to the pages whose history is above ``least``, and some of those at it.

    :param limit: so many of those at it, in the order of their addresses
    :return: how many of those at it were chosen
    """
    fits(words, len(history))
    same_length(words, chosen)
    at_least = 0
    for i in range(len(words)):
        todo, found = words[i], ZERO
        while todo != ZERO:
            bit = native.trailing_zeros(todo)
            todo &= todo - ONE
            h = history[64 * i + bit]
            if h < least or (h == least and at_least >= limit):
                continue
            if h == least:
                at_least += 1
            found |= ONE << np.uint64(bit)
        chosen[i] = found
    return at_least


@kernel
def find_spans(
    wanted: Words, barred: Words, starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> int:
    """Ranges of pages that together hold all that are wanted, and none that is barred.

    Each begins and ends with a wanted page, and between two there is a barred one: they are the
    fewest that do.

    :param barred: none of the pages that are wanted
    :param starts: the first page of each, as far as there is room; likewise ``stops``, the page
        after its last
    :return: how many there are
    """
    same_length(wanted, barred)
    n = 0
    opened = False
    for i in range(len(wanted)):
        if wanted[i] & barred[i] != ZERO:
            raise BitmapError("a page that is wanted and barred")
        todo = wanted[i] | barred[i]
        while todo != ZERO:
            bit = native.trailing_zeros(todo)
            todo &= todo - ONE
            if barred[i] >> np.uint64(bit) & ONE != ZERO:
                opened = False
                continue
            page = 64 * i + bit
            if not opened:
                opened = True
                if n < len(starts):
                    starts[n] = page
                n += 1
            if n <= len(stops):
                stops[n - 1] = page + 1
    return n


def warm_up() -> None:
    """Compile every kernel, or load it from disk."""
    words, history = np.zeros(1, np.uint64), np.zeros(1, np.uint8)
    age(words, history)
    tally(words, history, np.zeros(256, np.int64))
    count(history, np.zeros(256, np.int64))
    choose(words, history, 0, 0, words)
    find_spans(words, words, np.zeros(1, np.int64), np.zeros(1, np.int64))
