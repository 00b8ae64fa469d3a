"""The order of the phases, and that their times add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.report.phases import DOWNTIME, IllegalMove, Phase, Phases

FORWARD: list[Phase] = [phase for phase in Phase if phase is not Phase.ROLLBACK]


def at(phase: Phase) -> Phases:
    phases = Phases()
    for earlier in FORWARD[1 : FORWARD.index(phase) + 1]:
        phases.enter(earlier)
    assert phases.current is phase
    return phases


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@given(st.sets(st.sampled_from(FORWARD[1:])))
def test_forward_with_any_phases_left_out(chosen: set[Phase]) -> None:
    phases = Phases()
    for phase in FORWARD:
        if phase in chosen:
            phases.enter(phase)
    phases.end()
    assert list(phases.milliseconds()) == [p.value for p in FORWARD if p in chosen | {FORWARD[0]}]


@pytest.mark.parametrize("now", FORWARD)
def test_never_back_and_never_twice(now: Phase) -> None:
    phases = at(now)
    for earlier in FORWARD[: FORWARD.index(now) + 1]:
        with pytest.raises(IllegalMove, match=now.value):
            phases.enter(earlier)
        assert phases.current is now


@pytest.mark.parametrize("now", FORWARD)
def test_rollback_from_every_phase_but_the_last(now: Phase) -> None:
    phases = at(now)
    if now is Phase.FINISH:
        with pytest.raises(IllegalMove, match="the destination runs"):
            phases.enter(Phase.ROLLBACK)
        assert phases.current is Phase.FINISH
        return
    phases.enter(Phase.ROLLBACK)
    for phase in Phase:
        with pytest.raises(IllegalMove):
            phases.enter(phase)


def test_the_watcher_is_told_of_each_phase_once_it_is_there() -> None:
    seen = []
    phases = Phases(lambda phase: seen.append((phase, phases.current)))
    phases.enter(Phase.ATTACH)
    phases.enter(Phase.ROLLBACK)
    assert seen == [(Phase.ATTACH, Phase.ATTACH), (Phase.ROLLBACK, Phase.ROLLBACK)]


def test_times_add_up(clock: Clock) -> None:
    phases = Phases(clock=clock)
    for seconds, phase in enumerate(FORWARD[1:], start=1):
        clock.now += seconds
        phases.enter(phase)
    clock.now += 0.5
    assert phases.elapsed_s == pytest.approx(sum(range(len(FORWARD))) + 0.5)
    phases.end()
    spent = phases.milliseconds()
    assert spent["preflight"] == pytest.approx(1000)
    assert spent["attach"] == pytest.approx(2000)
    assert spent["finish"] == pytest.approx(500)
    assert sum(spent.values()) == pytest.approx(phases.total_ms)


def test_a_phase_that_began_when_an_event_says(clock: Clock) -> None:
    phases = Phases(clock=clock)
    clock.now += 3
    phases.enter(Phase.STOP, at=clock.now - 2)
    phases.end()
    assert phases.milliseconds() == {"preflight": pytest.approx(1000), "stop": pytest.approx(2000)}


def test_an_event_from_before_the_present_phase_is_clamped(clock: Clock) -> None:
    phases = Phases(clock=clock)
    clock.now += 3
    phases.enter(Phase.SWITCHOVER)
    clock.now += 2
    phases.enter(Phase.STOP, at=clock.now - 4)
    phases.end()
    assert phases.milliseconds() == {
        "preflight": pytest.approx(3000),
        "switchover": pytest.approx(0),
        "stop": pytest.approx(2000),
    }


def test_an_event_from_the_future_makes_no_time_negative(clock: Clock) -> None:
    """QEMU's clock is the host's, but time stamps are rounded."""
    phases = Phases(clock=clock)
    clock.now += 3
    phases.enter(Phase.STOP, at=clock.now + 0.001)
    phases.enter(Phase.FINAL_COLLECT)
    phases.end()
    assert min(phases.milliseconds().values()) >= 0
    assert sum(phases.milliseconds().values()) == pytest.approx(phases.total_ms)


@given(st.lists(st.tuples(st.floats(0, 10), st.none() | st.floats(-20, 20)), max_size=14))
def test_they_always_add_up(moves: list[tuple[float, float | None]]) -> None:
    clock = Clock()
    phases = Phases(clock=clock)
    for (passed, event), phase in zip(moves, FORWARD[1:], strict=False):
        clock.now += passed
        phases.enter(phase, at=None if event is None else clock.now + event)
    phases.end()
    spent = phases.milliseconds()
    assert min(spent.values()) >= 0
    assert sum(spent.values()) == pytest.approx(phases.total_ms)


def test_what_downtime_is_made_of() -> None:
    """Everything from the stop to the destination's running, but comparing."""
    between = FORWARD[FORWARD.index(Phase.STOP) : FORWARD.index(Phase.FINISH)]
    assert list(DOWNTIME) == [phase for phase in between if phase is not Phase.VERIFY]
