"""Predictions are compared with what happens, and one that is wrong is said to be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.cli.foresight import table
from bench.cli.main import main
from bench.parts import to_markdown
from bench.simulate.foresight import WORKLOADS, Foreseen, Seen


def foreseen(*predicted: Seen) -> Foreseen:
    return Foreseen("random", "send-all", predicted, [Seen(10, 100 << 20, 50.0)] * len(predicted))


@pytest.mark.parametrize(
    ("predicted", "missed"),
    [
        (Seen(10, 100 << 20, 50.0), []),
        (Seen(12, 81 << 20, 59.9), []),
        (Seen(13, 100 << 20, 50.0), ["rounds"]),
        (Seen(10, 79 << 20, 61.0), ["sent_bytes", "downtime_ms"]),
    ],
)
def test_a_prediction_that_is_wrong_by_more_than_a_fifth(
    predicted: Seen, missed: list[str]
) -> None:
    one = foreseen(predicted)
    wrong = [w for w in ("rounds", "sent_bytes", "downtime_ms") if not one.came_true(w)]
    assert wrong == missed
    (row,) = [line for line in told([one]).splitlines() if line.startswith("| random")]
    assert ("**not" in row) is bool(missed)
    assert all(what.split("_")[0] in row for what in missed)


def told(found: Sequence[Foreseen]) -> str:
    return to_markdown([table(found)])


def test_another_end_is_never_foreseen() -> None:
    given_up = foreseen(Seen(10, 100 << 20, 50.0, converged=False))
    assert not given_up.came_true("rounds")
    assert "**not whether it converges**" in told([given_up])


def test_medians_are_compared() -> None:
    one = foreseen(Seen(10, 1, 50.0), Seen(99, 100 << 20, 40.0), Seen(11, 100 << 20, 60.0))
    assert (one.ratio("rounds"), one.ratio("sent_bytes")) == (1.1, 1.0)
    assert one.came_true("downtime_ms")


@pytest.mark.live
@pytest.mark.thorough
def test_a_guest_is_recorded_predicted_and_moved(tmp_path: Path) -> None:
    """What its writes cost is predicted too; nearly, as the machine may be busy with another."""
    file = tmp_path / "foresight.json"
    done = CliRunner().invoke(main, ["foresight", "--quick", "--json", str(file)])
    assert done.exit_code == 0, done.output
    (case,) = json.loads(file.read_text())["cases"]
    (predicted,), (actual,) = case["predicted"], case["actual"]
    assert WORKLOADS[0].workload == case["workload"]
    assert actual["sent_bytes"] > 1.05 * WORKLOADS[0].working_set
    assert 0.5 < predicted["sent_bytes"] / actual["sent_bytes"] < 2
    assert predicted["sent_bytes"] > 1.05 * WORKLOADS[0].working_set
    assert len(predicted["dirty_bytes"]) >= 4
    assert "\n| workload |" in done.stdout
    shown = CliRunner().invoke(main, ["show", str(file)])
    assert (shown.exit_code, shown.stdout) == (0, done.stdout)


def test_what_is_no_results_is_not_shown(tmp_path: Path) -> None:
    for content in ("{}", "not JSON"):
        file = tmp_path / "other.json"
        file.write_text(content)
        shown = CliRunner().invoke(main, ["show", str(file)])
        assert shown.exit_code == 1
        assert "Traceback" not in shown.output
        assert shown.stderr.startswith("Error: ")
