"""Many bitmaps united, against sets and numpy; compiled and as plain Python."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tracker import naive
from tests.tracker.bits.test_words import INTERPRETED, NPAGES, ROOT, Words, subsets
from tracker.bits import union
from tracker.errors import BitmapError


@given(st.data())
def test_add_repeated(data: st.DataObject) -> None:
    npages = data.draw(NPAGES)
    a, b, known = (data.draw(subsets(npages)) for _ in range(3))
    words, repeated, src = (naive.words_of(pages, npages) for pages in (a, known, b))
    assert union.add_repeated(words, repeated, src) == len(b)
    assert naive.pages_of(words) == a | b
    assert naive.pages_of(repeated) == known | (a & b)
    assert naive.pages_of(src) == b
    assert union.count_minus(src, words) == 0
    assert union.count_minus(words, src) == len(a - b)


@given(st.data(), st.integers(0, 5))
def test_unite(data: st.DataObject, nsources: int) -> None:
    npages = data.draw(NPAGES)
    sets = [data.draw(subsets(npages)) for _ in range(nsources)]
    nexact = data.draw(st.integers(0, nsources))
    before = [data.draw(st.integers(0, 9)) for _ in range(2 * nsources)]  # counts are added to
    counts = np.array(before, np.int64).reshape(nsources, 2)
    exact, rest = (naive.words_of(data.draw(subsets(npages)), npages) for _ in range(2))
    stale = naive.pages_of(rest)
    maps = [naive.words_of(pages, npages) for pages in sets]
    total = union.unite(addresses(maps), nexact, exact, rest, counts)
    all_pages, of_exact = set().union(*sets), set().union(*sets[:nexact])
    assert naive.pages_of(exact) == of_exact
    assert naive.pages_of(rest) == (all_pages - of_exact if nexact < nsources else stale)
    assert total == len(all_pages)
    for i, pages in enumerate(sets):
        alone = pages.difference(*(other for j, other in enumerate(sets) if j != i))
        found = counts[i] - before[2 * i : 2 * i + 2]
        assert found.tolist() == [len(pages), len(alone)]
        assert naive.pages_of(maps[i]) == pages


def addresses(maps: Sequence[Words]) -> Words:
    return np.array([words.ctypes.data for words in maps], np.uint64)


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize(("nsources", "nexact"), [(1, 1), (2, 2), (2, 1), (3, 3), (4, 2)])
def test_unite_from_block_to_block(nsources: int, nexact: int, more: int) -> None:
    nwords = 2 * union.BLOCK + more
    random = np.random.default_rng(nsources)
    maps = [random.integers(0, 1 << 64, nwords, np.uint64) for _ in range(nsources)]
    exact, rest = np.zeros(nwords, np.uint64), np.zeros(nwords, np.uint64)
    counts = np.zeros((nsources, 2), np.int64)
    total = union.unite(addresses(maps), nexact, exact, rest, counts)
    bits = np.unpackbits(np.array(maps).view(np.uint8), axis=1, bitorder="little")
    assert np.array_equal(exact, np.bitwise_or.reduce(maps[:nexact]))
    assert np.array_equal(rest, np.bitwise_or.reduce(maps) & ~exact)
    assert counts.tolist() == [[row.sum(), (row & (bits.sum(axis=0) == 1)).sum()] for row in bits]
    assert total == bits.any(axis=0).sum()


def test_what_does_not_fit_is_refused() -> None:
    one, two, none = (np.zeros(n, np.uint64) for n in (1, 2, 0))
    at, counts = addresses([one]), np.zeros((1, 2), np.int64)
    union.unite(at, 1, one, one, counts)
    for arguments in (
        (at, 1, one, two, counts),
        (at, 2, one, one, counts),
        (at, -1, one, one, counts),
        (none, 0, one, one, counts),
    ):
        with pytest.raises(BitmapError):
            union.unite(*arguments)
    for repeated, src in ((two, one), (one, two)):
        with pytest.raises(BitmapError):
            union.add_repeated(one, repeated, src)
    with pytest.raises(BitmapError):
        union.count_minus(one, two)


USE = """
import sys
from tracker.bits import union
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.merge import merge
from tracker.bits.pageset import PageSet
from tracker.memory.ram import RamBlock

names = ("unite", "unite_two", "add_repeated")
def signatures():
    return {name: len(getattr(union, name).signatures) for name in names}

if sys.argv[1] == "warm":
    union.warm_up()
before = signatures()
maps = [DirtyBitmap.from_pages(65, [page]) for page in (1, 2, 64)]
blocks = [RamBlock("ram", 65 * 4096, 4096, 0, 0, 0)]
reports = {str(number): PageSet(blocks, {"ram": bitmap}) for number, bitmap in enumerate(maps)}
merge(blocks, reports)
merge(blocks, reports, {"2"})
merge(blocks, {"0": reports["0"], "1": reports["1"]})
merge(blocks, {"0": reports["0"]})
print([name for name, number in signatures().items() if number != before[name]])
"""


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("warm", [True, False])
def test_nothing_is_compiled_after_warm_up(warm: bool) -> None:
    command = [sys.executable, "-c", USE, "warm" if warm else "cold"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert ("unite" in eval(child.stdout)) is not warm
    assert bool(eval(child.stdout)) is not warm
