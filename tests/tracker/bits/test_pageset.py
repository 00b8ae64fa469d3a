"""Page sets against Python's own sets of (block, page)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pagesets import block
from tests.tracker import naive
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.errors import BitmapError

BLOCKS = (block("ram0", 130), block("ram1", 5, 2 << 20))
SIZES = {b.name: b.page_size for b in BLOCKS}
Pages = set[tuple[str, int]]

pages = st.sets(
    st.one_of(*(st.tuples(st.just(b.name), st.integers(0, b.npages - 1)) for b in BLOCKS))
)


def of(some: Pages) -> PageSet:
    return PageSet(
        BLOCKS,
        {
            b.name: DirtyBitmap.from_pages(b.npages, sorted(p for n, p in some if n == b.name))
            for b in BLOCKS
        },
    )


def back(found: PageSet) -> Pages:
    return {(name, p) for name, bitmap in found.items() for p in naive.pages_of(bitmap.words)}


@given(pages, pages)
def test_operators_are_those_of_sets(a: Pages, b: Pages) -> None:
    x, y = of(a), of(b)
    assert back(x | y) == a | b
    assert back(x & y) == a & b
    assert back(x - y) == a - b
    assert (back(x), back(y)) == (a, b)  # which stayed as they were
    assert (x == y) is (a == b)
    z = x.copy()
    z |= y
    assert back(z) == a | b
    assert back(x) == a
    x -= y
    assert back(x) == a - b


@given(pages)
def test_counts(a: Pages) -> None:
    x = of(a)
    assert x.count() == len(a)
    assert x.any() is bool(a)
    assert x.nbytes() == sum(SIZES[name] for name, _ in a)
    assert x.measure() == (x.count(), x.nbytes())


def test_empty_and_full() -> None:
    assert back(PageSet.empty(BLOCKS)) == set()
    assert back(PageSet.full(BLOCKS)) == {(b.name, p) for b in BLOCKS for p in range(b.npages)}
    assert list(PageSet.full(BLOCKS)) == ["ram0", "ram1"]


def test_each_block_is_changed_alone() -> None:
    x = of({("ram0", 1), ("ram1", 2)})
    found = x.each(lambda bitmap: DirtyBitmap.full(bitmap.npages) - bitmap)
    assert back(found) == back(PageSet.full(BLOCKS)) - {("ram0", 1), ("ram1", 2)}


def test_of_some_blocks_bitmaps_are_shared() -> None:
    x = of({("ram0", 1), ("ram1", 2)})
    some = x.of(BLOCKS[1:])
    assert back(some) == {("ram1", 2)}
    some["ram1"].set_range(0, 1)
    assert back(x) == {("ram0", 1), ("ram1", 0), ("ram1", 2)}


@pytest.mark.parametrize(
    ("bitmaps", "why"),
    [
        ({"ram0": DirtyBitmap(130)}, "nothing about .*ram1"),
        ({"ram0": DirtyBitmap(130), "ram1": DirtyBitmap(5), "x": DirtyBitmap(1)}, "not known.*x"),
        ({"ram0": DirtyBitmap(129), "ram1": DirtyBitmap(5)}, "129 pages of 'ram0', not 130"),
    ],
)
def test_bitmaps_of_other_blocks_are_refused(bitmaps: dict[str, DirtyBitmap], why: str) -> None:
    with pytest.raises(BitmapError, match=why):
        PageSet(BLOCKS, bitmaps)


def test_sets_of_other_blocks_do_not_meet() -> None:
    x, y = PageSet.full(BLOCKS), PageSet.full(BLOCKS[:1])
    with pytest.raises(BitmapError):
        x | y
    with pytest.raises(BitmapError):
        x & y
    with pytest.raises(BitmapError):
        _ = x - y
    with pytest.raises(BitmapError):
        x |= y
