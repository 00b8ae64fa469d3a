"""``migrator-bench strategies``: it notices a lost page, goes on where it was, leaves nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bench.cli.main import main
from bench.guests.guests import Guest, GuestError
from bench.hosts.processes import is_running
from bench.strategies.replica import Replica
from bench.strategies.strategy import Strategy
from bench.strategies.watcher import Watcher, WatchingFailed
from tests.live.qemus import SYSTEM
from tests.live.tracked import tracked
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.memory.ram import RamBlock
from tracker.sources.pagemap import soft_dirty_missing
from tracker.sources.uffd import UffdAsync

TIMEOUT_S = 300.0

TINY = """
grids:
  - strategies: [uffd, content-hash, soft-dirty]
    workloads: [sequential, zipf]
    memory: [256M]
    pairs: 1
    span_s: 0.2
    collections: 2
"""
LONG = """
grids:
  - {strategies: [none], workloads: [idle], memory: [256M], pairs: 1, span_s: 0.1}
  - {strategies: ["uffd-sync:64K"], workloads: [zipf], memory: [256M], pairs: 1000, span_s: 0.1}
"""


def written(directory: Path, text: str) -> Path:
    file = directory / "suite.yaml"
    file.write_text(text)
    return file


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from bench.cli.main import main; main()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_by(pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"migrator-bench-{pid}-*"))


def below(pid: int) -> set[int]:
    """All that a process has started, and they."""
    found = {
        int(child)
        for file in Path(f"/proc/{pid}/task").glob("*/children")
        for child in file.read_text().split()
    }
    return found.union(*map(below, found))


# -- the command --------------------------------------------------------------------------------


@pytest.mark.live
@pytest.mark.thorough
def test_what_is_measured_is_complete_and_measured_once(tmp_path: Path) -> None:
    SYSTEM.require()
    suite, file = written(tmp_path, TINY), tmp_path / "results.json"
    with start("strategies", suite, "--json", file) as command:
        tables, words = command.communicate(timeout=TIMEOUT_S)
    assert command.returncode == 0, words
    assert not left_by(command.pid)

    cells = json.loads(file.read_text())["cells"]
    assert len(cells) == 6
    for cell in cells:
        if cell["strategy"] == "soft-dirty":
            assert (cell["state"] == "unavailable") == bool(soft_dirty_missing())
            continue
        assert (cell["state"], cell["recall"]) == ("complete", 1.0)
        (round_,) = cell["rounds"]
        assert round_["changed"] > 100
        assert cell["tracked"][0]["work"] > 0
        assert cell["untracked"][0]["work"] > 0
        whens = [collection["when"] for collection in round_["collections"]]
        assert whens == ["first", "idle", "running", "running", "last"]

    assert CliRunner().invoke(main, ["show", str(file)]).stdout == tables
    again = CliRunner().invoke(main, ["strategies", str(suite), "--json", str(file)])
    assert again.stdout == tables
    assert "6 cells are in" in again.stderr
    assert json.loads(file.read_text())["cells"] == cells


class Forgetful:
    """Tells of every page but the first it had to tell of."""

    name = "forgetful"
    exact = True

    def __init__(self, pid: int, blocks: Sequence[RamBlock]) -> None:
        self._source = UffdAsync(pid, blocks)
        self._forgotten: DirtyBitmap | None = None

    def start(self) -> None:
        self._source.start()

    def collect(self) -> PageSet:
        found = self._source.collect()
        ((name, pages),) = found.items()
        if self._forgotten is None and pages.any():
            first = int(pages.runs()[0][-1])  # the last run's, in the working set
            self._forgotten = DirtyBitmap.from_pages(pages.npages, [first])
        rest = pages - self._forgotten if self._forgotten else pages
        return PageSet(found.blocks, {name: rest})

    def stop(self) -> None:
        self._source.stop()


@pytest.mark.live
@pytest.mark.thorough
def test_a_page_that_is_not_reported_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SYSTEM.require()
    monkeypatch.setattr(Strategy, "maker", lambda strategy: Forgetful)
    text = TINY.replace("[uffd, content-hash, soft-dirty]", "[uffd]").replace(", zipf", "")
    file = tmp_path / "results.json"
    arguments = ["strategies", str(written(tmp_path, text)), "--json", str(file)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert "1 cells failed" in done.stderr
    (cell,) = json.loads(file.read_text())["cells"]
    changed = cell["rounds"][0]["changed"]
    assert cell["state"] == "failed"
    assert cell["recall"] == (changed - 1) / changed
    assert len(cell["rounds"][0]["missed_at"]) == 1
    assert f"**1 of {changed:,}**" in done.stdout


@pytest.mark.live
@pytest.mark.thorough
def test_a_guest_of_which_nothing_changed_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SYSTEM.require()
    text = TINY.replace("[uffd, content-hash, soft-dirty]", "[uffd]")
    idle = Guest("idle", 256 << 20)
    monkeypatch.setattr(Guest, "_program", idle._program)  # whatever it is called
    done = CliRunner().invoke(main, ["strategies", str(written(tmp_path, text))])
    assert done.exit_code == 1
    assert "no page changed" in done.stderr


def test_a_guest_that_cannot_be_made_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(guest: Guest, directory: Path) -> None:
        raise GuestError("no network: run it where there is one")

    monkeypatch.setattr(Guest, "prepare", prepare)
    file = tmp_path / "results.json"
    text = TINY.replace("[uffd, content-hash, soft-dirty]", "[none]")
    asked = ["strategies", str(written(tmp_path, text)), "--json", str(file)]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 1
    assert "no network: run it where there is one" in done.stderr
    assert not file.exists()  # it is measured the next time


@pytest.mark.live
@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    SYSTEM.require()
    file = tmp_path / "results.json"
    with start("strategies", written(tmp_path, LONG), "--json", file) as command:
        deadline = time.monotonic() + TIMEOUT_S
        started: set[int] = set()
        # QEMU, the tracker, and who answers its faults; the rest is Python's own
        while time.monotonic() < deadline and not (file.exists() and len(started) >= 4):
            assert command.poll() is None
            time.sleep(0.05)
            started |= below(command.pid)
        time.sleep(1)
        started |= below(command.pid)
        command.send_signal(number)
        _, words = command.communicate(timeout=TIMEOUT_S)
    assert command.returncode == 1
    assert "Aborted!" in words
    assert "Traceback" not in words
    assert not left_by(command.pid)
    while any(map(is_running, started)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in started if is_running(pid)]
    assert [cell["strategy"] for cell in json.loads(file.read_text())["cells"]] == ["none"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "content",
    [
        "not JSON",
        "{}",
        json.dumps({"kind": "strategies", "machine": {"revision": "older"}, "cells": []}),
    ],
)
def test_other_results_are_not_written_over(tmp_path: Path, content: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(content)
    arguments = ["strategies", str(written(tmp_path, TINY)), "--json", str(file)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert "name another file" in done.stderr
    assert file.read_text() == content


# -- the truth ----------------------------------------------------------------------------------


@pytest.mark.live
def test_the_truth_is_what_numpy_finds() -> None:
    with tracked(npages=512) as child:
        child.store(3, 100, 3)
        replica = Replica(child.pid, child.block)
        replica.bring(DirtyBitmap.full(512))
        assert not replica.differing().any()
        before = child.contents()
        child.store(2, 20, 7)  # pages that were there, and holes
        child.punch(3, 4)  # of which one was there
        child.load(500)  # no hole any more, and the zeros that it was
        changed = np.flatnonzero((child.contents() != before).any(axis=1))
        assert len(changed) >= 20
        assert replica.differing() == DirtyBitmap.from_pages(512, changed)
        replica.bring(replica.differing())
        assert not replica.differing().any()
        replica.close()


def _broken(pid: int, blocks: Sequence[RamBlock]) -> UffdAsync:
    raise OSError("no such thing")


def test_what_goes_wrong_in_the_tracker_is_said() -> None:
    block = RamBlock("ram", 1 << 20, 4096, 0, 0, 1)
    with Watcher(_broken) as watcher:
        watcher.attach(1, block)
        with pytest.raises(WatchingFailed, match="no such thing"):
            watcher.start()
