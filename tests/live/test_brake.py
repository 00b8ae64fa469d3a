"""Spans of memory handed from one tracker to the other, and writers that wait there."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import pytest

from tests.live.tracked import (
    HUGE,
    NAME,
    PAGE,
    Mirror,
    Tracked,
    Tracker,
    hugetlbfs,
    pages,
    tmpfs,
    tracked,
    tracking,
)
from tests.pagesets import page_set
from tests.processes import fault_servers, is_running
from tests.tracker.targets import injectors, wait_until
from tracker.answered import uffdsync
from tracker.answered.brake import Brake
from tracker.answered.uffdsync import UffdSync
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.errors import NotTracking, SourceError
from tracker.inject import acquire as inject
from tracker.memory.ram import RamBlock
from tracker.sources.uffd import UffdAsync
from tracker.warm import warm_up

pytestmark = pytest.mark.live

LONGEST_MS = 10.0


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    warm_up()


class Braked:
    """Both trackers as one, as :class:`migrator.tracking.sources.Sources` asks them."""

    name = "uffd"
    exact = True

    def __init__(self, pid: int, blocks: Sequence[RamBlock]) -> None:
        self.rest = UffdAsync(pid, blocks)
        self.brake = Brake(pid, blocks, self.rest)

    def start(self) -> None:
        self.rest.start()

    def collect(self) -> PageSet:
        return self.brake.collect() | self.rest.collect()

    def stop(self) -> None:
        self.brake.stop()
        self.rest.stop()


def brake_of(tracker: Tracker) -> Brake:
    assert isinstance(tracker.uffd, Braked)
    return tracker.uffd.brake


def spans(npages: int, *ranges: tuple[int, int]) -> PageSet:
    bitmap = DirtyBitmap.empty(npages)
    for first, last in ranges:
        bitmap.set_range(first, last)
    return page_set({NAME: bitmap})


def written(tracker: Tracker) -> list[int]:
    return list(pages(tracker.uffd.collect()[NAME]).tolist())


def synchronised(child: Tracked, tracker: Tracker) -> Mirror:
    mirror = Mirror(child)
    tracker.collect()
    mirror.take(DirtyBitmap.full(child.block.npages), tracker.data)
    return mirror


# --- nothing is lost ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file_system", "npages", "page_size"),
    [pytest.param(tmpfs, 8100, PAGE, id="tmpfs"), pytest.param(hugetlbfs, 12, HUGE, id="huge")],
)
def test_handing_over_back_and_forth_loses_no_increment(
    file_system: Callable[[], AbstractContextManager[str]], npages: int, page_size: int
) -> None:
    chance = random.Random(1)
    with tracked(file_system, npages, page_size) as child:
        child.hammer("add", 2)
        with tracking(child, Braked) as tracker:
            mirror = Mirror(child)
            mirror.take(DirtyBitmap.full(npages), tracker.data)
            brake = brake_of(tracker)
            for _ in range(5):
                edges = sorted(chance.sample(range(npages + 1), 6))
                ranges = list(zip(edges[::2], edges[1::2], strict=True))
                brake.put_on(spans(npages, *ranges))
                brake.slow(chance.choice([0, 50, 90]), LONGEST_MS)
                for _ in range(chance.randrange(3)):
                    mirror.take(tracker.collect(), tracker.data)
                if chance.random() < 0.5:
                    brake.take_off()
            total = child.rest()
            mirror.take(tracker.collect(), tracker.data)
            assert mirror.differing() == []
            assert not tracker.collect().any()
    assert int(mirror.copy.view(np.uint64).sum()) == total > 0


def differs_after_writes_between(
    monkeypatch: pytest.MonkeyPatch, *, to_brake: bool, counted: bool
) -> bool:
    """Write while nobody looks, in the middle of handing over; tell whether that is lost."""
    npages = 512
    with tracked(npages=npages) as child, tracking(child, Braked) as tracker:
        child.store(0, npages)
        brake = brake_of(tracker)
        if not to_brake:
            brake.put_on(spans(npages, (100, 200)))
        mirror = synchronised(child, tracker)
        if not counted:
            monkeypatch.setattr(brake, "_count_as_written", lambda: None)
        owner = UffdSync if to_brake else UffdAsync
        begins = getattr(owner, "start" if to_brake else "take_back")

        def late(*arguments: object) -> None:
            child.store(150)
            begins(*arguments)

        monkeypatch.setattr(owner, begins.__name__, late)
        if to_brake:
            brake.put_on(spans(npages, (100, 200)))
        else:
            brake.take_off()
        mirror.take(tracker.collect(), tracker.data)
        child.store(151)
        mirror.take(tracker.collect(), tracker.data)
        return mirror.differing() != []


@pytest.mark.parametrize("to_brake", [True, False])
def test_what_is_handed_over_counts_as_written(
    monkeypatch: pytest.MonkeyPatch, *, to_brake: bool
) -> None:
    with monkeypatch.context() as patch:
        assert differs_after_writes_between(patch, to_brake=to_brake, counted=False)
    assert not differs_after_writes_between(monkeypatch, to_brake=to_brake, counted=True)


def test_what_was_written_before_the_handing_over_is_reported() -> None:
    with tracked(npages=512) as child, tracking(child, Braked) as tracker:
        child.store(0, 512)
        tracker.collect()
        child.store(150)
        child.store(300)
        brake_of(tracker).put_on(spans(512, (100, 200)))
        assert written(tracker) == [*range(100, 200), 300]
        assert written(tracker) == []


def test_each_page_is_reported_by_one_of_them() -> None:
    with tracked(npages=2048) as child, tracking(child, Braked) as tracker:
        child.store(0, 2048)
        brake = brake_of(tracker)
        brake.put_on(spans(2048, (0, 10), (64, 65), (100, 300), (2000, 2048)))
        tracker.collect()
        pattern = [0, 9, 10, 63, 64, 65, 99, 100, 299, 300, 1999, 2000, 2047]
        for page in pattern:
            child.store(page)
        assert written(tracker) == pattern
        brake.take_off()
        tracker.collect()
        for page in pattern:
            child.store(page)
        assert written(tracker) == pattern


def test_what_may_be_left_unprotected_is_never_under_the_brake() -> None:
    with tracked(npages=512) as child, tracking(child, Braked) as tracker:
        child.store(0, 512)
        assert isinstance(tracker.uffd, Braked)
        rest, brake = tracker.uffd.rest, tracker.uffd.brake
        brake.put_on(spans(512, (100, 200)))
        tracker.collect()
        child.store(0, 512)
        scanned = rest.scan()
        rest.protect(scanned, spans(512, (50, 250)))
        found = scanned[NAME]
        assert pages(found).tolist() == [*range(100), *range(200, 512)]
        assert len(pages(brake.collect()[NAME])) == 100
        assert written(tracker) == [*range(50, 100), *range(200, 250)]


def test_the_server_in_plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # which the server inherits
    with tracked(npages=512) as child, tracking(child, Braked) as tracker:
        mirror = synchronised(child, tracker)
        brake = brake_of(tracker)
        brake.put_on(spans(512, (0, 300)))
        child.hammer("add", 2)
        for percent in (0, 90, 50, 0):
            brake.slow(percent, LONGEST_MS)
            for _ in range(3):
                mirror.take(tracker.collect(), tracker.data)
        assert child.rest() > 0
        mirror.take(tracker.collect(), tracker.data)
        assert mirror.differing() == []


# --- who waits, and for how long ------------------------------------------------------------------


def increments_per_s(child: Tracked, tracker: Tracker, seconds: float) -> tuple[float, float]:
    """How fast writers add, and readers read, while all is collected now and then."""
    tracker.collect()
    started, before = time.monotonic(), child.contents().view(np.uint64).sum()
    looked = child.looked()
    while time.monotonic() - started < seconds:
        time.sleep(0.02)
        tracker.collect()
    spent_s = time.monotonic() - started
    added = child.contents().view(np.uint64).sum() - before
    return float(added) / spent_s, (child.looked() - looked) / spent_s


def test_writers_are_slowed_and_readers_are_not() -> None:
    with tracked(npages=4096) as child, tracking(child, Braked) as tracker:
        child.store(0, 4096)
        child.hammer("add", 1)
        child.hammer("look", 1)
        brake = brake_of(tracker)
        brake.put_on(spans(4096, (0, 4096)))
        free, read = increments_per_s(child, tracker, 1.0)
        brake.slow(95, LONGEST_MS)
        slowed, read_meanwhile = increments_per_s(child, tracker, 1.0)
        brake.slow(0, 0)
        free_again, _ = increments_per_s(child, tracker, 1.0)
        child.rest()
    assert slowed < free / 3
    assert slowed < free_again / 3
    assert read_meanwhile > read / 3  # much, where others use the processor as well


# --- errors, and afterwards -----------------------------------------------------------------------


def server(tracker: Tracker) -> int:
    """The process that answers faults."""
    sync = brake_of(tracker)._sync
    assert sync is not None
    assert sync._server is not None
    return sync._server.pid


def test_spans_that_hold_what_is_hot_are_kept() -> None:
    with tracked(npages=1024) as child, tracking(child, Braked) as tracker:
        brake = brake_of(tracker)
        brake.put_on(spans(1024, (100, 300)))
        pid = server(tracker)
        brake.put_on(spans(1024, (150, 350)))  # three quarters of it
        assert server(tracker) == pid
        brake.put_on(page_set({NAME: DirtyBitmap.empty(1024)}))
        assert server(tracker) == pid
        brake.put_on(spans(1024, (151, 351)))
        assert server(tracker) != pid
        assert not is_running(pid)
        assert pages(brake.spans[NAME]).tolist() == [*range(151, 351)]
        assert written(tracker) == [*range(100, 351)]
        child.store(100)
        child.store(300)
        assert written(tracker) == [100, 300]


def less(pid: int) -> inject.AcquiredUffd:
    return inject.acquire_userfaultfd(pid)._replace(user_mode_only=True)


def test_where_nobody_can_answer_all_is_tracked_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uffdsync, "acquire_userfaultfd", less)
    with tracked(npages=512) as child, tracking(child, Braked) as tracker:
        child.store(0, 512)
        tracker.collect()
        child.store(7)
        brake = brake_of(tracker)
        with pytest.raises(NotTracking, match="for writes of the kernel"):
            brake.put_on(spans(512, (100, 200)))
        assert not brake.spans[NAME].any()
        assert written(tracker) == [7, *range(100, 200)]
        child.store(150)
        child.store(300)
        assert written(tracker) == [150, 300]


def test_a_server_that_is_gone_is_not_clean() -> None:
    with tracked() as child, tracking(child, Braked) as tracker:
        child.hammer("add", 2)
        brake = brake_of(tracker)
        brake.put_on(spans(2048, (0, 1000)))
        brake.slow(90, LONGEST_MS)
        os.kill(server(tracker), signal.SIGKILL)
        with pytest.raises(SourceError, match="nobody answers"):
            tracker.uffd.collect()
        with pytest.raises(SourceError):
            tracker.uffd.collect()
        assert child.rest() > 0


def test_nothing_is_left_when_it_has_stopped() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with tracked() as child, tracking(child, Braked) as tracker:
        child.hammer("add", 2)
        brake_of(tracker).put_on(spans(2048, (0, 1000), (1500, 1600)))
        brake_of(tracker).slow(99, LONGEST_MS)
        pid = server(tracker)
        tracker.uffd.stop()
        assert not is_running(pid)
        assert child.traces() == []  # of the mapping, which is one again
        assert child.protected().tolist() == []
        assert child.rest() > 0
        tracker.uffd.stop()
    assert set(os.listdir("/proc/self/fd")) == before


def test_nobody_waits_when_the_tracker_is_killed() -> None:
    others = fault_servers()

    def track() -> None:
        with tracking(child, Braked) as tracker:
            brake_of(tracker).put_on(spans(2048, (0, 2048)))
            brake_of(tracker).slow(99, LONGEST_MS)
            while True:
                tracker.collect()

    with tracked() as child:
        child.hammer("add", 2)
        for seconds in (0.0, 0.3):
            process = multiprocessing.get_context("fork").Process(target=track)
            process.start()
            wait_until(lambda: bool(fault_servers() - others))
            wait_until(lambda: len(child.protected()) > 0)
            time.sleep(seconds)
            process.kill()
            process.join()
            wait_until(lambda: not injectors(child.pid))
            wait_until(lambda: not fault_servers() - others and not child.traces())
            assert child.protected().tolist() == []
        assert child.rest() > 0
