"""What a report says, as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from migrator.report.report import Report, Round

KEYS = {
    *("status", "reason", "total_ms", "downtime_ms", "verify_ms", "guest_bytes", "pages_sent"),
    *("bytes_sent", "final_pages", "verified_pages", "mismatched_pages", "device_state_bytes"),
    *("qemu_ram_transferred", "rounds", "phases", "downtime_phases", "known", "guest"),
    *("memory_only", "stopped_by", "compared_pages", "differing_pages", "wire_bytes", "reconnects"),
    *("policy", "predicted_downtime_ms", "predicted_downtime", "unchanged_pages"),
    "throttle_percent",
    *("downtime_limit_ms", "dirty_map", "warnings"),
}


def parsed(report: Report) -> dict[str, Any]:
    text = report.to_json()
    assert "\n" not in text
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


def test_a_new_report_claims_nothing() -> None:
    """What did not happen is null, not 0; and nothing counts as a success by default."""
    said = parsed(Report())
    assert said.keys() == KEYS
    assert said["status"] == "failed"
    for key in (
        *("downtime_ms", "verify_ms", "verified_pages", "mismatched_pages"),
        *("device_state_bytes", "qemu_ram_transferred", "guest", "stopped_by", "wire_bytes"),
        *("predicted_downtime_ms", "downtime_limit_ms", "dirty_map"),
    ):
        assert said[key] is None, key
    assert said["rounds"] == said["downtime_phases"] == said["known"] == []
    assert said["pages_sent"] == said["bytes_sent"] == said["final_pages"] == 0


def test_nothing_verified_and_nothing_differing_are_told_apart() -> None:
    said = parsed(Report(verified_pages=5, mismatched_pages=0))
    assert (said["verified_pages"], said["mismatched_pages"]) == (5, 0)


def test_rounds_add_up() -> None:
    report = Report()
    report.add(Round(0, {"all": 7}, {}, 7, sent_pages=7, zero_pages=2, sent_bytes=5 * 4096))
    one = Round(
        1, {"uffd": 3, "holes": 1}, {"uffd": 3}, 3, sent_pages=3, sent_bytes=4096, wire_bytes=99
    )
    one.compared_pages, one.differing_pages = 9, 1
    one.waiting_pages, one.unchanged_pages = 1, 2
    report.add(one)
    said = parsed(report)
    assert (said["compared_pages"], said["differing_pages"]) == (9, 1)
    assert said["unchanged_pages"] == 2
    assert (said["pages_sent"], said["bytes_sent"], said["wire_bytes"]) == (10, 6 * 4096, 99)
    assert [r["number"] for r in said["rounds"]] == [0, 1]
    assert said["rounds"][1] == {
        "number": 1,
        "dirty_pages_by_source": {"uffd": 3, "holes": 1},
        "only_by_source": {"uffd": 3},
        "dirty_pages": 3,
        "pages_by_several": 0,
        "compared_pages": 9,
        "differing_pages": 1,
        "waiting_pages": 1,
        "unchanged_pages": 2,
        "throttle_percent": 0,
        "sent_pages": 3,
        "zero_pages": 0,
        "sent_bytes": 4096,
        "wire_bytes": 99,
        "collect_ms": 0.0,
        "merge_ms": 0.0,
        "compare_ms": 0.0,
        "send_ms": 0.0,
        "began_s": 0.0,
        "ended_s": 0.0,
        "dirty_bytes": 0,
        "waiting_bytes": 0,
        "expected_downtime_ms": None,
        "decision": "",
    }


def test_milliseconds_have_three_digits_and_integers_stay_integers() -> None:
    report = Report(
        total_ms=1.23456,
        downtime_ms=0.0004,
        guest_bytes=1 << 40,
        phases={"copy": 2.00049},
        rounds=[Round(1, {}, {}, 1, send_ms=1 / 3)],
    )
    text = report.to_json()
    said = json.loads(text)
    assert (said["total_ms"], said["downtime_ms"]) == (1.235, 0.0)
    assert said["phases"] == {"copy": 2.0}
    assert said["rounds"][0]["send_ms"] == 0.333
    assert f'"guest_bytes": {1 << 40},' in text


@pytest.mark.parametrize("reason", ["a\nb", 'quo"te', "ä", "\u2028"])
def test_whatever_the_reason_is_it_is_one_line(reason: str) -> None:
    report = Report(reason=reason, known=[reason], guest={"heartbeats_before": 1})
    said = parsed(report)
    assert (said["reason"], said["known"]) == (reason, [reason])
    assert len(report.to_json().splitlines()) == 1
