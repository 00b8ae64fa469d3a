"""From pages of one size to pages of another: bits of one bitmap, set in a second.

An IOMMU, a device or a fault's chunk has pages of its own size, which is a bitmap of its own.

Arguments are those of :mod:`tracker.bits.words`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tracker.bits import native
from tracker.bits.words import ALL, ONE, ZERO, Words, fill, kernel
from tracker.errors import BitmapError


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
    bit_shift = native.trailing_zeros(np.uint64(bit_size))
    page_shift = native.trailing_zeros(np.uint64(page_size))
    if bit_size < page_size:
        to_larger(bits, first, nbits, bit_shift, words, page_shift, offset)
    elif bit_size == page_size and offset & (page_size - 1) == 0:
        shift_into(bits, first, nbits, words, offset >> page_shift)
    elif page_size < bit_size < 64 * page_size and offset & (64 * page_size - 1) == 0:
        widen(bits, first, nbits, bit_size // page_size, words, offset // (64 * page_size))
    else:
        to_smaller(bits, first, nbits, bit_shift, words, page_shift, offset)


@kernel
def to_larger(
    bits: Words, first: int, nbits: int, bit_shift: int, words: Words, page_shift: int, offset: int
) -> None:
    """Set the one page or two that a bit touches, and go on with what lies past them."""
    at, end = first, first + nbits
    while at < end:
        todo = bits[at >> 6] >> np.uint64(at & 63)
        if todo == ZERO:
            at = (at | 63) + 1
            continue
        at += native.trailing_zeros(todo)
        if at >= end:
            break
        start = offset + ((at - first) << bit_shift)
        page, last = start >> page_shift, (start + (1 << bit_shift) - 1) >> page_shift
        words[page >> 6] |= ONE << np.uint64(page & 63)
        words[last >> 6] |= ONE << np.uint64(last & 63)
        at = first + ((((last + 1) << page_shift) - offset) >> bit_shift)


@kernel
def shift_into(bits: Words, first: int, nbits: int, words: Words, page: int) -> None:
    """Pages of one size: bit ``first`` is ``page``, and so on."""
    for i in range(0, nbits, 64):
        todo = bits_from(bits, first + i, nbits - i)
        into, by = (page + i) >> 6, np.uint64((page + i) & 63)
        words[into] |= todo << by
        if by != ZERO and todo >> (np.uint64(64) - by) != ZERO:
            words[into + 1] |= todo >> (np.uint64(64) - by)


@kernel
def widen(bits: Words, first: int, nbits: int, times: int, words: Words, into: int) -> None:
    """Set ``times`` pages a bit, from ``words[into]`` on: a word at a time becomes so many words.

    :param times: 2, 4, 8, 16 or 32
    """
    width = 64 // times  # bits that make a word
    piece = min(width, 8)
    table = np.zeros(1 << piece, np.uint64)
    for value in range(len(table)):
        for bit in range(piece):
            if value >> bit & 1:
                table[value] |= (ALL >> np.uint64(64 - times)) << np.uint64(bit * times)
    mask, step = np.uint64(len(table) - 1), np.uint64(piece)
    for i in range(0, nbits, 64):
        todo = bits_from(bits, first + i, nbits - i)
        if todo != ZERO:
            for j in range(into, min(into + times, len(words))):
                for bit in range(0, width, piece):
                    words[j] |= table[todo & mask] << np.uint64(bit * times)
                    todo >>= step
        into += times


@kernel
def to_smaller(
    bits: Words, first: int, nbits: int, bit_shift: int, words: Words, page_shift: int, offset: int
) -> None:
    """Set all pages that a run of bits touches, run by run."""
    rounded_up = (1 << page_shift) - 1
    for i in range(0, nbits, 64):
        todo = bits_from(bits, first + i, nbits - i)
        while todo != ZERO:
            bit = native.trailing_zeros(todo)
            length = native.trailing_zeros(~(todo >> np.uint64(bit)))
            start = offset + ((i + bit) << bit_shift)
            stop = start + (length << bit_shift)
            fill(words, start >> page_shift, (stop + rounded_up) >> page_shift)
            if bit + length == 64:
                break
            todo &= ALL << np.uint64(bit + length)


@kernel
def bits_from(words: Words, first: int, nbits: int) -> Any:
    """``nbits`` bits, or the first 64 of them, from bit ``first`` on."""
    i, shift = first >> 6, np.uint64(first & 63)
    found = words[i] >> shift
    if shift != ZERO and i + 1 < len(words):
        found |= words[i + 1] << (np.uint64(64) - shift)
    return found if nbits >= 64 else found & (ALL >> np.uint64(64 - nbits))


def warm_up() -> None:
    """Compile every kernel, or load it from disk."""
    words = np.zeros(1, np.uint64)
    spread(words, 0, 1, 4096, words, 4096, 0)
