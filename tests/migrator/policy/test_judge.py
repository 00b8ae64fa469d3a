"""Decisions, without anything to decide about."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.choices import OnLimit
from migrator.policy.downtime import Fixed
from migrator.policy.judge import Decision, Limits, Observation, SendAll, Verdict

MB = 1_000_000
LIMITS = Limits(downtime_ms=100.0, max_rounds=10, max_seconds=60.0)
FIXED = Fixed(stop_ms=20.0, device_state_ms=0.0, load_ms=0.0, resume_ms=0.0)
POLICY = SendAll(LIMITS, FIXED)
SEEN = Observation(round=1, elapsed_s=1.0, dirty_bytes=80 * MB, bytes_per_s=1000.0 * MB)


def test_what_fits_switches_over() -> None:
    assert POLICY.decide(SEEN) == Decision(
        Verdict.SWITCH_OVER, 100.0, "expected downtime 100 ms fits 100 ms"
    )


def test_what_does_not_fit_goes_on() -> None:
    decision = POLICY.decide(replace(SEEN, dirty_bytes=80 * MB + 1))
    assert decision.verdict is Verdict.CONTINUE
    assert decision.expected_downtime_ms > 100.0


def test_a_faster_link_makes_it_fit() -> None:
    seen = replace(SEEN, dirty_bytes=160 * MB)
    assert POLICY.decide(seen).verdict is Verdict.CONTINUE
    assert POLICY.decide(replace(seen, bytes_per_s=2000.0 * MB)).verdict is Verdict.SWITCH_OVER


def test_a_limit_below_the_fixed_part_never_fits() -> None:
    policy = SendAll(replace(LIMITS, downtime_ms=19.9), FIXED)
    assert policy.decide(replace(SEEN, dirty_bytes=0)).verdict is Verdict.CONTINUE


def test_nothing_dirty_fits_however_little_is_known_of_the_rate() -> None:
    seen = replace(SEEN, dirty_bytes=0, bytes_per_s=0.0)
    assert POLICY.decide(seen).verdict is Verdict.SWITCH_OVER


def test_what_is_to_be_compared_counts_too() -> None:
    seen = replace(SEEN, dirty_bytes=0, compare_bytes=160 * MB, compare_bytes_per_s=2000.0 * MB)
    assert POLICY.decide(seen) == Decision(
        Verdict.SWITCH_OVER, 100.0, "expected downtime 100 ms fits 100 ms"
    )
    assert POLICY.decide(replace(seen, dirty_bytes=MB)).verdict is Verdict.CONTINUE


TOO_MUCH = replace(SEEN, dirty_bytes=1000 * MB)


@pytest.mark.parametrize(
    ("over", "said"), [({"round": 10}, "10 rounds"), ({"elapsed_s": 60.0}, "60 s")]
)
@pytest.mark.parametrize(
    ("on_limit", "verdict"), [("abort", Verdict.ABORT), ("force", Verdict.SWITCH_OVER)]
)
def test_at_a_limit(over: dict[str, float], said: str, on_limit: OnLimit, verdict: Verdict) -> None:
    policy = SendAll(replace(LIMITS, on_limit=on_limit))
    decision = policy.decide(replace(TOO_MUCH, **over))  # type: ignore[arg-type]
    assert decision.verdict is verdict
    assert said in decision.reason
    assert f"{decision.expected_downtime_ms:.0f} ms" in decision.reason


@pytest.mark.parametrize("under", [{"round": 9}, {"elapsed_s": 59.9}])
def test_just_below_a_limit(under: dict[str, float]) -> None:
    assert POLICY.decide(replace(TOO_MUCH, **under)).verdict is Verdict.CONTINUE  # type: ignore[arg-type]


def test_what_fits_at_a_limit_is_not_given_up() -> None:
    assert POLICY.decide(replace(SEEN, round=1000)).verdict is Verdict.SWITCH_OVER


# -- what holds for all of them -----------------------------------------------------------------

limits = st.builds(
    Limits,
    downtime_ms=st.floats(0.1, 1e5),
    max_rounds=st.integers(1, 100),
    max_seconds=st.floats(0.1, 1e4),
    on_limit=st.sampled_from(["abort", "force"]),
)
observations = st.builds(
    Observation,
    round=st.integers(1, 200),
    elapsed_s=st.floats(0, 2e4),
    dirty_bytes=st.integers(0, 1 << 45),
    bytes_per_s=st.floats(0, 1e12),
)

_FITS, _GOES_ON, _GIVES_UP = range(3)


def rank(limits: Limits, seen: Observation) -> int:
    """How bad a decision is: it fits, it does not yet, it never will."""
    decision = SendAll(limits).decide(seen)
    if decision.verdict is Verdict.CONTINUE:
        return _GOES_ON
    if decision.verdict is Verdict.SWITCH_OVER and "forced" not in decision.reason:
        return _FITS
    assert (decision.verdict is Verdict.ABORT) == (limits.on_limit == "abort")
    return _GIVES_UP


@given(limits, observations, st.integers(0, 1 << 44))
def test_more_dirty_bytes_never_make_it_better(
    limits: Limits, seen: Observation, more: int
) -> None:
    worse = replace(seen, dirty_bytes=seen.dirty_bytes + more)
    assert rank(limits, worse) >= rank(limits, seen)


@given(limits, observations, st.floats(0, 1e12))
def test_a_higher_rate_never_makes_it_worse(limits: Limits, seen: Observation, more: float) -> None:
    better = replace(seen, bytes_per_s=seen.bytes_per_s + more)
    assert rank(limits, better) <= rank(limits, seen)


@given(limits, observations, st.integers(0, 100), st.floats(0, 1e4))
def test_later_never_makes_it_better(
    limits: Limits, seen: Observation, rounds: int, seconds: float
) -> None:
    later = replace(seen, round=seen.round + rounds, elapsed_s=seen.elapsed_s + seconds)
    assert rank(limits, later) >= rank(limits, seen)


@given(limits, observations)
def test_it_ends_and_says_why(limits: Limits, seen: Observation) -> None:
    """No observation makes it fail, and at the limits it never goes on."""
    decision = SendAll(limits).decide(seen)
    assert decision.reason
    assert math.isfinite(decision.expected_downtime_ms)
    at_limit = replace(seen, round=limits.max_rounds)
    assert SendAll(limits).decide(at_limit).verdict is not Verdict.CONTINUE
