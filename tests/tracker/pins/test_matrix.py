"""Experiments in processes of their own: what hangs is ended, and nothing is left."""

from __future__ import annotations

import os
import signal
import time
import uuid
from pathlib import Path

import pytest

from tests import children
from tests.live.test_doctor import marked
from tests.tracker.targets import wait_until
from tracker.pins import matrix
from tracker.pins.matrix import Experiment, apart, count, run_matrix
from tracker.pins.pinned import Memory, NoPin, shared_tmpfs
from tracker.pins.pins import Finding, Findings, findings
from tracker.pins.watchers import UffdSyncWatcher

pytestmark = pytest.mark.live

FINE = (Finding("yes", "a"), Finding("no", "b"), Finding("not applicable", "c"))


def failed(reason: str) -> Findings:
    return (Finding("error", reason),) * 3


def test_findings_come_out_of_the_child() -> None:
    assert apart(lambda: FINE, 60) == FINE


def test_an_experiment_that_hangs_is_ended(tmp_path: Path) -> None:
    def hang() -> Findings:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(1000)
        return FINE

    assert apart(hang, 2) == failed("did not come to an end in time")
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


class Deaf(UffdSyncWatcher):
    """Nobody answers the messages: the writer waits in the kernel."""

    def _serve(self) -> None:
        pass


def test_a_writer_that_waits_for_ever_is_ended() -> None:
    memory: list[Memory] = []

    def make_memory(npages: int) -> Memory:
        memory.append(shared_tmpfs(npages))
        return memory[0]

    begun = time.monotonic()
    found = apart(lambda: findings(make_memory, NoPin, Deaf), 2)
    assert found == failed("did not come to an end in time")
    assert time.monotonic() - begun >= 2


def test_an_experiment_that_dies_says_nothing() -> None:
    def die() -> Findings:
        os._exit(3)

    assert apart(die, 60) == failed("the process that tried it ended: 3")


def test_an_experiment_that_cannot_be_ended_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stuck in the kernel: here, one that nobody kills."""
    left: list[int] = []
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, _: left.append(pid))
    monkeypatch.setattr(matrix, "_ENDING_S", 0.1)

    def hang() -> Findings:
        time.sleep(1000)
        return FINE

    try:
        found = apart(hang, 0.1)
    finally:
        kill(left[0], signal.SIGKILL)
        os.waitpid(left[0], 0)
    assert found == failed(f"process {left[0]} is stuck in the kernel until the host starts anew")


SOME = """
import json, time
finding = {"answer": "yes", "seen": "x"}
from itertools import islice
import sys; sys.path.append(sys.argv[1])
from tracker.pins.matrix import _names
for names in islice(_names(), 3):
    print(json.dumps([*names, [finding] * 3]), flush=True)
"""


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("sys.exit(3)", "the process that tries ended: 3"),
        ("time.sleep(1000)", "the process that tries ended: -9"),
    ],
)
def test_experiments_that_were_not_come_to_are_errors(
    end: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    children.replace(monkeypatch, "tracker.pins.matrix", SOME + end)
    monkeypatch.setattr(matrix, "_STARTING_S", 10.0)
    found = list(run_matrix(0.1))
    assert len(found) == count()
    assert {e.coherent for e in found[:3]} == {Finding("yes", "x")}
    assert {e.coherent for e in found[3:]} == {Finding("error", reason)}
    assert len({(e.memory, e.pin, e.tracker) for e in found}) == count()


def test_closing_the_iterator_ends_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = "MATRIX_TEST", str(uuid.uuid4())
    monkeypatch.setenv(name, value)
    experiments = run_matrix()
    assert isinstance(next(experiments), Experiment)
    assert marked(f"{name}={value}") != []
    experiments.close()  # type: ignore[attr-defined]
    wait_until(lambda: marked(f"{name}={value}") == [])
