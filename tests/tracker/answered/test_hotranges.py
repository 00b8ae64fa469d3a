"""Ranges that hold what is hot: against their definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pagesets import page_set
from tracker.answered.hotranges import hot_ranges
from tracker.bits.bitmap import DirtyBitmap


def runs(pages: DirtyBitmap) -> list[tuple[int, int]]:
    return [(int(a), int(a + n)) for a, n in zip(*pages.runs(), strict=True)]


def chosen(npages: int, pages: list[int], ranges: int = 64, enough: float = 1.0) -> list:  # type: ignore[type-arg]
    hot = page_set({"ram": DirtyBitmap.from_pages(npages, pages)})
    return runs(hot_ranges(hot, ranges, enough)["ram"])


@pytest.mark.parametrize(
    ("pages", "ranges", "expected"),
    [
        ([], 4, []),
        ([5], 4, [(5, 6)]),
        ([0, 1, 2, 99], 4, [(0, 3), (99, 100)]),
        ([0, 10, 13, 50], 3, [(0, 1), (10, 14), (50, 51)]),
        ([0, 10, 13, 50], 2, [(0, 14), (50, 51)]),
        ([0, 10, 13, 50], 1, [(0, 51)]),
        ([*range(100)], 1, [(0, 100)]),
    ],
)
def test_the_narrowest_gaps_are_closed(
    pages: list[int], ranges: int, expected: list[tuple[int, int]]
) -> None:
    assert chosen(100, pages, ranges) == expected


def test_what_lies_apart_is_left_out() -> None:
    assert chosen(1000, [3, *range(100, 400), 900], enough=0.99) == [(100, 400)]


def test_blocks_share_the_ranges() -> None:
    hot = page_set(
        {
            "a": DirtyBitmap.from_pages(100, [1, 50, 99]),
            "b": DirtyBitmap.from_pages(640, [*range(64), *range(128, 256)]),
            "c": DirtyBitmap.empty(7),
        }
    )
    found = hot_ranges(hot, 3, 1.0)
    assert runs(found["a"]) == [(1, 2)]  # the smallest, of which the first
    assert runs(found["b"]) == [(0, 64), (128, 256)]
    assert found["c"].npages == 7
    assert not found["c"].any()


@given(
    st.lists(st.sets(st.integers(0, 299)), min_size=1, max_size=3),
    st.integers(1, 70),
    st.sampled_from([0.5, 0.99, 1.0]),
)
def test_few_ranges_and_nearly_all_that_is_hot(
    blocks: list[set[int]], ranges: int, enough: float
) -> None:
    hot = page_set(
        {str(n): DirtyBitmap.from_pages(300, sorted(pages)) for n, pages in enumerate(blocks)}
    )
    found = hot_ranges(hot, ranges, enough)
    assert found.keys() == hot.keys()
    assert sum(len(runs(pages)) for pages in found.values()) <= ranges
    total = sum(len(pages) for pages in blocks)
    held = sum((pages & hot[name]).count() for name, pages in found.items())
    if ranges >= 64 * len(blocks) or len(blocks) == 1:
        assert held >= enough * total
    for name, pages in found.items():
        for first, last in runs(pages):
            bits = np.unpackbits(hot[name].words.view(np.uint8), bitorder="little")
            assert bits[first]
            assert bits[last - 1]
