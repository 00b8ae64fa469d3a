"""How much writers are slowed: tables, and whole migrations of simulated guests."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrator.choices import PolicyName
from migrator.policy.adaptive import Adaptive
from migrator.policy.downtime import Fixed
from migrator.policy.judge import Decision, Limits, Observation, Verdict
from migrator.policy.policies import policy_of
from migrator.policy.throttling import AUTO, Throttling, slowed_alike, slowed_for_s
from tests.migrator.simulated import PAGE, Outcome, Walker, simulate
from tests.profiles import examples

MB = 1_000_000
LIMITS = Limits(downtime_ms=100.0, max_rounds=60, max_seconds=60.0)
FIXED = Fixed(prepare_ms=40.0, stop_ms=20.0, device_state_ms=0.0, load_ms=0.0, resume_ms=0.0)
JUDGE = Adaptive(LIMITS, FIXED)


def rounds(dirty: list[int], percents: list[int], every_s: float = 1.0) -> list[Observation]:
    """One round a second, at 1 MB/ms."""
    return [
        Observation(
            round=n + 1,
            elapsed_s=1 + n * every_s,
            dirty_bytes=nbytes,
            bytes_per_s=1000.0 * MB,
            interval_s=every_s,
            gap_s=every_s,
            window_bytes=nbytes,
            window_s=every_s,
            throttle_percent=percent,
        )
        for n, (nbytes, percent) in enumerate(zip(dirty, percents, strict=True))
    ]


def next_percent(
    observed: list[Observation], most: int = AUTO, limits: Limits = LIMITS, **changes: object
) -> int:
    *before, seen = observed
    seen = replace(seen, **changes)  # type: ignore[arg-type]
    decision = replace(JUDGE, limits=limits).decide(seen, slowed_alike(seen, before))
    return Throttling(most).percent(limits, seen, before, decision)


# -- when -----------------------------------------------------------------------------------------


def test_what_does_not_fall_is_slowed() -> None:
    assert next_percent(rounds([500 * MB, 500 * MB], [0, 0])) == 75


def test_one_round_tells_nothing() -> None:
    assert next_percent(rounds([500 * MB], [0])) == 0


def test_what_falls_is_waited_for() -> None:
    assert next_percent(rounds([500 * MB, 390 * MB], [0, 0])) == 0
    assert next_percent(rounds([500 * MB, 410 * MB], [0, 0])) == 75


def test_what_fits_is_not_slowed() -> None:
    assert next_percent(rounds([70 * MB, 70 * MB], [0, 0])) == 0


def test_rounds_that_are_short_have_to_be_several() -> None:
    assert next_percent(rounds([500 * MB] * 3, [0] * 3, every_s=0.1)) == 0
    assert next_percent(rounds([500 * MB] * 4, [0] * 4, every_s=0.1)) == 75


def test_what_was_handed_over_tells_nothing() -> None:
    observed = rounds([500 * MB] * 4, [0, 0, 75, 75])
    observed[2] = replace(observed[2], handed_over=True)
    assert next_percent(observed[:3]) == 75
    assert next_percent(observed) > 75


@pytest.mark.parametrize("over", [{"round": 60}, {"elapsed_s": 61.0}])
def test_at_a_limit_it_is_too_late(over: dict[str, Any]) -> None:
    assert next_percent(rounds([500 * MB] * 3, [0] * 3), **over) == 0


@pytest.mark.parametrize("most", [0, 40, 75])
def test_never_more_than_is_allowed(most: int) -> None:
    assert next_percent(rounds([500 * MB] * 3, [0] * 3), most) == most
    assert next_percent(rounds([500 * MB] * 3, [most] * 3), most) == most


@pytest.mark.parametrize("most", [-1, 100])
def test_what_cannot_be_allowed(most: int) -> None:
    with pytest.raises(ValueError, match=f"{most} %"):
        Throttling(most)


# -- how much -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dirty", "percent", "expected"),
    [
        (5000 * MB, 0, 75),  # not more than that at once
        (240 * MB, 0, 67),  # a third of it would fit
        (100 * MB, 0, 50),  # not less than that
        (5000 * MB, 75, 94),
        (5000 * MB, 94, 98),
        (5000 * MB, 98, 99),
    ],
)
def test_a_step_is_as_large_as_was_measured(dirty: int, percent: int, expected: int) -> None:
    assert next_percent(rounds([dirty] * 3, [percent] * 3)) == expected


def test_since_when() -> None:
    *before, seen = rounds([MB] * 5, [0, 0, 75, 75, 75])
    assert [o.round for o in slowed_alike(seen, before)] == [3, 4]
    assert slowed_for_s(seen, before) == 3.0  # it was decided in round 2
    assert slowed_for_s(before[1], before[:1]) == 1.0
    assert slowed_for_s(before[0], []) == 0.0


def test_it_is_given_up_only_if_that_did_not_help_either() -> None:
    """Ten rounds without a gain: at the last step of all, not since the beginning."""
    observed = rounds([500 * MB] * 20, [0] * 5 + [AUTO] * 15)
    verdicts = [
        JUDGE.decide(seen, slowed_alike(seen, observed[:n])).verdict
        for n, seen in enumerate(observed)
    ]
    assert verdicts.index(Verdict.ABORT) == 15


# -- whole migrations -----------------------------------------------------------------------------

NPAGES = 64_000
LINK = 16_000.0 * PAGE
"""The copy of everything takes 4 s."""
ROOMY = Limits(downtime_ms=300.0, max_rounds=60, max_seconds=300.0)


def moved(
    walkers: list[Walker],
    most: int,
    policy: PolicyName = "adaptive",
    limits: Limits = ROOMY,
    speed: float = 1.0,
) -> Outcome:
    return simulate(
        policy_of(policy, limits, Fixed()), walkers, NPAGES, LINK * speed, Throttling(most)
    )


def fits(decision: Decision) -> bool:
    return decision.verdict is Verdict.SWITCH_OVER and "fits" in decision.reason


@pytest.mark.parametrize("policy", ["send-all", "defer-hot", "adaptive"])
@pytest.mark.parametrize("times", [1.5, 5.0, 20.0])
def test_a_writer_that_is_too_fast_is_moved_if_it_may_be_slowed(
    policy: PolicyName, times: float
) -> None:
    walkers = [Walker(0, 32_000, times * LINK / PAGE)]
    never, auto = moved(walkers, 0, policy), moved(walkers, AUTO, policy)
    assert never.decision.verdict is Verdict.ABORT
    assert "does not converge" in never.decision.reason
    assert fits(auto.decision)
    assert auto.rounds < never.rounds or policy == "adaptive"
    assert max(auto.throttle_percents) > 0


def test_one_that_is_too_fast_for_what_is_allowed_is_given_up() -> None:
    outcome = moved([Walker(0, 32_000, 20 * LINK / PAGE)], 50)
    assert outcome.decision.verdict is Verdict.ABORT
    assert max(outcome.throttle_percents) == 50


@pytest.mark.parametrize("pages_per_s", [10.0, 1e3, 5e3])
def test_one_that_is_not_too_fast_is_not_slowed(pages_per_s: float) -> None:
    walkers = [Walker(0, 32_000, pages_per_s)]
    assert set(moved(walkers, AUTO).throttle_percents) == {0}
    assert moved(walkers, AUTO).decision == moved(walkers, 0).decision


walkers = st.builds(
    Walker,
    st.sampled_from([0, 20_000]),
    st.integers(1, 40_000),
    st.sampled_from([1e3, 1e4, 1e5, 1e6]),
    st.sampled_from([0.5, 5.0, 1e9]),
)


@settings(deadline=None, max_examples=examples(150))
@given(
    st.lists(walkers, min_size=1, max_size=3),
    st.sampled_from([0, 30, 90, AUTO]),
    st.sampled_from([100.0, 300.0]),
    st.sampled_from([0.3, 1.0, 10.0]),
)
def test_it_ends_and_whom_it_slows_is_moved_if_it_was_before(
    guests: list[Walker], most: int, downtime_ms: float, speed: float
) -> None:
    limits = replace(ROOMY, downtime_ms=downtime_ms, max_seconds=1000.0)
    never = moved(guests, 0, limits=limits, speed=speed)
    outcome = moved(guests, most, limits=limits, speed=speed)
    assert outcome.rounds <= limits.max_rounds
    assert max(outcome.throttle_percents) <= most
    assert all(first <= then for first, then in pairwise(outcome.throttle_percents))
    # one that comes to rest by itself takes longer to, if it is slowed
    if fits(never.decision) and all(guest.until_s > limits.max_seconds for guest in guests):
        assert fits(outcome.decision)
