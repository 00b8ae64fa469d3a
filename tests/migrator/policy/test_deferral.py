"""Which pages wait: against sets of pages, round by round."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrator.policy.deferral import Choice, Chosen, Heat, hottest, room
from tests.pagesets import block
from tests.tracker import naive
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet

NPAGES = {"small": 130, "huge": 5}
SIZES = {"small": 4096, "huge": 3 * 4096}
BLOCKS = [block(name, n, SIZES[name]) for name, n in NPAGES.items()]

Looks = list[dict[str, set[int]]]


def bitmaps(pages: dict[str, set[int]]) -> PageSet:
    return PageSet(BLOCKS, {n: DirtyBitmap.from_pages(NPAGES[n], sorted(pages[n])) for n in NPAGES})


def sets(found: PageSet) -> dict[str, set[int]]:
    return {name: naive.pages_of(pages.words) for name, pages in found.items()}


looks = st.lists(
    st.fixed_dictionaries({name: st.sets(st.integers(0, n - 1)) for name, n in NPAGES.items()}),
    min_size=1,
    max_size=10,
)


def heat_after(past: Looks) -> Heat:
    """After looks that were a second apart, and left nothing."""
    heat = Heat(BLOCKS)
    for written in past:
        heat.look(bitmaps(written), 1.0)
    return heat


@settings(deadline=None)
@given(looks, looks, st.integers(0, 200))
def test_what_waits(past: Looks, now: Looks, pages: int) -> None:
    """Written now, within the room, and none hotter is left out."""
    heat, written = heat_after(past), now[0]
    hot = sets(heat.hot(bitmaps(written), pages * 4096))
    assert sum(len(hot[name]) * SIZES[name] for name in hot) <= pages * 4096
    candidates = written
    assert all(hot[name] <= candidates[name] for name in NPAGES)

    def warmth(name: str, page: int) -> int:
        return sum(
            2**i for i, look in enumerate(past[-8:], 8 - len(past[-8:])) if page in look[name]
        )

    left_out = {name: candidates[name] - hot[name] for name in NPAGES}
    if not any(left_out.values()):
        return
    coldest = min((warmth(n, p) for n in hot for p in hot[n]), default=None)
    if coldest is not None:
        hottest_left = max(warmth(n, p) for n in left_out for p in left_out[n])
        assert hottest_left <= coldest


@settings(deadline=None)
@given(looks, looks)
def test_with_room_enough_all_that_is_written_may_wait(past: Looks, now: Looks) -> None:
    """As long as no sample said that it is not written again."""
    heat, written = heat_after(past), now[0]
    assert sets(heat.hot(bitmaps(written), 1 << 30)) == written
    again = {name: written[name] & past[-1][name] for name in NPAGES}
    assert heat.again(bitmaps(written)) == (size(past[-1]), size(again))


@pytest.mark.parametrize(("still", "waits"), [(10, True), (9, True), (8, False)])
def test_nothing_waits_if_too_little_of_the_sample_is_written_still(
    still: int, waits: bool
) -> None:
    """And then a page has to be written in one look more before it may."""
    every = {"small": set(range(100)), "huge": set[int]()}
    left = {"small": set(range(90)), "huge": set[int]()}
    heat = Heat(BLOCKS)
    heat.look(bitmaps(every), 1.0, Chosen(bitmaps(every), bitmaps(left)))
    some = {"small": set(range(90 + still)), "huge": set[int]()}
    assert heat.again(bitmaps(some)) == (10 * 4096, still * 4096)
    assert sets(heat.hot(bitmaps(some), 1 << 30))["small"] == (some["small"] if waits else set())
    if waits:
        return
    heat.look(bitmaps(some), 1.0)
    next_one = {"small": {1, 95, 99}, "huge": set[int]()}
    assert sets(heat.hot(bitmaps(next_one), 1 << 30))["small"] == {1, 95}


def test_each_page_is_in_the_sample_once_in_so_many_looks() -> None:
    npages = 64 * 80
    full = PageSet.full([block("ram", npages)])
    heat = Heat(full.blocks)
    asked = np.zeros(npages, int)
    for _ in range(16):
        sample = full["ram"] - heat.unasked(full)["ram"]
        assert 0 < sample.count() <= npages // 10
        asked[sorted(naive.pages_of(sample.words))] += 1
        heat.look(full, 1.0)
    assert (asked == 1).all()


def size(pages: dict[str, set[int]]) -> int:
    return sum(len(pages[name]) * SIZES[name] for name in NPAGES)


@settings(deadline=None)
@given(looks, st.integers(1, 12))
def test_what_was_written_lately(past: Looks, seconds: int) -> None:
    """In whole intervals: the union of as many looks."""
    found, covered_s = heat_after(past).lately(float(seconds))
    within = past[-min(seconds, 8) :]
    union = {name: set[int]().union(*(look[name] for look in within)) for name in NPAGES}
    assert found == size(union)
    assert covered_s == len(within)


def test_a_part_of_an_interval_counts_in_part_unless_it_is_the_last() -> None:
    first, last = {"small": {1, 2, 3, 4}, "huge": {0}}, {"small": {4, 5}, "huge": set[int]()}
    heat = heat_after([first, last])
    assert heat.lately(0.25) == (2 * 4096, 1.0)
    assert heat.lately(1.0) == (2 * 4096, 1.0)
    assert heat.lately(1.5) == ((2 + 6 / 2) * 4096, 1.5)
    assert Heat(BLOCKS).lately(1.0) == (0.0, 0.0)


def counts(**pages: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    found = np.zeros(256, np.int64)
    for history, n in pages.items():
        found[int(history[1:])] = n
    return found


@pytest.mark.parametrize(
    ("of", "pages", "expected"),
    [
        (counts(h255=5, h192=7), 12, Choice(192, 7)),
        (counts(h255=5, h192=7), 8, Choice(192, 3)),
        (counts(h255=5, h192=7), 4, Choice(255, 4)),
        (counts(h255=5, h192=7), 100, Choice(128, 0)),
        (counts(h255=5), 0, Choice(255, 0)),
        (counts(h255=5), -1, Choice(255, 0)),
        (counts(h127=5), 5, Choice(128, 0)),  # not written at the last look
        (counts(h128=5), 9, Choice(128, 5)),
    ],
)
def test_hottest(
    of: np.ndarray[tuple[int], np.dtype[np.int64]], pages: int, expected: Choice
) -> None:
    assert hottest(of, pages) == expected


def test_room_is_a_part_of_what_the_downtime_allows() -> None:
    assert room(100.0, 50.0, 1e9) == pytest.approx(40e6)
    assert room(50.0, 50.0, 1e9) == room(10.0, 50.0, 1e9) == 0
