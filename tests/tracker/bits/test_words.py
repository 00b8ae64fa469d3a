"""Every kernel against the naive oracle, on real files where it touches files.

This module runs twice: compiled, and as plain Python in a child with ``NUMBA_DISABLE_JIT=1``
(:func:`test_the_same_as_plain_python`).
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba.core.registry import CPUDispatcher
from numpy.typing import NDArray

from tests.tracker import naive
from tracker.bits import words as kernels
from tracker.errors import BitmapError

PAGE = mmap.PAGESIZE
SHM = Path("/dev/shm")
INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT") == "1"
ROOT = Path(__file__).parents[3]

# a word less, a word, a word more; and the empty block
NPAGES = st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129]) | st.integers(0, 260)
Words = NDArray[np.uint64]


@st.composite
def subsets(draw: st.DrawFn, npages: int) -> set[int]:
    """Some of the pages: as patterns of whole words, where the shortcuts of the kernels are."""
    patterns = [0, 2**64 - 1, 1, 1 << 63, 0x5555_5555_5555_5555, 2**63 - 1, 2**64 - 2]
    word = st.sampled_from(patterns) | st.integers(0, 2**64 - 1)
    nwords = (npages + 63) // 64
    words = draw(st.lists(word, min_size=nwords, max_size=nwords))
    return {p for p in range(npages) if words[p // 64] >> (p % 64) & 1}


def test_it_is_the_compiled_kernels_that_are_tested_or_not() -> None:
    assert isinstance(kernels.popcount, CPUDispatcher) is not INTERPRETED


# --- bits -----------------------------------------------------------------------------------------


@given(st.data())
def test_set_algebra(data: st.DataObject) -> None:
    npages = data.draw(NPAGES)
    a, b = data.draw(subsets(npages)), data.draw(subsets(npages))
    words, other = naive.words_of(a, npages), naive.words_of(b, npages)

    assert kernels.popcount(words) == len(a)
    union, counted, rest = words.copy(), words.copy(), words.copy()
    kernels.or_into(union, other)
    assert naive.pages_of(union) == a | b
    assert kernels.or_count(counted, other) == len(b - a)
    assert naive.pages_of(counted) == a | b
    kernels.minus_into(rest, other)
    assert naive.pages_of(rest) == a - b
    assert naive.pages_of(other) == b


@given(st.data())
def test_runs(data: st.DataObject) -> None:
    npages = data.draw(NPAGES)
    pages = data.draw(subsets(npages))
    starts, lengths = kernels.runs(naive.words_of(pages, npages))
    assert starts.dtype == lengths.dtype == np.int64
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == naive.runs(pages)


@pytest.mark.parametrize("npages", [1, 63, 64, 65, 128])
def test_a_run_may_reach_the_last_page(npages: int) -> None:
    for start in range(npages):
        starts, lengths = kernels.runs(naive.words_of(range(start, npages), npages))
        assert (starts.tolist(), lengths.tolist()) == ([start], [npages - start])


@given(st.data())
def test_set_ranges(data: st.DataObject) -> None:
    npages = data.draw(NPAGES)
    before = data.draw(subsets(npages))
    edge = st.integers(0, npages)
    ranges = [sorted(data.draw(st.tuples(edge, edge))) for _ in range(data.draw(st.integers(0, 5)))]
    n = data.draw(st.integers(0, len(ranges)))
    words = naive.words_of(before, npages)
    starts = np.array([start for start, _ in ranges], np.int64)
    stops = np.array([stop for _, stop in ranges], np.int64)
    kernels.set_ranges(words, starts, stops, n)
    wanted = before.union(*(range(start, stop) for start, stop in ranges[:n]))
    assert naive.pages_of(words) == wanted


@given(st.data(), st.sampled_from([4096, 1 << 21]), st.sampled_from([0, 0x7F12_3456_7000]))
def test_set_regions_never_under_reports(data: st.DataObject, page_size: int, base: int) -> None:
    npages = data.draw(NPAGES)
    # bytes, and not aligned: what a scan in 4 KiB steps says about 2 MiB pages, and worse
    edge = st.integers(0, npages * page_size) | st.integers(0, npages).map(lambda p: p * page_size)
    regions = [
        sorted(data.draw(st.tuples(edge, edge))) for _ in range(data.draw(st.integers(0, 4)))
    ]
    vector = np.zeros((5, 3), np.uint64)
    for row, (start, end) in zip(vector, regions, strict=False):
        row[:] = base + start, base + end, 1
    words = naive.words_of(set(), npages)
    kernels.set_regions(words, vector, len(regions), base, page_size)
    wanted = set[int]().union(*(naive.touched(s, e, page_size) for s, e in regions))
    assert naive.pages_of(words) == wanted


@pytest.mark.parametrize(
    ("start", "end", "pages"),
    [
        (0, 0, set()),
        (4095, 4096, {0}),
        (4096, 4097, {1}),
        (4095, 4097, {0, 1}),
        (1, 63 * 4096 + 1, set(range(64))),
        (63 * 4096, 65 * 4096, {63, 64}),
    ],
)
def test_a_region_counts_for_every_page_it_touches(start: int, end: int, pages: set[int]) -> None:
    words = naive.words_of(set(), 70)
    kernels.set_regions(words, np.array([[start, end, 1]], np.uint64), 1, 0, 4096)
    assert naive.pages_of(words) == pages


@pytest.mark.parametrize(
    ("start", "end"),
    [(-1, 1), (0, 64 * 4096 + 1), (4096, 0), (-8192, -4096), (2**63, 2**63 + 4096)],
    ids=["before", "after", "backwards", "elsewhere", "kernel"],
)
def test_regions_outside_the_words_are_refused(start: int, end: int) -> None:
    words, base = np.zeros(1, np.uint64), 1 << 30
    vector = np.array([[base + start, base + end, 1]], np.uint64)
    with pytest.raises(BitmapError):
        kernels.set_regions(words, vector, 1, base, 4096)
    assert not words.any()


@pytest.mark.parametrize("page_size", [0, -4096, 3000])
def test_page_sizes_of_regions_are_powers_of_two(page_size: int) -> None:
    with pytest.raises(BitmapError):
        kernels.set_regions(np.zeros(1, np.uint64), np.zeros((1, 3), np.uint64), 1, 0, page_size)


def refusals() -> Iterator[object]:
    one, two = np.zeros(1, np.uint64), np.zeros(2, np.uint64)
    row, rows = np.zeros(1, np.int64), np.zeros((1, 3), np.uint64)

    def refusal(name: str, kernel: Callable[..., object], *arguments: object) -> object:
        return pytest.param(kernel, arguments, id=name)

    yield refusal("or_into", kernels.or_into, one, two)
    yield refusal("or_count", kernels.or_count, two, one)
    yield refusal("minus_into", kernels.minus_into, one, two)
    yield refusal("too few ranges", kernels.set_ranges, one, row, row, 2)
    yield refusal("range beyond", kernels.set_ranges, one, row, row + 65, 1)
    yield refusal("range before", kernels.set_ranges, one, row - 1, row, 1)
    yield refusal("too few regions", kernels.set_regions, one, rows, 2, 0, PAGE)
    yield refusal("no regions", kernels.set_regions, one, rows[:, :2].copy(), 1, 0, PAGE)


@pytest.mark.parametrize(("kernel", "arguments"), list(refusals()))
def test_what_does_not_fit_is_refused(
    kernel: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    with pytest.raises(BitmapError):
        kernel(*arguments)


# --- the other mode, and before a migration -------------------------------------------------------

USE = """
import sys
import numpy as np
from tracker.bits import words as kernels
from tracker.bits.bitmap import DirtyBitmap

