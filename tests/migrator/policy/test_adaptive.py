"""When it is time to switch over: tables, and whole migrations of simulated guests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from migrator.choices import OnLimit
from migrator.policy.adaptive import Adaptive, stalled
from migrator.policy.downtime import Fixed
from migrator.policy.judge import Hot, Limits, Observation, Verdict
from migrator.policy.policies import policy_of
from tests.migrator.simulated import PAGE, Walker, simulate
from tests.profiles import examples

MB = 1_000_000
FIXED = Fixed(prepare_ms=40.0, stop_ms=20.0, device_state_ms=0.0, load_ms=0.0, resume_ms=0.0)
LIMITS = Limits(downtime_ms=100.0, max_rounds=60, max_seconds=60.0)
POLICY = Adaptive(LIMITS, FIXED)
SEEN = Observation(
    round=3,
    elapsed_s=1.0,
    dirty_bytes=40 * MB,
    bytes_per_s=1000.0 * MB,
    interval_s=0.08,
    gap_s=0.08,
    window_bytes=40 * MB,
    window_s=0.08,
)
"""60 ms; nothing waits."""


def falling(interval_s: float, window: int = 40 * MB) -> Observation:
    return replace(SEEN, interval_s=interval_s, window_s=interval_s, window_bytes=window)


# -- under the limit ------------------------------------------------------------------------------


def test_what_still_falls_is_waited_for() -> None:
    decision = POLICY.decide(falling(0.4), [falling(0.8, 70 * MB)])
    assert decision.verdict is Verdict.CONTINUE
    assert "may fall to 24 ms" in decision.reason


def test_what_falls_no_more_is_not() -> None:
    before = [falling(0.4, 41 * MB)]
    assert POLICY.decide(falling(0.4), before).verdict is Verdict.SWITCH_OVER


@pytest.mark.parametrize(
    ("window", "interval_s", "verdict"),
    [
        (0, 0.5, Verdict.SWITCH_OVER),
        (2 * MB, 0.5, Verdict.SWITCH_OVER),  # at most 2 ms are to be gained
        (10 * MB, 0.5, Verdict.CONTINUE),
        (40 * MB, 0.045, Verdict.SWITCH_OVER),  # the guest would write for as long again
    ],
)
def test_the_first_round(window: int, interval_s: float, verdict: Verdict) -> None:
    seen = replace(falling(interval_s, window), round=1, dirty_bytes=window)
    assert POLICY.decide(seen).verdict is verdict


@pytest.mark.parametrize("over", [{"round": 60}, {"elapsed_s": 60.0}])
def test_at_a_limit_what_fits_is_not_waited_for(over: dict[str, Any]) -> None:
    seen = replace(falling(0.5), **over)
    assert POLICY.decide(seen).verdict is Verdict.SWITCH_OVER


def test_what_is_written_until_the_stop_is_expected_too() -> None:
    """However little was written in a short interval."""
    seen = replace(SEEN, dirty_bytes=MB, interval_s=0.001, window_bytes=90 * MB)
    decision = POLICY.decide(seen)
    assert decision.expected_downtime_ms == pytest.approx(110.0)
    assert decision.verdict is Verdict.CONTINUE


# -- what waits -----------------------------------------------------------------------------------

ALL_WAITS = replace(
    SEEN,
    waiting_bytes=40 * MB,
    asked_bytes=40 * MB,
    again_bytes=40 * MB,
    interval_s=0.04,
    gap_s=0.04,
    window_s=0.04,
    later_bytes=40 * MB,
)


@pytest.mark.parametrize(
    "seen",
    [
        ALL_WAITS,
        replace(ALL_WAITS, interval_s=0.055, window_s=0.055),
        replace(ALL_WAITS, again_bytes=20 * MB, interval_s=0.01),  # half of it in a quarter
    ],
)
def test_what_is_sure_to_be_written_again_is_not_sent_once_more(seen: Observation) -> None:
    decision = POLICY.decide(seen)
    assert (decision.verdict, decision.hot) == (Verdict.SWITCH_OVER, Hot.WAIT)


@pytest.mark.parametrize(
    "other",
    [
        replace(ALL_WAITS, again_bytes=37 * MB),
        replace(ALL_WAITS, again_bytes=10 * MB, interval_s=0.02),
        replace(ALL_WAITS, interval_s=0.07),  # of what is written in it, less is until the stop
    ],
)
def test_what_is_not_sure_is_sent(other: Observation) -> None:
    decision = POLICY.decide(other)
    assert (decision.verdict, decision.hot) == (Verdict.SWITCH_OVER, Hot.SEND)


def test_if_nothing_but_what_waits_does_not_fit_it_is_sent_to_see_how_fast_that_is() -> None:
    seen = replace(ALL_WAITS, bytes_per_s=400.0 * MB)
    hot = {n: POLICY.decide(replace(seen, round=n)).hot for n in range(1, 10)}
    assert [n for n, what in hot.items() if what is Hot.SEND] == [1, 5, 9]
    faster = replace(seen, bytes_per_s=1000.0 * MB)
    assert POLICY.decide(faster).verdict is Verdict.SWITCH_OVER


# -- no convergence -------------------------------------------------------------------------------


def rounds(dirty: list[int], every_s: float = 0.5) -> list[Observation]:
    return [
        replace(
            SEEN,
            round=i + 1,
            elapsed_s=1 + i * every_s,
            dirty_bytes=n,
            window_bytes=n,
            interval_s=every_s,
        )
        for i, n in enumerate(dirty)
    ]


@pytest.mark.parametrize(
    ("dirty", "every_s", "expected"),
    [
        ([500 * MB] * 11, 0.5, True),
        ([500 * MB] * 10, 0.5, False),  # not for long enough
        ([500 * MB] * 11, 0.1, False),
        ([(500 - 4 * i) * MB for i in range(11)], 0.5, False),  # slowly, but it falls
        ([900 * MB, *[500 * MB, 600 * MB] * 6], 0.5, True),
        ([500 * MB] * 10 + [400 * MB], 0.5, False),
    ],
)
def test_stalled(dirty: list[int], every_s: float, expected: bool) -> None:
    *before, seen = rounds(dirty, every_s)
    assert stalled(seen, before) is expected


@pytest.mark.parametrize(
    ("on_limit", "verdict"), [("abort", Verdict.ABORT), ("force", Verdict.SWITCH_OVER)]
)
def test_it_says_early_and_in_numbers_that_it_will_not_converge(
    on_limit: OnLimit, verdict: Verdict
) -> None:
    *before, seen = rounds([500 << 20] * 12)
    seen = replace(seen, bytes_per_s=float(300 << 20))
    decision = Adaptive(replace(LIMITS, on_limit=on_limit), FIXED).decide(seen, before)
    assert decision.verdict is verdict
    assert "the guest writes 1,000 MiB/s, 300 MiB/s are sent" in decision.reason
    assert "1687 ms" in decision.reason


# -- whole migrations -----------------------------------------------------------------------------

NPAGES = 64_000
LINK = 1_600_000.0 * PAGE
"""The copy of everything takes 40 ms."""
RELAXED = Limits(downtime_ms=200.0, max_rounds=60, max_seconds=60.0, on_limit="force")


@st.composite
def guests(draw: st.DrawFn, until_s: st.SearchStrategy[float]) -> list[Walker]:
    walkers, first = [], 0
    for _ in range(draw(st.integers(1, 4))):
        pages = draw(st.integers(1, 16_000))
        rate = draw(st.sampled_from([10.0, 1e3, 1e4, 1e5, 1e6, 1e7]))
        walkers.append(Walker(first, pages, rate, draw(until_s)))
        first += pages
    return walkers


downtimes = st.sampled_from([15.0, 30.0, 200.0])
speeds = st.sampled_from([0.1, 1.0, 10.0])


@settings(deadline=None, max_examples=examples(300))
@given(guests(st.just(1e9)), downtimes, speeds)
@example([Walker(0, 16_000, 1e7)], 200.0, 1.0)
def test_not_worse_than_sending_all_by_what_would_be_worth_a_round(
    walkers: list[Walker], downtime_ms: float, speed: float
) -> None:
    """In what is left for the end; a little worse it may be, where another round gains less."""
    limits = replace(RELAXED, downtime_ms=downtime_ms)
    send_all, adaptive = (
        simulate(policy_of(name, limits, Fixed()), walkers, NPAGES, LINK * speed)
        for name in ("send-all", "adaptive")
    )
    more_ms = (adaptive.final_pages - send_all.final_pages) * PAGE / (LINK * speed) * 1000
    assert more_ms <= max(2.0, 0.1 * adaptive.decision.expected_downtime_ms)


@settings(deadline=None, max_examples=examples(300))
@given(guests(st.sampled_from([0.01, 0.03, 0.1, 0.3, 1e9])), downtimes, speeds)
def test_it_ends_and_keeps_within_the_limits(
    walkers: list[Walker], downtime_ms: float, speed: float
) -> None:
    """Also if what is written changes, at the worst moment: no more than fits was left to wait."""
    limits = replace(RELAXED, downtime_ms=downtime_ms)
    outcome = simulate(policy_of("adaptive", limits, Fixed()), walkers, NPAGES, LINK * speed)
    assert outcome.rounds <= limits.max_rounds
    if "forced" not in outcome.decision.reason:
        assert outcome.decision.expected_downtime_ms <= downtime_ms


@pytest.mark.parametrize("mib_per_s", [50, 100, 200, 1000])
@pytest.mark.parametrize("pages_per_s", [2000, 5000, 10_000, 15_000, 20_000, 40_000])
@pytest.mark.parametrize("downtime_ms", [100.0, 300.0])
def test_what_was_said_to_fit_fits(mib_per_s: int, pages_per_s: int, downtime_ms: float) -> None:
    """Also where sending what waits, or that it waits, leaves time for more to be written."""
    limits = Limits(downtime_ms=downtime_ms, max_seconds=60.0, on_limit="abort")
    rate = float(mib_per_s << 20)
    for pages in (4_000, 16_000, 60_000):
        walkers = [Walker(0, pages, pages_per_s)]
        outcome = simulate(policy_of("adaptive", limits, Fixed()), walkers, NPAGES, rate)
        if outcome.decision.verdict is Verdict.SWITCH_OVER:
            terms = {
                **outcome.decision.terms,
                "final-send": outcome.final_pages * PAGE / rate * 1e3,
            }
            assert sum(terms.values()) <= 1.1 * downtime_ms


def test_a_tight_writer_pays_less_and_less_is_sent() -> None:
    """What it writes need not be sent in each round, and so the rounds become shorter."""
    walkers = [Walker(0, 8_000, 1e7), Walker(16_000, 46_400, 9.6e5)]
    limits = replace(RELAXED, downtime_ms=60.0, max_rounds=20)
    at_once = Fixed(prepare_ms=0.0)
    send_all, adaptive = (
        simulate(policy_of(name, limits, at_once), walkers, NPAGES, LINK / 1.5)
        for name in ("send-all", "adaptive")
    )
    assert "forced" in send_all.decision.reason
    assert "fits" in adaptive.decision.reason
    assert adaptive.rounds < send_all.rounds
    assert adaptive.final_pages < send_all.final_pages
    assert adaptive.faults < send_all.faults / 2
    assert adaptive.sent_pages < send_all.sent_pages / 2
