from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tracker import naive
from tracker.bits.bitmap import DirtyBitmap
from tracker.errors import BitmapError

# a word less, a word, a word more; and the empty block
BOUNDARIES = [0, 1, 2, 63, 64, 65, 127, 128, 129, 192]


def pages(bitmap: DirtyBitmap) -> set[int]:
    return naive.pages_of(bitmap.words)


def _some_of(npages: int) -> st.SearchStrategy[set[int]]:
    return st.sets(st.integers(0, npages - 1)) if npages else st.just(set())


@pytest.mark.parametrize("npages", BOUNDARIES)
def test_empty_and_full(npages: int) -> None:
    empty, full = DirtyBitmap.empty(npages), DirtyBitmap.full(npages)
    assert (empty.count(), empty.any()) == (0, False)
    assert (full.count(), full.any()) == (npages, npages > 0)
    assert pages(full) == set(range(npages))
    full.clear()
    assert full == empty
    empty.set_all()
    assert pages(empty) == set(range(npages))


@given(st.sampled_from(BOUNDARIES).flatmap(lambda n: st.tuples(st.just(n), _some_of(n))))
def test_pages_and_mask(case: tuple[int, set[int]]) -> None:
    npages, wanted = case
    bitmap = DirtyBitmap.from_pages(npages, sorted(wanted))
    assert bitmap.pages().tolist() == sorted(wanted)
    assert bitmap.pages().dtype == np.int64
    assert bitmap.mask().tolist() == [page in wanted for page in range(npages)]
    assert bitmap.mask().dtype == np.bool_


@pytest.mark.parametrize("npages", [n for n in BOUNDARIES if n % 64])
def test_a_bit_past_the_last_page_is_refused(npages: int) -> None:
    words = DirtyBitmap.full(npages).words
    DirtyBitmap(npages, words)
    words[-1] |= np.uint64(1) << np.uint64(npages % 64)
    with pytest.raises(BitmapError, match="past the last"):
        DirtyBitmap(npages, words)


@pytest.mark.parametrize(
    "words",
    [
        np.zeros(1, np.uint64),
        np.zeros(3, np.uint64),
        np.zeros((2, 1), np.uint64),
        np.zeros(2, np.int64),
        np.zeros(2, ">u8"),
        np.zeros(16, np.uint8),
        np.zeros(4, np.uint64)[::2],
        np.frombuffer(bytes(16), np.uint64),
        [0, 0],
    ],
    ids=["short", "long", "2-D", "signed", "big-endian", "bytes", "strided", "read-only", "list"],
)
def test_words_of_another_kind_are_refused(words: np.ndarray) -> None:
    with pytest.raises(BitmapError):
        DirtyBitmap(100, words)


def test_a_negative_number_of_pages_is_refused() -> None:
    with pytest.raises(BitmapError):
        DirtyBitmap(-1)


def test_words_are_shared_and_a_copy_is_not() -> None:
    words = np.zeros(1, np.uint64)
    bitmap = DirtyBitmap(10, words)
    copy = bitmap.copy()
    words[0] = 4
    assert pages(bitmap) == {2}
    assert not copy.any()


# 64 and 65 pages differ in words too, 65 and 66 only in npages
@pytest.mark.parametrize("other", [DirtyBitmap(64), DirtyBitmap(66)], ids=["words", "tail"])
def test_bitmaps_of_different_blocks_never_meet(other: DirtyBitmap) -> None:
    bitmap = DirtyBitmap(65)
    with pytest.raises(BitmapError):
        bitmap |= other
    with pytest.raises(BitmapError):
        _ = bitmap | other
    with pytest.raises(BitmapError):
        _ = bitmap - other
    with pytest.raises(BitmapError):
        bitmap.add(other)
    with pytest.raises(BitmapError):
        _ = bitmap == other
    assert bitmap != "a bitmap"


@st.composite
def two_sets(draw: st.DrawFn) -> tuple[int, set[int], set[int]]:
    npages = draw(st.sampled_from(BOUNDARIES[1:]) | st.integers(1, 300))
    subset = st.sets(st.integers(0, npages - 1))
    return npages, draw(subset), draw(subset)


@given(two_sets())
def test_is_a_set(sets: tuple[int, set[int], set[int]]) -> None:
    npages, a, b = sets
    x, y = (DirtyBitmap.from_pages(npages, sorted(pages, reverse=True)) for pages in (a, b))
    assert pages(x) == a
    assert x.count() == len(a)
    assert x.any() == bool(a)
    assert pages(x | y) == a | b
    assert pages(x - y) == a - b
    assert (x == y) == (a == b)
    assert list(zip(*(row.tolist() for row in x.runs()), strict=True)) == naive.runs(a)
    assert (pages(x), pages(y)) == (a, b), "an operand was changed"
    assert x.add(y) == len(b - a)
    assert pages(x) == a | b
    y |= x
    assert pages(y) == a | b


@pytest.mark.parametrize("page", [-1, 65, 2**40])
def test_pages_outside_the_block_are_refused(page: int) -> None:
    with pytest.raises(BitmapError):
        DirtyBitmap.from_pages(65, [3, page])


def test_page_numbers_are_integers() -> None:
    with pytest.raises(BitmapError):
        DirtyBitmap.from_pages(65, np.array([1.5]))


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, 66), (66, 66)])
def test_ranges_outside_the_block_are_refused(start: int, stop: int) -> None:
    with pytest.raises(BitmapError):
        DirtyBitmap(65).set_range(start, stop)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (65, 65), (0, 65), (63, 65), (64, 65)])
def test_ranges(start: int, stop: int) -> None:
    bitmap = DirtyBitmap(65)
    bitmap.set_range(start, stop)
    assert pages(bitmap) == set(range(start, stop))


def test_regions_may_end_with_the_block_and_not_after_it() -> None:
    # page 65 is within the last word: only npages can tell that it is none
    bitmap = DirtyBitmap(65)
    last, after = (np.array([[p * 4096, (p + 1) * 4096, 0]], np.uint64) for p in (64, 65))
    bitmap.set_regions(last, 1, 0, 4096)
    assert pages(bitmap) == {64}
    with pytest.raises(BitmapError):
        bitmap.set_regions(after, 1, 0, 4096)
    bitmap.set_regions(after, 0, 0, 4096)
    assert pages(bitmap) == {64}
