"""``migrator-bench page``: what is drawn of results, and that nothing bad is hidden by it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bench.cli.main import main
from bench.page import bars
from bench.page.bars import Bar
from bench.parts import Bad, Bullets, Part, Table, to_html, to_markdown
from bench.strategies import growth
from bench.versus import pictures as versus
from migrator.report.page import style
from tests.bench.simulate.test_simulate import walked
from tests.bench.simulate.test_simulate import write as write_trace
from tests.bench.versus.test_versus import done, entry, not_done, ours
from tests.migrator.report.test_page import Page, check, words

STREAM = Path(__file__).parents[2] / "bench/results/stream.json"
GIB = 1 << 30
MACHINE = {
    "cpu": "some CPU",
    "cores": 2,
    "memory_bytes": 8 * GIB,
    "kernel": "6.1",
    "python": "3.10",
    "qemu": "QEMU 1.2.3",
    "revision": "abc",
}


def write(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["page", *map(str, arguments)])


def made(directory: Path, *results: dict[str, Any]) -> tuple[str, Page]:
    """A page of results."""
    files = []
    for number, found in enumerate(results):
        files.append(directory / f"{number}.json")
        files[-1].write_text(json.dumps(found))
    page = directory / "out.html"
    ended = write(*files, "-o", page)
    assert ended.exit_code == 0, ended.stderr
    return page.read_text(), check(page.read_text())


# -- strategies ---------------------------------------------------------------------------------


def cell(strategy: str, workload: str, gib: float = 1, *, missed: int = 0) -> dict[str, Any]:
    """What is measured of one."""
    idle = {"when": "idle", "ms": 2.0 * gib, "digest_ms": 0.0, "cpu_ms": 1.0, "pages": 0}
    last = {"when": "last", "ms": 3.0 * gib, "digest_ms": 0.0, "cpu_ms": 1.0, "pages": 1000}
    round_ = {
        "changed": 1000,
        "reported": 1000 - missed,
        "missed": missed,
        "missed_at": [5],
        "start_ms": 10.0 * gib,
        "start_digest_ms": 0.0,
        "start_cpu_ms": 1.0,
        "cpu_ms": 1.0,
        "children_cpu_ms": 0.0,
        "collections": [idle, last],
    }
    span = {"s": 1.0, "work": 100, "longest_silence_ms": 12.5}
    reason = f"{missed} changed pages were not reported" if missed else ""
    usage = {"before_bytes": 0, "tracker_bytes": 1 << 20, "children_bytes": 0}
    return {
        "strategy": strategy,
        "workload": workload,
        "memory": int(gib * GIB),
        "pairs": 2,
        "span_s": 1.0,
        "collections": 1,
        "state": "failed" if missed else "complete",
        "reason": reason,
        "recall": 1 - missed / 1000,
        "precision": 1.0,
        "progress": [0.5, None, 0.75],
        "data_bytes": GIB,
        "tracked": [span, span],
        "untracked": [span, span],
        "rounds": [round_, round_],
        "usage": usage,
    }


def unmeasured(strategy: str, workload: str, state: str) -> dict[str, Any]:
    task = {"strategy": strategy, "workload": workload, "memory": GIB, "pairs": 2, "span_s": 1.0}
    return {**task, "collections": 1, "state": state, "reason": f"because of {workload}"}


def strategies(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    fits = growth.fits(cells)
    return {"kind": "strategies", "machine": MACHINE, "cells": list(cells), "growth": fits}


def test_strategies(tmp_path: Path) -> None:
    cells = [cell(s, w) for s in ("uffd", "content-hash") for w in ("zipf", "idle")]
    cells += [cell("uffd", "zipf", gib) for gib in (2, 4, 8)]
    _, page = made(tmp_path, strategies(cells))
    assert "some CPU, 2 cores" in page.text
    assert "0 of 2,000" in page.text  # the tables are there too
    recall, progress, stalls, dirty, lines = page.images()
    assert "None missed any" in recall[0]
    assert words(recall[1]).count("all") == 7
    assert "from 50.0 to 75.0" in progress[0]
    assert "% of without" in words(progress[1])
    assert {"zipf", "1 GiB", "8 GiB", "uffd"} <= set(words(progress[1]).split("\n"))
    assert "from 12.5 to 12.5" in stalls[0]
    assert "from 1,000.0 to 8,000.0" in dirty[0]  # 1 ms more for 1000 pages, 8 ms
    assert "arm ms 10,240 at 1 TiB" in lines[0]
    assert "guest RAM, GiB" in words(lines[1])
    assert "bad" not in {attributes.get("class") for _, attributes in page.tags}


def test_what_was_missed_cannot_be_overlooked(tmp_path: Path) -> None:
    cells = [cell("uffd", "zipf"), cell("lossy", "zipf", missed=3)]
    cells += [unmeasured("lossy", "idle", "failed"), unmeasured("soft", "idle", "unavailable")]
    _, page = made(tmp_path, strategies(cells))
    recall, *costs = page.images()
    assert "Failed: lossy on zipf: 3 changed pages were not reported" in recall[0]
    said = words(recall[1]).split("\n")
    assert "0.9970: 6 missed" in said
    assert "failed" in said
    assert "n/a" in said
    for _, image in costs[:2]:
        assert words(image).count("✗") == 2
        assert words(image).count("n/a") == 1
    bad = [attributes for _, attributes in page.tags if attributes.get("class") == "bad"]
    assert len(bad) >= 5  # each failed cell in each table


def test_nothing_measured_yet_is_a_page_all_the_same(tmp_path: Path) -> None:
    made(tmp_path, strategies([]))
    made(tmp_path, strategies([unmeasured("soft", "idle", "unavailable")]))


# -- versus -------------------------------------------------------------------------------------


def compared(*entries: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine": MACHINE,
        "versus": {"runs": 3, "throttle": True},
        "entries": [{**found, "workload": found.get("case", "zipf")} for found in entries],
    }


def test_versus(tmp_path: Path) -> None:
    mine, theirs = [done(run, 1.0) for run in range(3)], [done(run, 2.5) for run in range(3)]
    results = compared(
        ours(*mine),
        entry(*theirs),
        entry(not_done(0), setting="multifd 2"),
        {**ours(not_done(0)), "case": "outrun"},
        {**entry(done(0)), "case": "outrun"},
    )
    _, page = made(tmp_path, results)
    ratios, total, downtime = page.images()
    # 1/2.5 of the times, but of bytes and of the guest's work as much
    assert "5 of 5 targets met" in ratios[0]
    assert "zipf, local: downtime 0.40; zipf, local: longest gap 0.40" in ratios[0]
    assert {"downtime ≤ 0.5", "total ≤ 0.7", "guest ≥ 1.0"} <= set(words(ratios[1]).split("\n"))
    assert words(ratios[1]).count("–") == 5  # outrun: they never both completed
    assert words(total[1]).count("✗") == 2
    assert "QEMU, multifd 2" in words(downtime[1])
    assert "0.40" in page.text


def test_a_target_that_is_missed_looks_like_it(tmp_path: Path) -> None:
    def marks(mine_s: float) -> int:
        """Of the ratios of medians, how many are drawn as missed."""
        results = compared(ours(done(0, mine_s)), entry(done(0, 1.0)))
        with style.styled():
            drawn = versus.ratios([results["entries"]])
        return sum(line.get_marker() == "X" for axes in drawn.axes for line in axes.get_lines())

    assert [marks(0.4), marks(0.6), marks(0.9)] == [0, 2, 3]


# -- simulate -----------------------------------------------------------------------------------


def test_simulated_migrations(tmp_path: Path) -> None:
    trace, file = tmp_path / "some.trace", tmp_path / "plans.json"
    write_trace(trace, walked(8000, 30_000.0))  # 117 MiB/s
    arguments = ["simulate", str(trace), "--json", str(file), "--policy", "send-all"]
    slow_and_fast = ["--link", "400Mbit/s", "--link", "100Gbit/s"]
    ended = CliRunner().invoke(main, [*arguments, *slow_and_fast])
    assert ended.exit_code == 0, ended.stderr
    plans = json.loads(file.read_text())["plans"]
    assert [plan["converges"] for plan in plans] == [False, True]
    _, page = made(tmp_path, json.loads(file.read_text()))
    assert "Recorded: " in page.text
    for _, image in page.images():
        said = words(image).split("\n")
        assert {"0.4 Gbit/s", "100 Gbit/s", "send-all"} <= set(said)
        assert said.count("✗") == 1
    assert len(list(page.images())) == 3


# -- kernels ------------------------------------------------------------------------------------


def test_kernels(tmp_path: Path) -> None:
    def sample(kernel: str, gib: float, times: float, written: float) -> dict[str, Any]:
        case = {"kernel": kernel, "guest_gib": gib, "density": 0.5, "sources": 1}
        seconds = {"s": 1.0, "numpy_s": times, "memcpy_s": 0.5, "read_s": 0.25}
        return {**case, **seconds, "bytes_read": 1e9, "bytes_written": written}

    samples = [sample("count", 1.0, times, 0.0) for times in (2.0, 8.0, 4.0)]
    samples += [sample("runs", 16.0, 0.5, 1e9)]
    _, page = made(tmp_path, {"machine": MACHINE, "samples": samples})
    ((alt, image),) = page.images()
    assert "numpy's time : ours from 0.5 to 4;" in alt
    assert "that of reading from 0.25 to 0.25" in alt  # the other one writes
    assert {"count", "runs", "1 GiB of guest", "16 GiB of guest"} <= set(words(image).split("\n"))
    assert "some CPU" in page.text
    assert "4.00" in page.text


# -- stream, and all together -------------------------------------------------------------------


def test_stream(tmp_path: Path) -> None:
    results = json.loads(STREAM.read_text())
    _, page = made(tmp_path, results)
    loops, total, downtime, sent = page.images()
    assert {"hot loop", "file loop", "stream", "MB/s"} <= set(words(loops[1]).split("\n"))
    assert "migrator, TLS" in words(total[1])
    assert "limit 300 ms" in words(downtime[1])
    assert "Migrations: sent, MB" in sent[0]
    assert results["machine"]["cpu"] in page.text


def test_several_files(tmp_path: Path) -> None:
    text, page = made(tmp_path, json.loads(STREAM.read_text()), strategies([cell("uffd", "zipf")]))
    assert "<title>Measurements: between two hosts, strategies</title>" in text
    assert len(list(page.images())) == 8


@pytest.mark.parametrize("content", ["", "[]", "1", '{"some": "thing"}'])
def test_something_else(content: str, tmp_path: Path) -> None:
    file, page = tmp_path / "some.json", tmp_path / "out.html"
    file.write_text(content)
    ended = write(STREAM, file, "-o", page)
    assert ended.exit_code == 1
    assert str(file) in ended.stderr
    assert not page.exists()


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    ended = write(STREAM, "-o", tmp_path / "nowhere/out.html")
    assert ended.exit_code == 1
    assert "No such file" in ended.stderr


# -- from those that measure --------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Results without measuring; what was begun."""
    begun: list[str] = []

    def versus_results(*_: object) -> dict[str, Any]:
        begun.append("versus")
        return compared(ours(done(0)), entry(done(0)))

    def strategy_cells(_: object, results: dict[str, Any], *__: object) -> list[dict[str, Any]]:
        begun.append("strategies")
        results["cells"] = [cell("uffd", "zipf", missed=1)]
        return []

    monkeypatch.setattr("bench.versus.run.missing", lambda _: "")
    monkeypatch.setattr("bench.versus.run.measure", versus_results)
    monkeypatch.setattr("bench.strategies.run.run", strategy_cells)
    return begun


