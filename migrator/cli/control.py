"""The commands ``status`` and ``cancel``: what runs, asked from another terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from migrator.cli import output
from migrator.cli.command import Command, DecidingCommand
from migrator.harmless import harmless, say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from migrator.errors import ControlError

_NONE = "no migration runs"
_socket = click.argument("socket", required=False, type=click.Path(path_type=Path))


def add_to(group: click.Group) -> None:
    """Add the commands to a group."""
    group.add_command(status)
    group.add_command(cancel)


@click.command(cls=Command)
@_socket
@click.option("--watch", is_flag=True, help="Go on until they have ended, and say how.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object as the last line of stdout; with --watch, one for every change.",
)
def status(socket: Path | None, watch: bool, as_json: bool) -> None:
    """Show the migrations that run now: all of yours, or the one behind SOCKET.

    It exits with 1 if there is none.
    """
    from migrator.control import client as control_client
    from migrator.errors import ControlError

    paths = [socket] if socket is not None else _served(as_json)
    if watch and paths:
        try:
            _watch(paths, as_json)
        except KeyboardInterrupt:
            click.echo("no longer watched; what runs goes on", err=True)
        if problem := output.unwritten():
            raise click.ClickException(problem)
        return
    found: dict[Path, dict[str, Any]] = {}
    for path in paths:
        try:
            found[path] = control_client.status(path)
        except ControlError as error:
            say(str(error))
    if found:
        _console().print(_table(found))
    elif not paths:
        click.echo(_NONE, err=True)
    if as_json:
        said = [{"socket": str(path), **answer} for path, answer in found.items()]
        print(json.dumps({"migrations": said}), flush=True)
    sys.exit(0 if found else 1)


@click.command(cls=DecidingCommand)
@_socket
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout."
)
def cancel(socket: Path | None, as_json: bool) -> None:
    """Abort the migration that runs, as Ctrl-C does: its source runs on.

    Waits until it has ended, and says how. SOCKET says which, if several run. It exits with 0 if
    the migration was aborted, with 1 if it completed instead or if there is none, with 4 if which
    side may run is not known, also because nobody waited for its end, and otherwise as a migration
    that failed.
    """
    from migrator.control import client as control_client
    from migrator.errors import ControlError, EndedSilently

    if socket is None:
        paths = _served(as_json)
        if not paths:
            _fail(_NONE, as_json)
        if len(paths) > 1:
            _fail(f"several run; say which: {', '.join(map(str, paths))}", as_json, 2)
        socket = paths[0]
    try:
        ended = control_client.cancel(socket)
    except EndedSilently as error:
        _fail(str(error), as_json, error.exit_code)
    except ControlError as error:
        _fail(str(error), as_json)
    ending = output.Ending()
    ending.decide(0 if ended["status"] == "aborted" else ended["exit_code"] or 1)

    def tell() -> None:
        say(_words(ended))
        if as_json:
            print(json.dumps({"socket": str(socket), **ended}), flush=True)

    ending.leave(tell)


def _watch(paths: list[Path], as_json: bool) -> None:
    from rich.live import Live
    from rich.text import Text

    from migrator.cli.display import line
    from migrator.control import client as control_client
    from migrator.errors import ControlError

    console = _console()
    found: dict[Path, dict[str, Any]] = {}
    phases: dict[Path, str] = {}
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for path, answer in control_client.watch(paths):
            if as_json:
                print(json.dumps({"socket": str(path), **_as_json(answer)}), flush=True)
            if isinstance(answer, ControlError) or "ended" in answer:
                found.pop(path, None)
                console.print(
                    harmless(f"{path.stem}: {_how(answer)}"), markup=False, soft_wrap=True
                )
            else:
                found[path] = answer
                if not console.is_terminal and phases.get(path) != answer["phase"]:
                    phases[path] = answer["phase"]
                    console.print(
                        Text(harmless(f"{path.stem}:")), line(control_client.progress(answer))
                    )
            if output.reader_is_gone(sys.stdout if as_json else sys.stderr):
                return
            if console.is_terminal:
                live.update(_table(found) if found else "", refresh=True)


def _as_json(answer: Mapping[str, Any] | ControlError) -> Mapping[str, Any]:
    return answer if isinstance(answer, Mapping) else {"error": answer.reason}


def _how(answer: Mapping[str, Any] | ControlError) -> str:
    return _words(answer["ended"]) if isinstance(answer, Mapping) else answer.reason


def _words(ended: Mapping[str, Any]) -> str:
    return ": ".join(filter(None, (ended["status"], ended["reason"])))


def _served(as_json: bool) -> list[Path]:
    from migrator.control import client as control_client
    from migrator.errors import ControlError

    try:
        return control_client.served()
    except ControlError as error:
        _fail(str(error), as_json)


def _fail(reason: str, as_json: bool, code: int = 1) -> NoReturn:
    ending = output.Ending()
    ending.decide(code)

    def tell() -> None:
        say(reason)
        if as_json:
            print(json.dumps({"status": "failed", "reason": reason}), flush=True)

    ending.leave(tell)


def _console() -> Console:
    from rich.console import Console

    console = Console(stderr=True, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 150  # of a table in a file
    return console


def _table(found: Mapping[Path, Mapping[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from migrator.cli.display import downtime, left, rate
    from migrator.control import client as control_client

    table = Table()
    for heading in ("what", "process", "phase"):
        table.add_column(heading, overflow="fold")
    for heading in ("round", "dirty pages", "sent", "in all", "rate", "downtime", "left"):
        table.add_column(heading, justify="right")
    notes = any(answer["note"] for answer in found.values())
    if notes:
        table.add_column("note", overflow="fold")
    for answer in found.values():
        p = control_client.progress(dict(answer))
        pages = (f"{count:,}" for count in (p.dirty_pages, p.sent_pages, p.total_sent_pages))
        numbers = [str(p.round), *pages, rate(p), downtime(p), left(p)]
        cells = [answer["what"], str(answer["pid"]), p.phase, *numbers, *[p.note] * notes]
        table.add_row(*(Text(harmless(cell)) for cell in cells))
    return table
