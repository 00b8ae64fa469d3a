"""Digests of pages: which pages differ, found without moving them.

A digest is XXH64 (see :mod:`tracker.memory.xxh64` for the specification) with a random 64-bit seed,
over the bytes of one page; a hole's is that of a page of zeros, and the hole is not read, which
would fill it.

*The odds.* A page whose content nobody made for the purpose keeps its digest when it changes with a
chance of 2**-64: a migration would have to see 2**32 changed pages for the odds of missing one to
reach 2**-32. XXH64 is no cryptographic hash: who knows the seed can make pages that differ and have
one digest. Who does not can still make two pages that have one digest for half of all seeds (two
words of one accumulator, whose differences cancel if a single bit happens to be right). So the seed
only keeps accidents from repeating themselves. Where a guest, or whoever chooses what it reads, may
not be able to make its own page go stale, bytes have to be compared.

*Of what bytes.* A digest that stands for what the destination has is made of the bytes that were
sent, or of the destination's copy, never of a second look at the guest's page. Otherwise a page may
change and change back: A is digested, B is sent, the page is A again and seems unchanged, and the
destination keeps B.

Arguments are those of :mod:`tracker.bits.words`; besides, ``page_size`` is a multiple of 32, and
``digests`` are ``uint64`` in native byte order, C order. No function holds the GIL while it works,
so that threads may share one block, each with its own slice.

:raise BitmapError: whatever function it is: lengths that do not fit, bits past the last page, a
    slice outside the block, a seed that is no unsigned 64-bit number
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from tracker.bits import native
from tracker.bits.words import ONE, ZERO, Memory, Words, fits, kernel, popcount
from tracker.errors import BitmapError
from tracker.memory.pages import pages_in
from tracker.memory.xxh64 import digest, four_digests

Digests = NDArray[np.uint64]


def new_seed() -> int:
    """Draw a random seed, 0 to 2**64 - 1."""
    return secrets.randbits(64)


def page_digests(
    memory: Memory,
    page_size: int,
    data: Words,
    seed: int,
    digests: Digests,
    first_page: int,
    last_page: int,
) -> None:
    """Set ``digests[page]`` for ``first_page <= page < last_page``.

    :param data: pages that hold data; the others are holes
    :param digests: of the whole block, shape ``(npages,)``
    """
    with _key(seed) as key:
        _hash_range(memory, page_size, data, key, digests, first_page, last_page)


def selected_digests(
    memory: Memory,
    page_size: int,
    selected: Words,
    data: Words,
    seed: int,
    digests: Digests,
    first_word: int,
    last_word: int,
) -> int:
    """Write the digests of the ``selected`` pages of the slice, in page order, without gaps.

    :param data: pages that hold data; the others are holes
    :param digests: from index 0 on; room for as many as the slice selects, or more
    :return: how many
    """
    with _key(seed) as key:
        return int(
            _hash_selected(memory, page_size, selected, data, key, digests, first_word, last_word)
        )


def chunk_digests(digests: Digests, pages_per_chunk: int, seed: int, out: Digests) -> None:
    """Set ``out[i]`` to the XXH64 of the digests of chunk i, as little-endian bytes.

    :param pages_per_chunk: 1 or more; the last chunk may be shorter
    :param out: shape ``((len(digests) + pages_per_chunk - 1) // pages_per_chunk,)``
    """
    with _key(seed) as key:
        _hash_chunks(digests, pages_per_chunk, key, out)


@kernel
def differing(a: Digests, b: Digests, words: Words) -> int:
    """Set the pages whose digests differ; other bits of ``words`` stay as they are.

    :return: how many differ
    """
    if len(a) != len(b):
        raise BitmapError("digests of different numbers of pages")
    fits(words, len(a))
    count = 0
    for page in range(len(a)):
        if a[page] != b[page]:
            words[page >> 6] |= ONE << np.uint64(page & 63)
            count += 1
    return count


def warm_up() -> None:
    """Compile everything here, or load it from disk, for memory that may be written and may not."""
    words, digests = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
    memory = np.zeros(4096, np.uint8)
    mapped = memory.copy()
    mapped.flags.writeable = False  # a PROT_READ mapping is another type to numba
    for pages in (memory, mapped):
        page_digests(pages, 4096, words, 0, digests, 0, 1)
        selected_digests(pages, 4096, words, words, 0, digests, 0, 1)
    chunk_digests(digests, 1, 0, digests.copy())
    differing(digests, digests, words)


@contextmanager
def _key(seed: int) -> Iterator[np.uint64]:
    """The seed, always as one type to numba; and sums that wrap around, also in plain Python."""
    if not 0 <= seed < 1 << 64:
        raise BitmapError(f"a seed of {seed}, which is no unsigned 64-bit number")
    with np.errstate(over="ignore"):
        yield np.uint64(seed)


@kernel
def _words_in(memory: Memory, page_size: int) -> int:
    """Check what XXH64 asks of pages; return the number of 64-bit words of one."""
    pages_in(memory, page_size)
    if page_size & 31:
        raise BitmapError("a page size that is no multiple of 32")
    return page_size >> 3


@kernel
def _hash_rest(
    words: Words,
    starts: NDArray[np.int64],
    nwords: int,
    key: np.uint64,
    slots: NDArray[np.int64],
    n: int,
    digests: Digests,
) -> None:
    """Digest what is left in a queue that did not get full."""
    for i in range(n):
        digests[slots[i]] = digest(words, starts[i], starts[i] + nwords, key)


@kernel
def _hash_range(
    memory: Memory,
    page_size: int,
    data: Words,
    key: np.uint64,
    digests: Digests,
    first_page: int,
    last_page: int,
) -> None:
    nwords = _words_in(memory, page_size)
    npages = pages_in(memory, page_size)
    fits(data, npages)
    if len(digests) != npages:
        raise BitmapError("digests of another number of pages")
    if first_page < 0 or last_page > npages:
        raise BitmapError("a slice outside the memory")
    words = memory.view(np.uint64)
    hole = digest(np.zeros(nwords, np.uint64), 0, nwords, key)
    starts, slots, queued = np.empty(4, np.int64), np.empty(4, np.int64), 0
    for page in range(first_page, last_page):
        if data[page >> 6] >> np.uint64(page & 63) & ONE == ZERO:
            digests[page] = hole
            continue
        starts[queued], slots[queued] = page * nwords, page
        queued += 1
        if queued == 4:
            four_digests(words, starts, nwords, key, slots, digests)
            queued = 0
    _hash_rest(words, starts, nwords, key, slots, queued, digests)


@kernel
def _hash_selected(
    memory: Memory,
    page_size: int,
    selected: Words,
    data: Words,
    key: np.uint64,
    digests: Digests,
    first_word: int,
    last_word: int,
) -> int:
    nwords = _words_in(memory, page_size)
    npages = pages_in(memory, page_size)
    fits(selected, npages)
    fits(data, npages)
    if first_word < 0 or last_word > len(selected):
        raise BitmapError("a slice outside the bitmap")
    if popcount(selected[first_word:last_word]) > len(digests):
        raise BitmapError("no room for as many digests as pages are selected")
    words = memory.view(np.uint64)
    hole = digest(np.zeros(nwords, np.uint64), 0, nwords, key)
    starts, slots, queued = np.empty(4, np.int64), np.empty(4, np.int64), 0
    count = 0
    for i in range(first_word, last_word):
        todo = selected[i]
        while todo != ZERO:
            bit = native.trailing_zeros(todo)
            page = ONE << np.uint64(bit)
            todo ^= page
            if data[i] & page == ZERO:
                digests[count] = hole
            else:
                starts[queued], slots[queued] = (64 * i + bit) * nwords, count
                queued += 1
                if queued == 4:
                    four_digests(words, starts, nwords, key, slots, digests)
                    queued = 0
            count += 1
    _hash_rest(words, starts, nwords, key, slots, queued, digests)
    return count


@kernel
def _hash_chunks(digests: Digests, pages_per_chunk: int, key: np.uint64, out: Digests) -> None:
    if pages_per_chunk < 1:
        raise BitmapError("chunks without pages")
    if len(out) != (len(digests) + pages_per_chunk - 1) // pages_per_chunk:
        raise BitmapError("not as many digests of chunks as chunks")
    for i in range(len(out)):
        start = i * pages_per_chunk
        out[i] = digest(digests, start, min(start + pages_per_chunk, len(digests)), key)
