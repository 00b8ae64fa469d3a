"""Who waits for how long: against a plain model, and bounds that hold whatever happens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracker.answered import pacing
from tracker.answered.pacing import ADDRESS, LEAST_NS, NEVER, OWED, THREAD, Writers

MS = 1_000_000
LONGEST_NS = 10 * MS
PAGE = 4096


def nobody(rows: int = 4) -> Writers:
    return np.zeros((rows, 5), np.int64)


def test_a_writer_that_is_not_known_does_not_wait() -> None:
    writers = nobody()
    assert not pacing.must_wait(writers, 7, PAGE, 5 * MS, 99, LONGEST_NS)
    assert pacing.next_ns(writers, 5 * MS, LONGEST_NS) == NEVER


def test_a_writer_waits_for_its_share() -> None:
    writers = nobody()
    pacing.must_wait(writers, 7, PAGE, 0, 75, LONGEST_NS)
    assert pacing.must_wait(writers, 7, PAGE, MS, 75, LONGEST_NS)
    assert pacing.next_ns(writers, MS, LONGEST_NS) == 3 * MS
    assert pacing.next_ns(writers, 3 * MS, LONGEST_NS) == MS
    assert pacing.next_ns(writers, 9 * MS, LONGEST_NS) == 0
    row = pacing.find(writers, 7)
    pacing.let_go(writers, row, 4 * MS, LONGEST_NS)
    assert writers[row, OWED] == 0
    assert pacing.next_ns(writers, 4 * MS, LONGEST_NS) == NEVER


def test_what_was_waited_in_excess_was_paid_in_advance() -> None:
    writers = nobody()
    pacing.must_wait(writers, 7, PAGE, 0, 50, LONGEST_NS)
    assert pacing.must_wait(writers, 7, PAGE, MS, 50, LONGEST_NS)
    pacing.let_go(writers, pacing.find(writers, 7), 4 * MS, LONGEST_NS)  # 2 ms too late
    assert not pacing.must_wait(writers, 7, PAGE, 6 * MS, 50, LONGEST_NS)
    assert pacing.must_wait(writers, 7, PAGE, 7 * MS, 50, LONGEST_NS)
    assert pacing.next_ns(writers, 7 * MS, LONGEST_NS) == MS


def test_short_waits_are_put_together() -> None:
    writers = nobody()
    pacing.must_wait(writers, 7, PAGE, 0, 50, LONGEST_NS)
    steps = [
        pacing.must_wait(writers, 7, PAGE, (n + 1) * LEAST_NS // 4, 50, LONGEST_NS)
        for n in range(4)
    ]
    assert steps == [False, False, False, True]


def test_a_signal_changes_nothing_of_a_wait() -> None:
    writers = nobody()
    pacing.must_wait(writers, 7, PAGE, 0, 90, LONGEST_NS)
    assert pacing.must_wait(writers, 7, PAGE, MS, 90, LONGEST_NS)
    assert pacing.must_wait(writers, 7, 2 * PAGE, 2 * MS, 90, LONGEST_NS)
    assert pacing.next_ns(writers, 2 * MS, LONGEST_NS) == 8 * MS
    assert writers[pacing.find(writers, 7), ADDRESS] == 2 * PAGE


def test_a_shorter_limit_holds_for_those_that_wait_already() -> None:
    writers = nobody()
    pacing.must_wait(writers, 7, PAGE, 0, 99, LONGEST_NS)
    assert pacing.must_wait(writers, 7, PAGE, MS, 99, LONGEST_NS)
    assert pacing.next_ns(writers, MS, LONGEST_NS) == LONGEST_NS
    assert pacing.next_ns(writers, MS, MS) == MS
    assert pacing.next_ns(writers, MS, 0) == 0


def test_more_writers_than_are_known() -> None:
    writers = nobody(2)
    for thread in (1, 2):
        pacing.must_wait(writers, thread, PAGE, thread, 90, LONGEST_NS)
    pacing.must_wait(writers, 3, PAGE, 3, 90, LONGEST_NS)
    assert set(writers[:, THREAD].tolist()) == {2, 3}  # the one that wrote last longest ago is not
    assert pacing.must_wait(writers, 2, PAGE, MS, 90, LONGEST_NS)
    assert pacing.must_wait(writers, 3, PAGE, MS, 90, LONGEST_NS)
    assert not pacing.must_wait(writers, 4, PAGE, MS, 90, LONGEST_NS)  # both wait: it is let go
    assert set(writers[:, THREAD].tolist()) == {2, 3}


class Model:
    """The same for one writer, in numbers without end."""

    def __init__(self, percent: int, longest_ns: int) -> None:
        self.percent, self.longest_ns = percent, longest_ns
        self.since, self.owed, self.known = 0, 0, False

    def fault(self, now: int) -> int:
        """For how long it waits."""
        if not self.known:
            self.known, self.since = True, now
        ran = now - self.since
        more = ran * self.percent // (100 - self.percent)
        self.owed = min(self.owed + more, self.longest_ns)
        self.since = now
        return self.owed if self.owed >= LEAST_NS else 0

    def let_go(self, now: int) -> None:
        self.owed = max(self.owed - (now - self.since), -self.longest_ns)
        self.since = now


@given(
    st.lists(st.tuples(st.integers(0, 30 * MS), st.integers(0, 5 * MS)), max_size=60),
    st.integers(0, 99),
    st.sampled_from([0, MS, LONGEST_NS]),
)
def test_as_the_model_and_within_its_share(
    lives: list[tuple[int, int]], percent: int, longest_ns: int
) -> None:
    """:param lives: how long it runs before a fault, and how much too late it is let go."""
    writers, model = nobody(), Model(percent, longest_ns)
    now = begun = 1
    waited = latest = 0
    for ran, late in lives:
        now += ran
        expected = model.fault(now)
        assert pacing.must_wait(writers, 9, PAGE, now, percent, longest_ns) == (expected > 0)
        if expected:
            assert pacing.next_ns(writers, now, longest_ns) == expected <= longest_ns
            now += expected + late
            waited += expected + late
            latest += max(late - longest_ns, 0)
            pacing.let_go(writers, pacing.find(writers, 9), now, longest_ns)
            model.let_go(now)
            assert writers[0, OWED] == model.owed
            # but for the last time, and for what was too late for long
            assert waited - late - latest <= percent / 100 * (now - begun) + 1


@pytest.mark.parametrize("percent", [10, 50, 90, 99])
def test_a_tight_writer_keeps_the_rest_of_its_time(percent: int) -> None:
    writers = nobody()
    now = ran = 0
    while now < 1000 * MS:
        now, ran = now + 10_000, ran + 10_000  # 10 us
        if pacing.must_wait(writers, 9, PAGE, now, percent, LONGEST_NS):
            now += pacing.next_ns(writers, now, LONGEST_NS)
            pacing.let_go(writers, pacing.find(writers, 9), now, LONGEST_NS)
    assert ran / now == pytest.approx(1 - percent / 100, rel=0.1)
