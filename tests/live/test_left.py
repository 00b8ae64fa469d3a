"""Pages that are left unprotected between two looks, on the real kernel: none of their writes lost.

Their writer pays no faults for them; the tracker reports them at each look; and once they are not
left any more, they are what any page is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.live.test_uffd import FileSystem, each_file_system, populated
from tests.live.tracked import NAME, Mirror, Tracked, Tracker, pages
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.sources.uffd import UffdAsync
from tracker.warm import warm_up

pytestmark = pytest.mark.live


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    warm_up()


def source(tracker: Tracker) -> UffdAsync:
    assert isinstance(tracker.uffd, UffdAsync)
    return tracker.uffd


def collect(tracker: Tracker, leave: Sequence[int] = ()) -> list[int]:
    """Numbers of the pages that were written; those in ``leave`` are left unprotected."""
    written = source(tracker).scan()
    of_all = written[NAME]
    left = of_all & DirtyBitmap.from_pages(of_all.npages, list(leave))
    source(tracker).protect(written, PageSet(written.blocks, {NAME: left}))
    return list(pages(of_all).tolist())


def faults(child: Tracked) -> int:
    """Page faults of the process that needed no disk."""
    return int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[7])


@each_file_system
def test_what_is_left_is_reported_until_it_is_not_left(
    file_system: FileSystem, npages: int, page_size: int
) -> None:
    with populated(file_system, npages, page_size) as (child, tracker):
        child.store(2, 4)
        assert collect(tracker, [2, 3, 9]) == [2, 3, 4, 5]
        assert collect(tracker, [2, 3]) == [2, 3]
        child.store(4)
        assert collect(tracker, [2]) == [2, 3, 4]
        assert collect(tracker, [2]) == [2]
        assert collect(tracker) == [2]
        assert collect(tracker) == []
        child.store(2)
        assert collect(tracker) == [2]


def test_a_page_that_is_left_costs_its_writer_no_fault() -> None:
    n = 500
    with populated() as (child, tracker):
        for leave, expected in ((range(0), n), (range(n), 0)):
            child.store(0, n)
            assert len(collect(tracker, leave)) == n
            before = faults(child)
            child.store(0, n)
            assert expected <= faults(child) - before <= expected + 20


def test_pages_that_alternate_with_too_many_others_are_all_protected() -> None:
    with populated(npages=8192) as (child, tracker):
        child.store(0, 8192)
        every_second = range(0, 8192, 2)
        assert len(collect(tracker, every_second)) == 8192
        assert len(child.protected()) == 8192
        assert collect(tracker) == []
        child.store(0, 4096, 2)
        assert len(collect(tracker, every_second)) == 4096
        assert len(child.protected()) == 8192 - 4096


@each_file_system
@pytest.mark.parametrize("owed", [True, False])
def test_no_increment_is_lost_if_what_was_left_is_sent_in_the_end(
    file_system: FileSystem, npages: int, page_size: int, owed: bool
) -> None:
    """While all pages are written all the time, a changing third of them is left."""
    with populated(file_system, npages, page_size) as (child, tracker):
        mirror = Mirror(child)
        mirror.take(DirtyBitmap.full(npages), tracker.data)
        child.hammer("add", 3)
        waiting = DirtyBitmap.empty(npages)
        deadline, number = time.monotonic() + 1.0, 0
        while time.monotonic() < deadline or not waiting.any():
            third = DirtyBitmap.empty(npages)
            at = number % 3 * (npages // 3)
            third.set_range(at, at + npages // 3)
            written = source(tracker).scan()
            left = written[NAME] & third
            source(tracker).protect(written, PageSet(written.blocks, {NAME: left}))
            tracker.holes.collect(written)
            dirty = written[NAME] | waiting
            mirror.take(dirty - left, tracker.data)
            waiting, number = left, number + 1
        assert number >= 3
        assert child.rest() > 0
        last = tracker.collect() | waiting
        mirror.take(last if owed else last - waiting, tracker.data)
        assert (mirror.differing() == []) is owed
