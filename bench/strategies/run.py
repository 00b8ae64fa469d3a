"""Every strategy on every guest: does it report all that changes, and what does it cost?

The results are JSON::

    kind        "strategies"
    machine     see bench.machine.describe: cpu, cores, memory_bytes, kernel, python, qemu, revision
    cells       a list, one for each cell of the suite that has been measured:
      strategy    as the suite names it, such as "uffd" or "uffd-sync:64K"
      workload    of bench.guests.guests.WORKLOADS
      memory      bytes of guest RAM
      pairs, span_s, collections       how it was measured (bench.strategies.suite.Task)
      state       "complete": every changed page was reported
                  "failed": pages were missed, none changed, or it could not be measured
                  "unavailable": the kernel lacks it
      reason      why it is not complete; "" if it is
    and, where it was measured (also if pages were missed):
      recall      changed pages that were reported / changed pages, of all rounds;
                  null if none changed, or nobody tracked
      precision   reported pages that changed / reported pages; likewise
      progress    work per second while tracked / while not, one number for each pair; null in
                  place of one that the guest does not tell
      data_bytes  RAM that holds data, at the end
      tracked     a list of spans: s, work (units of the guest's work, or null),
                  longest_silence_ms (without a heartbeat)
      untracked   likewise; as many
      rounds      a list, one for each tracked span:
        changed     pages that differ after the span
        and, unless nobody tracked:
        reported, missed    pages
        missed_at           where the first runs of missed pages begin
        start_ms            until every write was tracked
        start_digest_ms     the digests of a copy of all RAM, where the strategy needs them
        start_cpu_ms        processor time for both, of the tracker and its children
        cpu_ms              processor time of the tracker, for the collections of the span
        children_cpu_ms     of its children, in the span
        collections         a list: when ("first", "idle", "running" …, "last"), ms, digest_ms (of
                            what was copied), cpu_ms (for both), pages (reported)
      usage       resident bytes: before_bytes (the tracker, without a source), tracker_bytes (with
                  it), children_bytes; without the guest's RAM and its copy. null if nobody tracked
    growth      a list, for each strategy and workload that was measured in three sizes or more:
      strategy, workload
      what        "arm ms", "collect ms" (when nothing was written) or "tracker MiB"
      a, b        what = a + b * GiB
      at_1_tib    what that line says for 1 TiB; at_1_tib_error: its standard error
      samples     a list of [GiB, what]
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.guests.guests import IDLE, Guest
from bench.strategies import growth
from bench.strategies.cell import FAILURES, measure
from bench.strategies.strategy import Maker, parse
from bench.strategies.suite import Suite, Task

KIND = "strategies"
_SHM = Path("/dev/shm")

Cell = dict[str, Any]


class OtherResults(Exception):
    """The file holds results of something else: they are not written over."""


def resume(file: Path | None, qemu: str) -> dict[str, Any]:
    """Results so far.

    :raise OtherResults: they are of another revision or machine, or no results of this kind
    """
    fresh: dict[str, Any] = {
        "kind": KIND,
        "machine": machine.describe(qemu),
        "cells": [],
        "growth": [],
    }
    if file is None or not file.exists():
        return fresh
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise OtherResults(f"{file} is no JSON: name another file") from error
    if found.get("kind") != KIND:
        raise OtherResults(f"{file} holds no results of strategies: name another file")
    for key, value in fresh["machine"].items():
        if found["machine"].get(key) != value:
            theirs = found["machine"].get(key)
            raise OtherResults(
                f"{file} is of {key} {theirs}, and this is {value}: name another file"
            )
    return found


def left(suite: Suite, results: dict[str, Any]) -> list[Task]:
    """Cells that are not in the results."""
    return [task for task in suite.tasks() if not any(_is_of(c, task) for c in results["cells"])]


def _is_of(cell: Cell, task: Task) -> bool:
    return task.to_json().items() <= cell.items()


def run(
    suite: Suite, results: dict[str, Any], file: Path | None, step: Callable[[Task], None]
) -> Iterator[Cell]:
    """Measure what is left; yield each cell when it is in the results, and they in the file.

    :param step: called before each cell
    :raise GuestError: a guest cannot be made; the text says what to do
    """
    missing: dict[str, str] = {}
    prefix = f"migrator-bench-{os.getpid()}-"
    with tempfile.TemporaryDirectory(dir=_SHM, prefix=prefix) as name:
        for task in left(suite, results):
            step(task)
            strategy = parse(task.strategy)
            if strategy.source not in missing:
                missing[strategy.source] = strategy.missing()
            if reason := missing[strategy.source]:
                cell = _cell(task, "unavailable", f"not on this kernel: {reason}")
            else:
                cell = _measured(suite.qemu, task, strategy.maker(), Path(name))
            results["cells"].append(cell)
            results["growth"] = growth.fits(results["cells"])
            if file is not None:
                _write(file, results)
            yield cell


def _measured(qemu: str, task: Task, make: Maker | None, directory: Path) -> Cell:
    guest = Guest(task.workload, task.memory, qemu)
    place = directory / f"{task.workload}-{task.memory}"
    try:
        if not place.exists():
            place.mkdir()
            guest.prepare(place)
        found = measure(task, make, guest, place)
    except FAILURES as error:
        return _cell(task, "failed", f"{type(error).__name__}: {error}")
    return {**_cell(task, *_judged(task, found["rounds"])), **_summary(found), **found}


def _judged(task: Task, rounds: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """State and reason of a cell that was measured."""
    if missed := sum(round_.get("missed", 0) for round_ in rounds):
        return "failed", f"{missed} changed pages were not reported"
    if task.workload != IDLE and not sum(round_["changed"] for round_ in rounds):
        return "failed", "no page changed: nothing was compared"
    return "complete", ""


def _cell(task: Task, state: str, reason: str) -> Cell:
    return {**task.to_json(), "state": state, "reason": reason}


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    rounds = found["rounds"] if found["usage"] else []
    changed, reported, missed = (
        sum(round_[what] for round_ in rounds) for what in ("changed", "reported", "missed")
    )
    hit = changed - missed
    pairs = zip(found["tracked"], found["untracked"], strict=True)
    return {
        "recall": hit / changed if changed else None,
        "precision": hit / reported if reported else None,
        "progress": [_ratio(tracked, untracked) for tracked, untracked in pairs],
    }


def _ratio(tracked: dict[str, Any], untracked: dict[str, Any]) -> float | None:
    if tracked["work"] is None or not untracked["work"]:
        return None
    return float(tracked["work"] / tracked["s"] / (untracked["work"] / untracked["s"]))


def _write(file: Path, results: dict[str, Any]) -> None:
    """All or nothing, whenever we are interrupted."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def failed(cells: Sequence[Cell]) -> list[Cell]:
    """Cells that are not as they should be."""
    return [cell for cell in cells if cell["state"] == "failed"]
