"""One thing that was tried, and all of them as a table or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from migrator.harmless import harmless


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    :ivar check: its short name
    :ivar result: a ``warning`` says that some migrations will not work, or that it was not tried
    :ivar seen: what was seen
    :ivar mend: what to do about it; never empty if it failed
    """

    check: str
    result: Literal["passed", "failed", "warning"]
    seen: str
    mend: str = ""


def able(checks: Sequence[Check]) -> bool:
    """Whether no check failed."""
    return all(check.result != "failed" for check in checks)


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """``able`` and ``checks``, each with the fields of :class:`Check`."""
    return {"able": able(checks), "checks": [asdict(check) for check in checks]}


def show(checks: Sequence[Check], console: Console | None = None) -> None:
    """Print a table, by default on stderr; its last column only if there is something to mend."""
    console = console or Console(stderr=True, highlight=False, emoji=False)
    colours = {"passed": "green", "failed": "bold red", "warning": "yellow"}
    to_mend = any(check.mend for check in checks)
    table = Table()
    for heading in ("check", "result", "what was seen", "mend")[: 4 if to_mend else 3]:
        table.add_column(heading, overflow="fold")
    last_mend = ""
    for check in checks:
        cells = [Text(harmless(check.check)), Text(check.result, colours[check.result])]
        cells.append(Text(harmless(check.seen)))
        if to_mend:
            repeated = check.mend and check.mend == last_mend
            cells.append(Text("as above" if repeated else harmless(check.mend)))
            last_mend = check.mend
        table.add_row(*cells)
    console.print(table)
    failed = sum(check.result == "failed" for check in checks)
    if failed:
        console.print(f"[bold red]this host is not able to[/]: {failed} of {len(checks)} failed")
    else:
        console.print("[bold green]this host is able to[/]")
