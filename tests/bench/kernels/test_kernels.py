"""The benchmark of kernels runs, and checks what it times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from bench.cli.main import main
from bench.kernels import run as kernels
from bench.kernels.tables import parts
from bench.kernels.work import Case, _numpy_runs
from bench.machine import describe
from bench.parts import to_markdown


def test_all_of_it_quickly(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    done = CliRunner().invoke(main, ["kernels", "--quick", "--runs", "1", "--json", str(file)])
    assert done.exit_code == 0, done.output
    samples = json.loads(file.read_text())["samples"]
    assert {s["kernel"] for s in samples} == {
        *("merge", "or", "count", "runs", "larger", "smaller", "zero", "digest")
    }
    assert len(samples) == len(kernels.cases(quick=True))
    assert all(s[way] > 0 for s in samples for way in ("s", "numpy_s", "memcpy_s", "read_s"))
    assert done.stdout.count("\n| ") >= len(samples)
    shown = CliRunner().invoke(main, ["show", str(file)])
    assert shown.stdout == done.stdout


def sample(name: str, ratio: float, gib: float = 1.0) -> dict[str, Any]:
    """One whose every ratio is the same."""
    seconds = dict.fromkeys(("numpy_s", "memcpy_s", "read_s"), ratio)
    case = {"kernel": name, "guest_gib": gib, "density": 0.5, "sources": 1}
    return {**case, "s": 1.0, **seconds, "bytes_read": 1, "bytes_written": 0}


def test_which_targets_are_met() -> None:
    samples = [
        *(sample("or", ratio, 1024) for ratio in (0.1, 0.9, 0.8)),
        sample("or", 0.1),  # in the cache
        *(sample("runs", ratio, gib) for ratio, gib in ((3.0, 1.0), (0.9, 16.0))),
        sample("zero", 0.5),
    ]
    told = to_markdown(parts({"machine": describe(""), "samples": samples}))
    *_, either, zero, digest, runs = told.splitlines()
    assert either.endswith("| 0.8 | 0.80 | met |")
    assert zero.endswith("| 0.5 | 0.50 | met |")
    assert digest.endswith("not measured |")
    assert runs.endswith("| 1 | 0.90 | missed |")


def test_a_kernel_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracker.bits.words.popcount", lambda words: 1)
    case = Case("count", 0.0625, 0.5)
    with pytest.raises(kernels.Differs):
        list(kernels.measure([case], 1, lambda _: None))


def test_runs_as_numpy_finds_them() -> None:
    words = np.array([0b0111_0001, 1 << 63, 1], np.uint64)
    starts, lengths = _numpy_runs(words)
    assert starts.tolist() == [0, 4, 127]
    assert lengths.tolist() == [1, 3, 2]
