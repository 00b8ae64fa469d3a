"""What moving a VM would take, without a VM."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.policy.downtime import Fixed
from migrator.policy.forecast import Curve, forecast
from migrator.policy.judge import Limits, SendAll

MIB = 1 << 20
RAM = 1024 * MIB
RATE = 1000.0 * MIB
FIXED = Fixed(stop_ms=20.0, device_state_ms=0.0, load_ms=0.0, resume_ms=0.0)
POLICY = SendAll(Limits(downtime_ms=100.0), FIXED)


def test_the_curve_goes_through_what_was_measured() -> None:
    curve = Curve([(1.0, 40 * MIB), (0.1, 10 * MIB), (10.0, 100 * MIB)], RAM)
    wanted = {0.0: 0, 0.05: 5, 0.1: 10, 0.55: 25, 1.0: 40, 5.5: 70, 10.0: 100}
    for seconds, mib in wanted.items():
        assert curve.dirty_bytes(seconds) == pytest.approx(mib * MIB, abs=1)
    assert curve.dirty_bytes(40.0) == pytest.approx(300 * MIB, abs=1)  # as steep as at the end
    assert curve.dirty_bytes(1e9) == RAM


def test_nothing_measured_nothing_dirty() -> None:
    assert Curve([], RAM).dirty_bytes(5.0) == 0


def test_measured_at_different_times() -> None:
    """In the last short time more was written than in some second: the second had as much too."""
    curve = Curve([(0.1, 50 * MIB), (1.0, 10 * MIB), (1.0, 60 * MIB)], RAM)
    assert curve.dirty_bytes(0.1) == curve.dirty_bytes(1.0) == 50 * MIB


POINTS = st.lists(st.tuples(st.floats(0.001, 60), st.integers(0, RAM)), max_size=5)


@given(POINTS, st.floats(0, 200), st.floats(0, 200))
def test_more_time_is_never_less_dirty(
    points: list[tuple[float, int]], one: float, other: float
) -> None:
    curve = Curve(points, RAM)
    assert curve.dirty_bytes(min(one, other)) <= curve.dirty_bytes(max(one, other)) <= RAM


def test_an_idle_guest() -> None:
    found = forecast(Curve([(1.0, 0)], RAM), RAM, RATE, POLICY)
    assert found.converges
    assert (found.rounds, found.sent_bytes, found.downtime_ms) == (1, RAM, 20.0)
    assert found.total_s == pytest.approx(1.024 + 0.020)


def test_round_by_round() -> None:
    """Half of what is sent is written meanwhile: 1024, 512, 256, 128, 64 MiB, and then it fits."""
    found = forecast(Curve([(10.0, 5000 * MIB)], 10 * RAM), RAM, RATE, POLICY)
    assert found.converges
    assert found.rounds == 4
    assert found.sent_bytes == pytest.approx((1024 + 512 + 256 + 128 + 64 + 32) * MIB, abs=9)
    assert found.downtime_ms == pytest.approx(20 + 32)
    assert found.total_s == pytest.approx((1024 + 512 + 256 + 128 + 64 + 32) / 1000 + 0.020)


def test_a_working_set_that_is_written_faster_than_it_is_sent() -> None:
    curve = Curve([(0.1, 200 * MIB), (60.0, 200 * MIB)], RAM)
    found = forecast(curve, RAM, RATE, POLICY)
    assert not found.converges
    assert found.reason.startswith("does not converge")
    assert found.downtime_ms == pytest.approx(220)
    assert forecast(curve, RAM, 3 * RATE, POLICY).converges
    patient = SendAll(Limits(downtime_ms=221.0), FIXED)
    assert forecast(curve, RAM, RATE, patient).converges


def test_a_limit_below_the_fixed_part() -> None:
    policy = SendAll(Limits(downtime_ms=19.0), FIXED)
    assert not forecast(Curve([(1.0, 0)], RAM), RAM, RATE, policy).converges


@given(POINTS, st.integers(1, 10 * RAM), st.floats(1e5, 1e10))
def test_it_always_ends(points: list[tuple[float, int]], data: int, rate: float) -> None:
    found = forecast(Curve(points, 10 * RAM), data, rate, POLICY)
    assert found.sent_bytes >= data
    assert found.converges == (not found.reason.startswith("does not converge"))
    assert found.downtime_ms >= 20.0


def test_the_downtime_is_what_comes_and_not_what_the_policy_expects() -> None:
    """Of a guest that writes faster than one sends, the last set is the largest."""
    curve = Curve([(1.0, 1200 * MIB)], RAM)
    found = forecast(curve, 60 * MIB, RATE, POLICY)
    assert found.reason == "expected downtime 92 ms fits 100 ms"
    assert found.downtime_ms == pytest.approx(20 + 60 * 1.2 * 1.2)
