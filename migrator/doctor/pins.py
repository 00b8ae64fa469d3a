"""The pin matrix for people and programs: what :mod:`tracker.pins.matrix` found, what it means."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tracker.pins.matrix import Experiment, count, run_matrix
from tracker.pins.pins import Answer

MEMORY = "shared file"
"""Guest RAM that a migration moves is of this kind."""
TRACKER = "uffd async"
"""What a migration tracks the CPU's writes with."""

_WIDTH = 150  # of the table in a file
_SHOWN: dict[Answer, tuple[str, str]] = {
    "yes": ("yes", "green"),
    "no": ("no", "yellow"),
    "always": ("always", "yellow"),
    "not applicable": ("–", "dim"),
    "not tried": ("?", "yellow"),
    "error": ("error", "bold red"),
}
_QUESTIONS = {
    "cpu_writes_reported": ("CPU", "the tracker reports what the CPU writes to the pinned page"),
    "coherent": ("same", "the pin and the process mean the same page after that"),
    "pin_writes_reported": ("pin", "the tracker reports what is written through the pin"),
}


def try_pins(console: Console | None = None) -> list[Experiment]:
    """Do all experiments and say how far one is, by default on stderr.

    :raise OSError: they cannot be done
    """
    console = console or Console(stderr=True, highlight=False)
    done: list[Experiment] = []
    with console.status("pinning pages") as status:
        for experiment in run_matrix():
            if not console.is_terminal and (not done or done[-1].memory != experiment.memory):
                console.print(f"pinning {experiment.memory} memory", markup=False)
            done.append(experiment)
            status.update(f"pinning pages: {len(done)} of {count()} experiments")
    return done


def trouble(experiments: Iterable[Experiment]) -> list[str]:
    """What stands against migrating with VMs whose memory is pinned, or nothing.

    Migrations rely on three things, all on shared files under asynchronous write-protection: it
    works where nothing is pinned; a pin does not hide the CPU's writes; and a pinned page is not
    copied away from its pin. That writes through a pin are reported they do not rely on.
    """
    found = []
    for experiment in experiments:
        if (experiment.memory, experiment.tracker) != (MEMORY, TRACKER):
            continue
        needed = {"CPU writes are not reported": experiment.cpu_writes_reported}
        needed["the pin and the process part"] = experiment.coherent
        for what, finding in needed.items():
            if finding.answer == "error":
                found.append(f"{experiment.pin}: {finding.seen}")
            elif finding.answer == "no":
                found.append(f"{experiment.pin}: {what}: {finding.seen}")
            elif finding.answer == "not tried" and experiment.pin == "no pin":
                found.append(f"{experiment.pin}: not tried: {finding.seen}")
    return list(dict.fromkeys(found))


def as_json(experiments: Sequence[Experiment]) -> dict[str, Any]:
    """``kernel``, ``trouble``, and ``experiments`` with the fields of :class:`Experiment`."""
    return {
        "kernel": os.uname().release,
        "trouble": trouble(experiments),
        "experiments": [asdict(experiment) for experiment in experiments],
    }


def show(experiments: Sequence[Experiment], console: Console | None = None) -> None:
    """Print the table, by default on stderr.

    A memory or a tracker that could not be tried at all is not in it, but below, with the reason.
    """
    console = console or Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    tried = [experiment for experiment in experiments if not _untried(experiment)]
    trackers = list(dict.fromkeys(experiment.tracker for experiment in tried))
    table = Table(title=f"pinned pages on Linux {os.uname().release}")
    table.add_column("memory")
    table.add_column("pin")
    for tracker in trackers:
        for i, (heading, _) in enumerate(_QUESTIONS.values()):
            table.add_column(f"{'' if i else tracker}\n{heading}", no_wrap=True)
    last = ""
    for memory, pin in dict.fromkeys((e.memory, e.pin) for e in tried):
        row = {e.tracker: e for e in experiments if (e.memory, e.pin) == (memory, pin)}
        if last and memory != last:
            table.add_section()
        cells = [Text("" if memory == last else memory), Text(pin)]
        for tracker in trackers:
            cells += [_cell(getattr(row[tracker], q).answer) for q in _QUESTIONS]
        table.add_row(*cells)
        last = memory
    console.print(table)
    for heading, meaning in _QUESTIONS.values():
        console.print(f"  {heading}: {meaning}", markup=False, soft_wrap=True)
    console.print("  always: it reports the page also when nobody writes to it", soft_wrap=True)
    for note in notes(experiments):
        console.print(f"  {note}", markup=False, soft_wrap=True)
    against = trouble(experiments)
    for what in against:
        console.print(f"[bold red]trouble[/], {MEMORY}, {TRACKER}: ", end="")
        console.print(what, markup=False, soft_wrap=True)
    if not against:
        console.print("[bold green]pins and write-protection agree[/] where migrations need it")


def _cell(answer: Answer) -> Text:
    return Text(*_SHOWN[answer])


def _untried(experiment: Experiment) -> bool:
    return experiment.cpu_writes_reported.answer == "not tried"


def notes(experiments: Sequence[Experiment]) -> list[str]:
    """Each reason for which something was not tried or went wrong, once, with where."""
    places: dict[tuple[str, str], list[Experiment]] = {}
    for experiment in experiments:
        finding = experiment.cpu_writes_reported
        for other in (experiment.coherent, experiment.pin_writes_reported):
            if other.answer == "error":
                finding = other
        if finding.answer in ("not tried", "error"):
            places.setdefault((finding.answer, finding.seen), []).append(experiment)
    return [
        f"{answer}: {_where(there, experiments)}: {seen}"
        for (answer, seen), there in places.items()
    ]


def _where(there: Sequence[Experiment], experiments: Sequence[Experiment]) -> str:
    """The shortest way to say which experiments: names that all of them share."""
    said = []
    for field in ("memory", "pin", "tracker"):
        names = list(dict.fromkeys(getattr(experiment, field) for experiment in there))
        if len(names) < len({getattr(experiment, field) for experiment in experiments}):
            said.append(" and ".join(names))
    return ", ".join(said) or "everywhere"