def suite(directory: Path) -> str:
    file = directory / "suite.yaml"
    file.write_text("grids: [{strategies: [uffd], workloads: [zipf], memory: [1G]}]")
    return str(file)


@pytest.mark.parametrize(("command", "code"), [("versus", 0), ("strategies", 1)])
def test_a_page_beside_the_tables(
    command: str, code: int, tmp_path: Path, measured: list[str]
) -> None:
    """Also where something was missed, and the exit code says so."""
    arguments = [command, *([suite(tmp_path)] if command == "strategies" else [])]
    page = tmp_path / "out.html"
    ended = CliRunner().invoke(main, [*arguments, "--html", str(page)])
    assert ended.exit_code == code, ended.stderr
    assert "| zipf" in ended.stdout
    assert len(list(check(page.read_text()).images())) >= 3
    where = tmp_path / "nowhere/out.html"
    ended = CliRunner().invoke(main, [*arguments, "--html", str(where)])
    assert ended.exit_code == 2
    assert "cannot be written" in ended.stderr
    assert measured == [command]


# -- parts --------------------------------------------------------------------------------------


def test_many_groups_take_several_rows() -> None:
    groups = {f"g{g}": {f"s{s}": Bar([1.0, 2.0]) for s in range(6)} for g in range(11)}
    drawn = bars.figure(groups, [f"s{s}" for s in range(6)], "ms", scale="log")
    assert [len(axes.get_xticks()) for axes in drawn.axes] == [5, 5, 1]
    named = [label.get_text() for axes in drawn.axes for label in axes.get_xticklabels()]
    assert named == list(groups)
    assert {axes.get_ylim() for axes in drawn.axes} == {(1.0, 10.0)}


PARTS: list[Part] = [
    "one <line>",
    Bullets([("a", "b"), (Bad("c"), "d")]),
    Table("A title.", ["x", "y"], [[Bad("no"), "1"]]),
]


def test_parts_as_html() -> None:
    first, bullets, table = to_html(PARTS)
    assert first == "<p>one &lt;line&gt;</p>"
    assert bullets == "<ul><li>a: b</li><li>c: d</li></ul>"
    assert "<caption>A title.</caption>" in table
    assert '<td class="bad">no</td><td>1</td>' in table


def test_parts_as_markdown() -> None:
    assert to_markdown(PARTS) == (
        "one <line>\n\n- a: b\n- **c**: d\n\nA title.\n\n| x | y |\n|---|---:|\n| **no** | 1 |\n"
    )
