"""The pin matrix as people and programs get it; tests/tracker/pins/test_pins.py: it is right."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from migrator.doctor import pins
from tracker.pins.matrix import Experiment
from tracker.pins.pins import Answer, Finding

YES, NO = Finding("yes", "2 of 2 pages"), Finding("no", "0 of 4 pages")
NONE = Finding("not applicable", "there is no pin")
UNTRIED = Finding("not tried", "not [in] this kernel")
FAILED = Finding("error", "did not come to an end in time")


def row(memory: str, pin: str, tracker: str, *found: Finding) -> Experiment:
    return Experiment(memory, pin, tracker, *found)


def usual() -> list[Experiment]:
    """As most kernels answer."""
    return [
        row(memory, pin, tracker, *((YES, NONE, NONE) if pin == "no pin" else (YES, YES, NO)))
        if tracker != "soft-dirty"
        else row(memory, pin, tracker, UNTRIED, UNTRIED, UNTRIED)
        for memory in ("private anonymous", "shared file")
        for pin in ("no pin", "write pin")
        for tracker in ("uffd async", "uffd sync", "soft-dirty")
    ]


def changed(memory: str, pin: str, tracker: str, **findings: Any) -> list[Experiment]:
    """The usual answers but for these."""
    return [
        dataclasses.replace(e, **findings)
        if (e.memory, e.pin, e.tracker) == (memory, pin, tracker)
        else e
        for e in usual()
    ]


def test_usual_answers_are_no_trouble() -> None:
    """Writes through pins are not reported: other sources are for them."""
    assert pins.trouble(usual()) == []


@pytest.mark.parametrize(
    ("pin", "findings", "expected"),
    [
        ("no pin", {"cpu_writes_reported": NO}, "no pin: CPU writes are not reported: 0 of"),
        ("write pin", {"cpu_writes_reported": NO}, "write pin: CPU writes are not reported: 0"),
        ("write pin", {"coherent": NO}, "write pin: the pin and the process part: 0 of 4"),
        ("write pin", {"coherent": FAILED}, "write pin: did not come to an end in time"),
        ("no pin", {"cpu_writes_reported": UNTRIED}, "no pin: not tried: not [in] this kernel"),
    ],
)
def test_what_migrations_rely_on(pin: str, findings: dict[str, Finding], expected: str) -> None:
    (what,) = pins.trouble(changed("shared file", pin, "uffd async", **findings))
    assert what.startswith(expected)
    # and not on other memory, or other trackers
    assert pins.trouble(changed("private anonymous", pin, "uffd async", **findings)) == []
    assert pins.trouble(changed("shared file", pin, "uffd sync", **findings)) == []


def test_a_pin_that_cannot_be_had_is_no_trouble() -> None:
    untried = dict.fromkeys(("cpu_writes_reported", "coherent", "pin_writes_reported"), UNTRIED)
    assert pins.trouble(changed("shared file", "write pin", "uffd async", **untried)) == []


def test_json_has_everything() -> None:
    said = json.loads(json.dumps(pins.as_json(usual())))
    assert said["kernel"] == os.uname().release
    assert said["trouble"] == []
    assert len(said["experiments"]) == len(usual())
    assert said["experiments"][0] == {
        "memory": "private anonymous",
        "pin": "no pin",
        "tracker": "uffd async",
        "cpu_writes_reported": {"answer": "yes", "seen": "2 of 2 pages"},
        "coherent": {"answer": "not applicable", "seen": "there is no pin"},
        "pin_writes_reported": {"answer": "not applicable", "seen": "there is no pin"},
    }


def shown(experiments: list[Experiment]) -> str:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    pins.show(experiments, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(text: str) -> list[list[str]]:
    rows = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in rows]


def test_the_table() -> None:
    text = shown(usual())
    assert cells(text) == [
        ["private anonymous", "no pin", "yes", "–", "–", "yes", "–", "–"],
        ["", "write pin", "yes", "yes", "no", "yes", "yes", "no"],
        ["shared file", "no pin", "yes", "–", "–", "yes", "–", "–"],
        ["", "write pin", "yes", "yes", "no", "yes", "yes", "no"],
    ]
    assert os.uname().release in text
    # a tracker that was tried nowhere is below, with the reason, once and not as markup
    assert text.count("not tried: soft-dirty: not [in] this kernel") == 1
    assert "agree" in text


def test_a_table_with_trouble() -> None:
    found = changed("shared file", "write pin", "uffd async", cpu_writes_reported=FAILED)
    text = shown(found)
    assert cells(text)[3] == ["", "write pin", "error", "yes", "no", "yes", "yes", "no"]
    where = "shared file, write pin, uffd async"
    assert f"error: {where}: did not come to an end in time" in text
    assert "trouble, shared file, uffd async: write pin: did not come to an end" in text
    assert "agree" not in text


def test_where_nothing_could_be_tried() -> None:
    untried = [row(e.memory, e.pin, e.tracker, UNTRIED, UNTRIED, UNTRIED) for e in usual()]
    text = shown(untried)
    assert cells(text) == []
    assert "not tried: everywhere: not [in] this kernel" in text
    assert "trouble" in text


@pytest.mark.parametrize("answer", ["yes", "no", "always", "not applicable", "not tried", "error"])
def test_every_answer_can_be_shown(answer: Answer) -> None:
    found = Finding(answer, "seen")
    text = shown([row("shared file", "no pin", "uffd async", YES, found, found)])
    assert len(cells(text)) == 1


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_matrix() -> Iterator[Experiment]:
        yield from usual()

    monkeypatch.setattr(pins, "run_matrix", run_matrix)
    console = Console(file=io.StringIO(), width=200, highlight=False)
    assert pins.try_pins(console) == usual()
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines == ["pinning private anonymous memory", "pinning shared file memory"]