def signatures():
    found = {n: k.signatures for n, k in vars(kernels).items() if hasattr(k, "signatures")}
    assert len(found) > 10
    return {n: list(s) for n, s in found.items()}

if sys.argv[1] == "warm":
    kernels.warm_up()
before = signatures()
a, b, c = DirtyBitmap.empty(65), DirtyBitmap.full(65), DirtyBitmap.from_pages(65, [1, 64])
regions = np.zeros((2, 3), np.uint64)
regions[0] = 0x7f00_0000_0000, 0x7f00_0000_2000, 1
a.set_regions(regions, 1, 0x7f00_0000_0000, 4096)
kernels.set_regions(a.words, regions, 1, 0x7f00_0000_0000, 4096)
a |= b | c
a.add(c), (a - b).any(), a.count(), a.runs(), a == b, repr(a), a.clear(), a.set_range(1, 3)
compiled = {n: s for n, s in signatures().items() if s != before[n]}
print(sorted(compiled))
"""


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("warm", [True, False])
def test_nothing_is_compiled_after_warm_up(warm: bool) -> None:
    command = [sys.executable, "-c", USE, "warm" if warm else "cold"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    if warm:
        assert child.stdout == "[]\n"
    else:
        for name in ("fill", "set_regions", "find_runs", "or_into"):
            assert f"'{name}'" in child.stdout


_WITH_KERNELS = (
    *("tracker/bits/test_words", "tracker/bits/test_union", "tracker/bits/test_rescale"),
    *("tracker/bits/test_bitmap", "tracker/bits/test_merge", "tracker/bits/test_heat"),
    *("tracker/bits/test_regions", "tracker/devices/test_iova", "tracker/memory/test_pages"),
    *("tracker/memory/test_pagehash", "migrator/transport/test_runs"),
)


@pytest.mark.skipif(INTERPRETED, reason="this is the child")
def test_the_same_as_plain_python() -> None:
    modules = [str(ROOT / "tests" / f"{module}.py") for module in _WITH_KERNELS]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *modules],
        cwd=ROOT,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
