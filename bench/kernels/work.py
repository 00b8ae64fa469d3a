"""What is timed: a kernel, and what numpy does in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracker.bits import rescale
from tracker.bits import words as kernels
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.merge import merge
from tracker.bits.pageset import PageSet
from tracker.memory import pagehash, pages
from tracker.memory.ram import RamBlock

Words = NDArray[np.uint64]
_GIB = 1 << 30
_PAGE = 4096
_HUGE = 2 << 20
_CHUNK = 64 << 10


@dataclass(frozen=True)
class Case:
    """One thing to be timed.

    :ivar kernel: ``or`` of two bitmaps, one into the other, and counting; ``merge``, the same of
        any number into a new one, and counting each; ``count``; ``runs``; ``larger``, from pages of
        4 KiB to 2 MiB; ``smaller``, from 64 KiB to 4 KiB; ``zero``, the test for zeros; ``digest``
    :ivar guest_gib: guest RAM that the bitmaps are of; or the memory itself (``zero``, ``digest``)
    :ivar density: of the bits, or of the pages that are not zeros
    :ivar sources: bitmaps that are merged
    """

    kernel: str
    guest_gib: float
    density: float
    sources: int = 1

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Work:
    """What a case does, what numpy does instead, and how many bytes that has to read and write.

    Each byte counts once, however often it is looked at.
    """

    ours: Callable[[], object]
    theirs: Callable[[], object]
    read: int
    written: int = 0


def work(case: Case) -> Work:
    """Prepare a case."""
    if case.kernel in ("zero", "digest"):
        return _memorywork(case)
    npages = int(case.guest_gib * _GIB) // _PAGE
    chooser = np.random.default_rng(5)
    if case.kernel == "smaller":
        return _smaller(_bitmap(chooser, npages * _PAGE // _CHUNK, case.density))
    maps = [_bitmap(chooser, npages, case.density) for _ in range(case.sources)]
    words = maps[0].words
    if case.kernel == "merge":
        return _merging(maps, npages)
    if case.kernel == "or":
        return _adding(maps[0], maps[1])
    if case.kernel == "count":
        return Work(
            lambda: int(kernels.popcount(words)),
            lambda: int(np.bitwise_count(words).sum()),
            words.nbytes,
        )
    if case.kernel == "runs":
        found = 16 * int(kernels.count_runs(words))  # a start and a length
        return Work(
            lambda: kernels.runs(words), lambda: _numpy_runs(words), words.nbytes, written=found
        )
    return _larger(words, npages)


def _larger(words: Words, npages: int) -> Work:
    huge = npages * _PAGE // _HUGE

    def ours() -> Words:
        into = np.zeros((huge + 63) // 64, np.uint64)
        rescale.spread(words, 0, npages, _PAGE, into, _HUGE, 0)
        return into

    def theirs() -> Words:
        some = words.reshape(-1, _HUGE // _PAGE // 64).any(axis=1)
        packed = np.packbits(some, bitorder="little")
        return np.pad(packed, (0, -len(packed) % 8)).view(np.uint64)

    return Work(ours, theirs, words.nbytes, written=(huge + 7) // 8)


def _smaller(chunks: DirtyBitmap) -> Work:
    times = _CHUNK // _PAGE

    def ours() -> Words:
        into = np.zeros(len(chunks.words) * times, np.uint64)
        rescale.spread(chunks.words, 0, chunks.npages, _CHUNK, into, _PAGE, 0)
        return into

    def theirs() -> Words:
        bits = np.unpackbits(chunks.words.view(np.uint8), bitorder="little")
        wide: Words = (bits.astype(np.uint16) * np.uint16(0xFFFF)).view(np.uint64)
        return wide

    return Work(ours, theirs, chunks.words.nbytes, written=chunks.words.nbytes * times)


def _bitmap(chooser: np.random.Generator, npages: int, density: float) -> DirtyBitmap:
    bits = np.concatenate(
        [
            chooser.random(min(1 << 22, npages - at), np.float32) < density
            for at in range(0, npages, 1 << 22)
        ]
    )
    return DirtyBitmap(npages, np.packbits(bits, bitorder="little").view(np.uint64).copy())


def _merging(maps: Sequence[DirtyBitmap], npages: int) -> Work:
    blocks = [RamBlock("ram", npages * _PAGE, _PAGE, 0, 0, 0)]
    reports = {f"source {i}": PageSet(blocks, {"ram": bitmap}) for i, bitmap in enumerate(maps)}

    def numpy_merge() -> tuple[Words, int]:
        union = np.bitwise_or.reduce([bitmap.words for bitmap in maps])
        return union, int(np.bitwise_count(union).sum())

    def ours() -> tuple[Words, int]:
        merged = merge(blocks, reports)
        return merged.dirty["ram"].words, merged.pages

    nbytes = maps[0].words.nbytes
    return Work(ours, numpy_merge, nbytes * len(maps), written=nbytes)


def _adding(into: DirtyBitmap, other: DirtyBitmap) -> Work:
    src, dst, numpys = other.words, into.words, into.words.copy()

    def theirs() -> int:
        new = int(np.bitwise_count(src & ~numpys).sum())
        np.bitwise_or(numpys, src, out=numpys)
        return new

    return Work(lambda: int(kernels.or_count(dst, src)), theirs, 2 * src.nbytes, written=src.nbytes)


def _numpy_runs(words: Words) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    bits = np.unpackbits(words.view(np.uint8), bitorder="little").astype(np.int8)
    edges = np.diff(bits, prepend=np.int8(0), append=np.int8(0))
    starts = np.flatnonzero(edges == 1)
    return starts, np.flatnonzero(edges == -1) - starts


def _memorywork(case: Case) -> Work:
    nbytes = int(case.guest_gib * _GIB)
    memory = np.empty(nbytes, np.uint8)
    memory.fill(0)  # pages of their own: else all are the kernel's one of zeros
    npages = nbytes // _PAGE
    if case.density:
        memory[_PAGE - 1 :: _PAGE] = 7  # a zero test has to read to the end
    every = DirtyBitmap.full(npages).words
    out = np.zeros_like(every)
    if case.kernel == "zero":

        def zero() -> Words:
            pages.zero_pages(memory, _PAGE, every, out)
            return out

        def numpy_zero() -> Words:
            empty = ~memory.view(np.uint64).reshape(npages, -1).any(axis=1)
            return np.packbits(empty, bitorder="little").view(np.uint64)

        return Work(zero, numpy_zero, nbytes)
    digests = np.zeros(npages, np.uint64)

    def digest() -> NDArray[np.bool_]:
        pagehash.page_digests(memory, _PAGE, every, 1, digests, 0, npages)
        return np.asarray(digests == digests[0])

    def numpy_digest() -> NDArray[np.bool_]:
        # numpy has no hash; this is the least that reads everything
        sums = np.bitwise_xor.reduce(memory.view(np.uint64).reshape(npages, -1), axis=1)
        return np.asarray(sums == sums[0])

    return Work(digest, numpy_digest, nbytes)
