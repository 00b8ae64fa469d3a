"""Soft-dirty as a strategy: watching with it, and measuring it, on a kernel that has it."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from bench.cli.main import main
from migrator.guest.workload import MIB
from tests.live.qemus import SYSTEM
from tests.live.vms import Machine
from tests.live.watching import sees_the_working_set
from tracker.sources.softdirty import SoftDirty

SUITE = """
grids:
  - {strategies: [soft-dirty], workloads: [sequential], memory: [256M], pairs: 1, span_s: 0.5}
"""


def test_a_watch_sees_the_working_set() -> None:
    sees_the_working_set(SoftDirty.name, Machine(memory=256 * MIB, qemu=SYSTEM.require()))


def test_it_misses_no_page(tmp_path: Path) -> None:
    suite, results = tmp_path / "suite.yaml", tmp_path / "results.json"
    suite.write_text(SUITE)
    done = CliRunner().invoke(main, ["strategies", str(suite), "--json", str(results)])
    assert done.exit_code == 0, done.output
    (cell,) = json.loads(results.read_text())["cells"]
    assert (cell["state"], cell["recall"]) == ("complete", 1.0)
    assert cell["rounds"][0]["changed"] > 100
