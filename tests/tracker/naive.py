"""The kernels once more, so slowly and plainly that they can be believed: sets and bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def words_of(pages: Iterable[int], npages: int) -> NDArray[np.uint64]:
    numbers = [0] * ((npages + 63) // 64)
    for page in pages:
        assert 0 <= page < npages
        numbers[page // 64] |= 1 << (page % 64)
    return np.array(numbers, dtype=np.uint64)


def pages_of(words: NDArray[np.uint64]) -> set[int]:
    return {
        64 * i + bit for i, word in enumerate(words) for bit in range(64) if int(word) >> bit & 1
    }


def runs(pages: set[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for page in sorted(pages):
        if found and sum(found[-1]) == page:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((page, 1))
    return found


def touched(start: int, end: int, page_size: int) -> set[int]:
    """Pages with at least one byte in ``[start, end)``."""
    return {page for page in range(end // page_size + 1) if _overlap(page, start, end, page_size)}


def _overlap(page: int, start: int, end: int, page_size: int) -> bool:
    return max(start, page * page_size) < min(end, (page + 1) * page_size)


def spread(bits: set[int], bit_size: int, page_size: int, offset: int) -> set[int]:
    """Pages that the bits touch; bit 0 begins ``offset`` bytes into page 0."""
    found: set[int] = set()
    for bit in bits:
        start = offset + bit * bit_size
        found |= touched(start, start + bit_size, page_size)
    return found


def zeros(memory: bytes, page_size: int) -> set[int]:
    pages = range(len(memory) // page_size)
    return {p for p in pages if not any(memory[p * page_size : (p + 1) * page_size])}


def differing(a: bytes, b: bytes, page_size: int) -> set[int]:
    pages = range(len(a) // page_size)
    return {
        p
        for p in pages
        if a[p * page_size : (p + 1) * page_size] != b[p * page_size : (p + 1) * page_size]
    }


def data(fd: int, npages: int, page_size: int) -> set[int]:
    """Pages of a file that hold data, asked for one at a time."""
    found = set()
    for page in range(npages):
        try:
            at = os.lseek(fd, page * page_size, os.SEEK_DATA)
        except OSError:
            break
        if at < (page + 1) * page_size:
            found.add(page)
    return found
