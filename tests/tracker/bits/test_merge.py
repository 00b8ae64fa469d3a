from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pagesets import blocks, page_set
from tests.tracker import naive
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.merge import merge
from tracker.bits.pageset import PageSet
from tracker.errors import SourceError, TrackerError

BLOCKS = blocks({"ram0": 130, "ram1": 64})


def report(ram0: set[int], ram1: set[int] | None = None) -> PageSet:
    return PageSet(
        BLOCKS,
        {
            "ram0": DirtyBitmap.from_pages(130, sorted(ram0)),
            "ram1": DirtyBitmap.from_pages(64, sorted(ram1 or set())),
        },
    )


def test_a_page_counts_once() -> None:
    merged = merge(BLOCKS, {"cpu": report({1, 2, 129}, {7}), "dma": report({2, 3}, {7, 8})})
    assert naive.pages_of(merged.dirty["ram0"].words) == {1, 2, 3, 129}
    assert naive.pages_of(merged.dirty["ram1"].words) == {7, 8}
    assert merged.pages == 6
    assert merged.pages_by_source == {"cpu": 4, "dma": 4}
    assert merged.only_by_source == {"cpu": 2, "dma": 2}


def test_what_only_an_inexact_source_reports_is_suspect() -> None:
    reports = {"cpu": report({1, 2}), "dma": report({2, 3}, {7}), "more": report({3, 4})}
    merged = merge(BLOCKS, reports, {"dma", "more"})
    assert naive.pages_of(merged.dirty["ram0"].words) == {1, 2}
    assert naive.pages_of(merged.suspects["ram0"].words) == {3, 4}
    assert naive.pages_of(merged.dirty["ram1"].words) == set()
    assert naive.pages_of(merged.suspects["ram1"].words) == {7}
    assert merged.pages == 5
    assert merged.pages_by_source == {"cpu": 2, "dma": 3, "more": 2}
    assert merged.only_by_source == {"cpu": 1, "dma": 1, "more": 1}
    assert merged.pages_by_several == 2


def test_no_page_is_suspect_where_all_are_exact() -> None:
    merged = merge(BLOCKS, {"cpu": report({1, 2}), "dma": report({2, 3})})
    assert not any(pages.any() for pages in merged.suspects.values())
    assert merged.pages_by_several == 1


@st.composite
def many_reports(draw: st.DrawFn) -> list[dict[str, set[int]]]:
    ram0, ram1 = st.sets(st.integers(0, 129)), st.sets(st.integers(0, 63))
    return draw(
        st.lists(st.fixed_dictionaries({"ram0": ram0, "ram1": ram1}), min_size=1, max_size=5)
    )


@given(many_reports())
def test_any_number_of_sources(sets: list[dict[str, set[int]]]) -> None:
    tagged = [{(b, p) for b, pages in s.items() for p in pages} for s in sets]
    merged = merge(BLOCKS, {f"s{i}": report(s["ram0"], s["ram1"]) for i, s in enumerate(sets)})
    union = set().union(*tagged)
    got = {(b, p) for b, bitmap in merged.dirty.items() for p in naive.pages_of(bitmap.words)}
    assert got == union
    assert merged.pages == len(union)
    assert merged.pages_by_source == {f"s{i}": len(s) for i, s in enumerate(tagged)}
    assert merged.only_by_source == {
        f"s{i}": len(s.difference(*(t for j, t in enumerate(tagged) if j != i)))
        for i, s in enumerate(tagged)
    }


def test_the_reports_stay_as_they_are() -> None:
    reports = {"cpu": report({1}), "dma": report({2})}
    merged = merge(BLOCKS, reports)
    merged.dirty["ram0"].set_all()
    assert reports == {"cpu": report({1}), "dma": report({2})}


def test_no_source_is_not_a_clean_block() -> None:
    with pytest.raises(TrackerError):
        merge(BLOCKS, {})


def test_a_block_that_is_left_out_is_not_clean() -> None:
    partial = report({1}).of(BLOCKS[:1])
    with pytest.raises(SourceError, match="ram1") as error:
        merge(BLOCKS, {"cpu": report({1}), "dma": partial})
    assert error.value.source == "dma"
    with pytest.raises(SourceError):
        merge(BLOCKS, {"cpu": PageSet.empty([])})


def test_an_unknown_block_is_refused() -> None:
    extended = page_set({**report({1}), "hotplugged": DirtyBitmap(1)})
    with pytest.raises(SourceError, match="hotplugged"):
        merge(BLOCKS, {"cpu": extended})


# 129 pages need as many words as 130
@pytest.mark.parametrize("npages", [0, 64, 129, 131, 200])
def test_another_number_of_pages_is_refused(npages: int) -> None:
    other = page_set({**report(set()), "ram0": DirtyBitmap(npages)})
    with pytest.raises(SourceError, match="ram0"):
        merge(BLOCKS, {"cpu": report({1}), "dma": other})
