"""Any number of bitmaps united in one pass, and whose each page is counted.

Arguments are those of :mod:`tracker.bits.words`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tracker.bits import native
from tracker.bits.words import ZERO, Words, kernel, popcount, same_length
from tracker.errors import BitmapError

BLOCK = 1024
"""Words of each bitmap that are united at a time: two blocks stay in a core's first cache."""


@kernel
def unite(sources: Words, nexact: int, exact: Words, rest: Words, counts: NDArray[np.int64]) -> int:
    """Unite bitmaps that lie anywhere in memory, in one pass through it.

    Nobody can check that they do lie there: they are the caller's, who keeps them.

    :param sources: of each the address of its words, of which there are as many as of ``exact``
    :param nexact: how many of them, from the first on, are exact
    :param exact: set to the union of these
    :param rest: set to what only the others hold; left as it is if there are no others
    :param counts: shape ``(len(sources), 2)``: added to it is how many bits each has, and how many
        of these no other has
    :return: how many bits are set in all of them together
    """
    same_length(exact, rest)
    if nexact < 0 or nexact > len(sources) or counts.shape != (len(sources), 2):
        raise BitmapError("not as many bitmaps as announced")
    if len(sources) == 2 and nexact == 2:
        return unite_two(
            native.words_at(sources[0], len(exact)),
            native.words_at(sources[1], len(exact)),
            exact,
            counts,
        )
    total = 0
    unions, repeats = np.empty(BLOCK, np.uint64), np.empty(BLOCK, np.uint64)
    for at in range(0, len(exact), BLOCK):
        nwords = min(BLOCK, len(exact) - at)
        union, repeated = unions[:nwords], repeats[:nwords]
        union[:] = ZERO
        repeated[:] = ZERO
        for i in range(len(sources)):
            if i == nexact:
                exact[at : at + nwords] = union
            words = native.words_at(sources[i] + np.uint64(8 * at), nwords)
            counts[i, 0] += add_repeated(union, repeated, words)
        if nexact == len(sources):
            exact[at : at + nwords] = union
        else:
            rest[at : at + nwords] = union & ~exact[at : at + nwords]
        for i in range(len(sources)):
            words = native.words_at(sources[i] + np.uint64(8 * at), nwords)
            counts[i, 1] += count_minus(words, repeated)
        total += popcount(union)
    return total


@kernel
def unite_two(a: Words, b: Words, union: Words, counts: NDArray[np.int64]) -> int:
    """What :func:`unite` does, of the two that nearly every VM has: its CPUs and its holes."""
    same_length(a, union)
    same_length(b, union)
    in_a = in_b = in_both = 0
    for i in range(len(union)):
        in_a += native.bit_count(a[i])
        in_b += native.bit_count(b[i])
        in_both += native.bit_count(a[i] & b[i])
        union[i] = a[i] | b[i]
    counts[0, 0] += in_a
    counts[0, 1] += in_a - in_both
    counts[1, 0] += in_b
    counts[1, 1] += in_b - in_both
    return in_a + in_b - in_both


@kernel
def add_repeated(union: Words, repeated: Words, src: Words) -> int:
    """``repeated |= union & src``, then ``union |= src``.

    :return: how many bits are set in ``src``
    """
    same_length(union, src)
    same_length(repeated, src)
    count = 0
    for i in range(len(src)):
        count += native.bit_count(src[i])
        repeated[i] |= union[i] & src[i]
        union[i] |= src[i]
    return count


@kernel
def count_minus(a: Words, b: Words) -> int:
    """Count the bits that are set in ``a`` and not in ``b``."""
    same_length(a, b)
    count = 0
    for i in range(len(a)):
        count += native.bit_count(a[i] & ~b[i])
    return count


def warm_up() -> None:
    """Compile every kernel, or load it from disk."""
    words = np.zeros(1, np.uint64)
    unite(words[:0], 0, words, words, np.zeros((0, 2), np.int64))
