"""The order in which the synthetic guests touch their pages."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from bench.guests import patterns
from bench.guests.patterns import INCREMENT, READ, REWRITE, Pattern, Stage, at, increments, make

NPAGES = 1000
NAMES = (*patterns.PATTERNS, "growing")


def walk(pattern: Pattern) -> list[tuple[int, int]]:
    """Every access until the pattern begins anew, one after the other."""
    stages = (
        list(zip(stage.pages.tolist(), stage.kinds.tolist(), strict=True)) * stage.times
        for stage in pattern
    )
    return list(chain.from_iterable(stages))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_every_time_and_within_the_set(name: str) -> None:
    once, again = (make(name, NPAGES, 1000) for _ in range(2))
    assert walk(once) == walk(again)
    for stage in once:
        assert len(stage.pages) == len(stage.kinds) == len(stage) > 0
        assert stage.pages.max() < NPAGES
        assert stage.times > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("npages", [16, 17, NPAGES])
def test_any_size(name: str, npages: int) -> None:
    for stage in make(name, npages, 0):
        assert len(stage) > 0
        assert stage.pages.max() < npages


@pytest.mark.parametrize(
    ("name", "kind"), [("sequential", INCREMENT), ("same-bytes", REWRITE), ("idle", INCREMENT)]
)
def test_in_order(name: str, kind: int) -> None:
    assert walk(make(name, NPAGES, 0)) == [(page, kind) for page in range(NPAGES)]


@pytest.mark.parametrize("name", ["random", "bursts"])
def test_uniform(name: str) -> None:
    (stage,) = make(name, NPAGES, 0)
    assert (stage.kinds == INCREMENT).all()
    counts = np.bincount(stage.pages, minlength=NPAGES)
    assert np.count_nonzero(counts) > 0.99 * NPAGES
    assert np.sort(counts)[-NPAGES // 10 :].sum() < 0.25 * len(stage)  # the hottest tenth
    steps = np.diff(stage.pages.astype(int))
    assert np.count_nonzero(steps == 1) < 0.02 * len(stage)


def test_zipf_has_a_hot_set_that_is_strewn_about() -> None:
    (stage,) = make("zipf", NPAGES, 0)
    assert (stage.kinds == INCREMENT).all()
    counts = np.bincount(stage.pages, minlength=NPAGES)
    order = np.argsort(-counts)
    assert 0.6 < counts[order[: NPAGES // 10]].sum() / len(stage) < 0.8
    # twice as often as the page of twice its rank, give or take
    assert 1.5 < counts[order[0]] / counts[order[1]] < 2.7
    hot = np.sort(order[: NPAGES // 10])
    assert hot[0] < 0.2 * NPAGES
    assert hot[-1] > 0.8 * NPAGES
    assert np.count_nonzero(np.diff(hot) == 1) < 0.3 * len(hot)


def test_read_mostly_reads_anywhere_and_writes_few_pages() -> None:
    (stage,) = make("read-mostly", NPAGES, 0)
    writes = stage.kinds == INCREMENT
    assert (stage.kinds[~writes] == READ).all()
    assert 0.04 < writes.mean() < 0.06
    assert len(np.unique(stage.pages[writes])) <= 0.05 * NPAGES
    assert len(np.unique(stage.pages[~writes])) > 0.99 * NPAGES


@pytest.mark.parametrize("pages_per_s", [100_000, 0])
def test_growing_stays_as_long_at_every_size(pages_per_s: int) -> None:
    pattern = make("growing", NPAGES, pages_per_s)
    assert [len(stage) for stage in pattern] == [NPAGES * n // 16 for n in range(1, 17)]
    for stage in pattern:
        assert (stage.kinds == INCREMENT).all()
        assert stage.pages.tolist() == list(range(len(stage)))
        seconds = len(stage) * stage.times / (pages_per_s or patterns.FULL_SPEED_PAGES_PER_S)
        assert seconds == pytest.approx(patterns.GROWTH_S, rel=0.02)


def stage(pages: list[int], kinds: list[int], times: int = 1) -> Stage:
    return Stage(np.array(pages, np.uint32), np.array(kinds, np.uint8), times)


def test_counting_agrees_with_going_through_them_one_by_one() -> None:
    pattern = (
        stage([3, 1, 3, 0], [INCREMENT, INCREMENT, INCREMENT, READ], times=3),
        stage([4], [REWRITE]),
        stage([2, 1], [INCREMENT, REWRITE], times=2),
    )
    order = walk(pattern) * 3
    counts: Counter[int] = Counter()
    for accesses, (page, kind) in enumerate(order):
        assert increments(pattern, 5, accesses).tolist() == [counts[n] for n in range(5)], accesses
        assert at(pattern, accesses) == (page, kind)
        counts[page] += kind == INCREMENT
    assert sum(counts.values()) == 33
