"""Suites of cells, and what is made of their results; pure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from bench.cli.main import main
from bench.strategies import growth
from bench.strategies import run as strategies
from bench.strategies.strategy import Strategy, parse
from bench.strategies.suite import load
from migrator.errors import ConfigError
from tests.bench.strategies.test_strategies import TINY, written

CONFIGS = Path(__file__).parents[3] / "configs"


# -- the suite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("bench-*.yaml")), ids=lambda path: path.stem)
def test_the_suites_that_come_with_it(file: Path) -> None:
    tasks = load(file).tasks()
    assert len(set(tasks)) == len(tasks)
    assert {"none", "uffd", "soft-dirty", "content-hash"} <= {task.strategy for task in tasks}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("pairs", "pears", "grids.0.pears: unknown key"),
        ("uffd,", "ufd,", "expected one of none, uffd"),
        ("uffd,", "'uffd:4K',", "uffd has no chunks"),
        ("uffd,", "'uffd-sync:5K',", "a power of two"),
        ("uffd,", "uffd-sync,", "expected a size"),
        ("zipf", "zapf", "'zapf' is none of"),
        ("256M", "24M", "more memory"),
        ("grids", "grid", "grids"),
        ("pairs: 1", "pairs: 0", "grids.0.pairs"),
    ],
)
def test_a_suite_that_makes_no_sense(tmp_path: Path, old: str, new: str, said: str) -> None:
    file = written(tmp_path, TINY.replace(old, new))
    with pytest.raises(ConfigError, match=said):
        load(file)
    assert CliRunner().invoke(main, ["strategies", str(file)]).exit_code == 2


def test_cells_are_measured_once_however_often_they_are_named(tmp_path: Path) -> None:
    suite = load(written(tmp_path, TINY + TINY.partition("grids:\n")[2]))
    assert len(suite.tasks()) == 6


def test_cells_that_were_measured_otherwise_are_measured_again(tmp_path: Path) -> None:
    suite = load(written(tmp_path, TINY))
    cells = [task.to_json() for task in suite.tasks()]
    assert strategies.left(suite, {"cells": cells[1:]}) == suite.tasks()[:1]
    cells[0]["span_s"] = 0.3
    assert strategies.left(suite, {"cells": cells}) == suite.tasks()[:1]


# -- what it says -------------------------------------------------------------------------------


def test_a_line_is_found() -> None:
    line = growth.line([(gib, 2.0 + 0.5 * gib) for gib in (1, 4, 16, 16)])
    assert (line["a"], line["b"]) == pytest.approx((2.0, 0.5))
    assert line["at_1_tib"] == pytest.approx(514)
    assert line["at_1_tib_error"] == pytest.approx(0, abs=1e-6)


def test_the_error_of_a_line_is_numpys() -> None:
    random = np.random.default_rng(2)
    gib = np.array([1.0, 2, 4, 8, 16] * 3)
    values = 3 * gib + random.normal(size=len(gib))
    (slope, start), covariance = np.polyfit(gib, values, 1, cov="unscaled")
    spread = ((values - slope * gib - start) ** 2).sum() / (len(gib) - 2)
    far = np.array([1024, 1])
    line = growth.line(list(zip(gib.tolist(), values.tolist(), strict=True)))
    assert line["at_1_tib_error"] == pytest.approx(np.sqrt(far @ covariance @ far * spread))


def cell(memory: int, state: str = "complete") -> dict[str, Any]:
    collection = {"when": "idle", "ms": float(memory), "digest_ms": 0.0}
    rounds = [{"start_ms": 1.0, "start_digest_ms": 2.0, "collections": [collection]}]
    usage = {"before_bytes": 0, "tracker_bytes": 0, "children_bytes": 0}
    more = {"memory": memory << 30, "state": state, "rounds": rounds, "usage": usage}
    return {"strategy": "uffd", "workload": "zipf", **more}


def test_growth_is_told_from_three_sizes_on() -> None:
    assert growth.fits([cell(1), cell(2), cell(2), cell(4, "failed")]) == []
    fits = {fit["what"]: (fit["a"], fit["b"]) for fit in growth.fits([cell(1), cell(2), cell(4)])}
    assert fits["arm ms"] == pytest.approx((3, 0), abs=1e-9)
    assert fits["collect ms"] == pytest.approx((0, 1), abs=1e-9)


def test_strategies_are_named_as_they_are_written() -> None:
    assert parse("uffd-sync:64K") == Strategy("uffd-sync", 64 << 10, "uffd-sync:64K")
    assert parse("none").maker() is None
