"""The kernels once more, so slowly and plainly that they can be believed: sets and bytes."""

from __future__ import annotations

import itertools
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


def xxh64(content: bytes, seed: int) -> int:
    """XXH64 as the specification of xxHash tells it, step by step."""
    one, two, three = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
    four, five = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
    rest = content

    def rotate(number: int, by: int) -> int:
        number %= 1 << 64
        return (number << by | number >> (64 - by)) % (1 << 64)

    def round_(accumulator: int, lane: int) -> int:
        return rotate(accumulator + lane * two, 31) * one % (1 << 64)

    def take(nbytes: int) -> int:
        nonlocal rest
        taken, rest = rest[:nbytes], rest[nbytes:]
        return int.from_bytes(taken, "little")

    if len(content) < 32:
        digest = seed + five
    else:
        lanes = [seed + one + two, seed + two, seed, seed - one]
        while len(rest) >= 32:
            lanes = [round_(lane, take(8)) for lane in lanes]
        digest = sum(rotate(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18), strict=True))
        for lane in lanes:
            digest = (digest ^ round_(0, lane)) * one + four
            digest %= 1 << 64
    digest += len(content)
    while len(rest) >= 8:
        digest = rotate(digest % (1 << 64) ^ round_(0, take(8)), 27) * one + four
    if len(rest) >= 4:
        digest = rotate(digest % (1 << 64) ^ take(4) * one % (1 << 64), 23) * two + three
    while rest:
        digest = rotate(digest % (1 << 64) ^ take(1) * five % (1 << 64), 11) * one
    digest %= 1 << 64
    digest = (digest ^ digest >> 33) * two % (1 << 64)
    digest = (digest ^ digest >> 29) * three % (1 << 64)
    return digest ^ digest >> 32


def page_digests(memory: bytes, page_size: int, data: set[int], seed: int) -> list[int]:
    """XXH64 of each page; one that is not ``data`` counts as zeros, whatever is there."""
    pages = range(len(memory) // page_size)
    contents = [memory[p * page_size : (p + 1) * page_size] for p in pages]
    hole = xxh64(bytes(page_size), seed)
    return [xxh64(contents[p], seed) if p in data else hole for p in pages]


Run = tuple[int, int, bool]
"""Start and length in units, and whether it is one of zeros."""


def plan(
    memory: bytes,
    dirty: set[int],
    data: set[int],
    first: int,
    last: int,
    *,
    most_runs: int,
    most_units: int,
) -> tuple[list[Run], int]:
    """Runs of the dirty units from ``first`` on, and where to go on."""
    found: list[Run] = []
    content = 0
    for unit in sorted(dirty & set(range(first, last))):
        zeros = unit not in data or not any(memory[unit * 4096 : (unit + 1) * 4096])
        joins = found and found[-1][0] + found[-1][1] == unit and found[-1][2] == zeros
        if (not zeros and content == most_units) or (not joins and len(found) == most_runs):
            return found, unit
        if joins:
            start, length, _ = found.pop()
            found.append((start, length + 1, zeros))
        else:
            found.append((unit, 1, zeros))
        content += not zeros
    return found, last


def units_of(runs: Iterable[Run]) -> list[int]:
    return [unit for start, length, _ in runs for unit in range(start, start + length)]


def aged(history: list[int], written: set[int]) -> list[int]:
    return [h // 2 + 128 * (page in written) for page, h in enumerate(history)]


def tally(pages: set[int], history: list[int]) -> list[int]:
    return [sum(history[page] == h for page in pages) for h in range(256)]


def choose(pages: set[int], history: list[int], least: int, limit: int) -> set[int]:
    at_least = sorted(page for page in pages if history[page] == least)
    return {page for page in pages if history[page] > least} | set(at_least[:limit])


def spans(wanted: set[int], barred: set[int]) -> list[tuple[int, int]]:
    """First page and the page after the last of each range."""
    found: list[tuple[int, int]] = []
    for page in sorted(wanted):
        if found and not barred & set(range(found[-1][0], page)):
            found[-1] = (found[-1][0], page + 1)
        else:
            found.append((page, page + 1))
    return found


def ages(bitmaps: list[set[int]], page: int) -> int:
    """How many bitmaps came after the last one that the page was in."""
    for ago, bitmap in enumerate(reversed(bitmaps)):
        if page in bitmap:
            return ago
    return 0xFFFF


def heat(bitmaps: list[set[int]], page: int, gain: int) -> float:
    """The weighed share of the bitmaps that the page was in, exactly: 0 to 1."""
    found = 0.0
    for bitmap in bitmaps:
        found += (gain / 0x10000) * ((page in bitmap) - found)
    return found


def averages(values: list[int], cells: int) -> list[float]:
    """Mean of each of so many ranges of pages."""
    edges = [cell * len(values) // cells for cell in range(cells + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def by_region(pages: set[int], npages: int, regions: int) -> list[int]:
    """How many of the pages are in each of so many ranges."""
    edges = [region * npages // regions for region in range(regions + 1)]
    return [len(pages & set(range(a, b))) for a, b in itertools.pairwise(edges)]
