"""What people see, whatever the report is."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from migrator.cli.display import Display, findings, line, summary
from migrator.errors import Finding
from migrator.report.phases import DOWNTIME, Phase
from migrator.report.report import Progress, Report, Round


def printed(report: Report) -> str:
    text = io.StringIO()
    summary(report, Console(file=text, width=200, highlight=False))
    return text.getvalue()


ROUNDS = [
    Round(0, {"all": 5000}, {}, 5000, sent_pages=5000, sent_bytes=3 << 20, send_ms=1.25),
    Round(1, {"uffd": 1234, "holes": 7}, {"uffd": 1227}, 1241, zero_pages=99, collect_ms=2.5),
]
COMPLETED = Report(
    status="completed",
    total_ms=1234.5,
    downtime_ms=41.23,
    guest_bytes=1 << 30,
    pages_sent=6241,
    bytes_sent=3 << 20,
    final_pages=77,
    device_state_bytes=206_000,
    qemu_ram_transferred=401_000,
    rounds=ROUNDS,
    phases={"copy": 1000.0, "stop": 1.5, "resume": 39.7},
    downtime_phases=["stop", "resume"],
)


def test_completed() -> None:
    text = printed(COMPLETED)
    assert "completed in 1,23" in text
    assert "downtime 41.2 ms" in text
    assert "1,024 MiB" in text
    assert "6,241 pages, 3.0 MiB copied" in text
    assert "77 pages" in text
    assert "206,000 bytes (QEMU's own RAM in it: 401,000)" in text
    assert "verified" not in text
    lines = [line for line in text.splitlines() if "1,234" in line and "1,241" in line]
    assert len(lines) == 1
    assert "stop" in text
    assert "39.7 ms" in text


def test_verified() -> None:
    report = replace(COMPLETED, verified_pages=262_144, mismatched_pages=0, verify_ms=120.0)
    assert "262,144 pages compared in 120 ms, 0 differ" in printed(report)
    report = replace(report, status="failed", reason="they differ", mismatched_pages=3)
    text = printed(report)
    assert "failed: they differ" in text
    assert "3 differ" in text


def test_who_saw_what_if_devices_were_asked() -> None:
    rounds = [
        Round(1, {"uffd": 7, "vfio": 9}, {"uffd": 1000, "holes": 0, "vfio": 3}, 7),
        Round(2, {"uffd": 7, "vfio": 9}, {"uffd": 1, "holes": 2, "vfio": 3}, 7),
    ]
    for r in rounds:
        r.pages_by_several = 2
    said = printed(replace(COMPLETED, rounds=rounds))
    assert "only by uffd 1,001, only by holes 2, only by vfio 6, by several 4" in said
    for r in rounds:
        del r.only_by_source["vfio"]
    assert "only by" not in printed(replace(COMPLETED, rounds=rounds))


def test_what_was_compared() -> None:
    assert "compared" not in printed(COMPLETED)
    report = replace(COMPLETED, compared_pages=1234, differing_pages=5)
    assert "1,234 pages, of which 5 had changed" in printed(report)


def test_a_rehearsal() -> None:
    report = replace(COMPLETED, memory_only=True)
    assert printed(report).startswith("rehearsed (the source runs on) in ")


def test_heartbeats() -> None:
    report = replace(COMPLETED, guest={"heartbeats_before": 1000, "heartbeats_after": 5})
    assert "1,000 heartbeats at the source, went on with 5" in printed(report)


@pytest.mark.parametrize("status", ["aborted", "failed"])
def test_a_report_of_almost_nothing(status: str) -> None:
    text = printed(Report(status=status, reason="[bold]no[/] [/] \\[x]"))  # type: ignore[arg-type]
    assert f"{status}: [bold]no[/] [/] \\[x]" in text
    assert "0 MiB" in text


@pytest.mark.parametrize(
    "missing",
    [
        {"downtime_ms": None},
        {"downtime_ms": None, "downtime_phases": []},
        {"qemu_ram_transferred": None},
        {"device_state_bytes": None},
        {"device_state_bytes": None, "qemu_ram_transferred": None},
        {"rounds": []},
        {"verified_pages": 5, "mismatched_pages": 0, "verify_ms": None},
    ],
)
def test_a_completed_migration_is_told_whatever_else_is_not_known(
    missing: dict[str, object],
) -> None:
    assert "completed" in printed(replace(COMPLETED, **missing))  # type: ignore[arg-type]


def test_many_rounds_are_abridged() -> None:
    many = [Round(n, {"uffd": 1}, {}, 70_000 + n) for n in range(40)]
    text = printed(replace(COMPLETED, rounds=many))
    shown = [n for n in range(40) if f"{70_000 + n:,}" in text]
    assert shown == [0, 1, 2, 3, 4, 34, 35, 36, 37, 38, 39]
    assert "…" in text


# -- progress -----------------------------------------------------------------------------------

PROGRESS = Progress("rounds", 3, 1000, 250, 99_999, 2.0 * (1 << 30))


def test_elsewhere_than_on_a_terminal_each_phase_is_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Display() as display:
        for phase in ("attach", "copy", "copy", "rounds", "rounds"):
            display.show(replace(PROGRESS, phase=phase))
        display.say("[red]so[/]")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["phase attach", "phase copy", "phase rounds", "[red]so[/]"]


def test_and_so_is_each_note(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        for note in ("", "slow", "slow", "slower", ""):
            display.show(replace(PROGRESS, note=note))
    assert capsys.readouterr().err.splitlines() == ["phase rounds", "slow", "slower"]


def test_nothing_is_drawn_in_the_downtime(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        for phase in DOWNTIME:
            display.show(replace(PROGRESS, phase=phase.value))
    assert capsys.readouterr().err == ""
    with Display() as display:
        for phase in set(Phase) - set(DOWNTIME):
            display.show(replace(PROGRESS, phase=phase.value))
    assert len(capsys.readouterr().err.splitlines()) == len(Phase) - len(DOWNTIME)


def test_on_a_terminal_there_is_one_line_that_changes() -> None:
    text = io.StringIO()
    display = Display()
    display.console = Console(file=text, force_terminal=True, width=120, highlight=False)
    with display:
        display.show(replace(PROGRESS, dirty_pages=0, bytes_per_s=0.0))
        display.show(replace(PROGRESS, phase="switchover"))
        display.show(replace(PROGRESS, phase="switchover", sent_pages=251))  # too soon
    seen = text.getvalue()
    assert "round 3" in seen
    assert "sent        250  25 %" in seen
    assert "2,048 MiB/s" in seen
    assert "251" not in seen
    display.__exit__()  # once more


def test_a_line_tells_what_is_known() -> None:
    for known, said in (
        ({}, "2,048 MiB/s"),
        ({"expected_downtime_ms": 1234.5}, "2,048 MiB/s  downtime 1,234 ms"),
        ({"left_s": 0.0}, "2,048 MiB/s  left 0.0 s"),
        ({"left_s": 99.94}, "left 99.9 s"),
        ({"left_s": 600.0}, "left 10 min"),
        ({"left_s": 1.0, "note": "[again]"}, "left 1.0 s  [again]"),
    ):
        text = line(replace(PROGRESS, **known)).plain
        assert text.endswith(said)


def test_findings() -> None:
    text = io.StringIO()
    found = [Finding("RAM", "no [file]", "give it [one/]"), Finding("vCPUs", "two", "-smp 1")]
    findings(found, Console(file=text, width=100))
    assert text.getvalue().splitlines()[1:] == [
        "  RAM: no [file]",
        "    → give it [one/]",
        "  vCPUs: two",
        "    → -smp 1",
    ]
