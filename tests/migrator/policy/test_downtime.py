"""What a downtime is made of, and whether comparing pays."""

from __future__ import annotations

import pytest

from migrator.choices import PolicyName
from migrator.policy.downtime import Fixed, predict
from migrator.policy.judge import Limits
from migrator.policy.policies import policy_of
from migrator.policy.skipping import Sampled, worth_comparing, worth_sampling
from migrator.report.phases import DOWNTIME
from migrator.report.report import Report

MB = 1_000_000


def test_every_phase_of_the_downtime_has_its_term() -> None:
    fixed = Fixed(stop_ms=1.0, device_state_ms=2.0, load_ms=3.0, resume_ms=4.0)
    terms = predict(
        fixed,
        send_bytes=50 * MB,
        bytes_per_s=1000.0 * MB,
        compare_bytes=20 * MB,
        compare_bytes_per_s=2000.0 * MB,
        collect_ms=7.0,
    )
    assert list(terms) == [phase.value for phase in DOWNTIME]
    assert terms == {
        "stop": 1.0,
        "final-collect": 7.0,
        "compare": 10.0,
        "final-send": 50.0,
        "device-state": 2.0,
        "last-collect": 7.0,
        "load": 3.0,
        "resume": 4.0,
    }


def test_what_an_earlier_migration_measured() -> None:
    report = Report(phases={"switchover": 11.0, "stop": 1.0, "device-state": 2.0, "resume": 3.0})
    assert Fixed.of(report) == Fixed(11.0, 1.0, 2.0, Fixed().load_ms, 3.0)
    assert Fixed.of(Report()) == Fixed()


@pytest.mark.parametrize(
    ("sampled", "bytes_per_s", "expected"),
    [
        (Sampled(10 * MB, 10 * MB, 0.01), 500e6, True),  # 1 GB/s compared, 0.5 GB/s sent
        (Sampled(10 * MB, 10 * MB, 0.01), 2000e6, False),
        (Sampled(10 * MB, 6 * MB, 0.01), 500e6, True),
        (Sampled(10 * MB, 4 * MB, 0.01), 500e6, False),
        (Sampled(10 * MB, 0, 0.01), 1.0, False),
        (Sampled(0, 0, 0.0), 500e6, False),
    ],
)
def test_comparing_pays_if_it_saves_more_sending_than_it_takes(
    sampled: Sampled, bytes_per_s: float, expected: bool
) -> None:
    assert worth_comparing(sampled, bytes_per_s) is expected


def test_of_a_few_pages_no_sample_is_taken() -> None:
    assert not worth_sampling(1000 * 100)
    assert worth_sampling(2 << 20)


@pytest.mark.parametrize(
    ("name", "defers", "compares"),
    [
        ("send-all", False, ""),
        ("defer-hot", True, ""),
        ("skip-unchanged", False, "digests"),
        ("adaptive", True, "bytes"),
    ],
)
def test_policies(name: PolicyName, defers: bool, compares: str) -> None:
    policy = policy_of(name, Limits(downtime_ms=3.0), Fixed(stop_ms=9.0))
    assert (policy.defers, policy.compares) == (defers, compares)
    assert policy.judge.limits.downtime_ms == 3.0
    assert policy.judge.fixed.stop_ms == 9.0
