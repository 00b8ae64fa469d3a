"""What people see: progress while it runs, tables when it is over. All of it on stderr."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from migrator.errors import Finding
from migrator.harmless import harmless
from migrator.report import facts
from migrator.report.phases import DOWNTIME
from migrator.report.report import Progress, Report

_REFRESH_S = 0.1
_WIDTH = 110  # of tables in a file
_QUIET = {phase.value for phase in DOWNTIME}  # drawing takes milliseconds


class Display:
    """A line of progress on a terminal, a line a phase elsewhere, and one a note."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, emoji=False)
        if not self.console.is_terminal:
            self.console.width = _WIDTH
        self._live: Live | None = None
        self._drawn_at = 0.0
        self._phase = self._note = ""

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """Print a line for people."""
        self.console.print(harmless(text), markup=False, soft_wrap=True)

    def show(self, progress: Progress) -> None:
        """Show where a migration is; cheap enough to be called for every change."""
        if progress.phase in _QUIET:
            return
        entered = progress.phase != self._phase
        self._phase = progress.phase
        if self._live is None:
            if entered:
                self.say(f"phase {progress.phase}")
            if progress.note != self._note and progress.note:
                self.say(progress.note)
            self._note = progress.note
            return
        now = time.monotonic()
        if not entered and now - self._drawn_at < _REFRESH_S:
            return
        self._drawn_at = now
        self._live.update(line(progress), refresh=True)


def line(p: Progress) -> Text:
    """One line of where a migration is."""
    share = f"{100 * p.sent_pages / p.dirty_pages:3.0f} %" if p.dirty_pages else ""
    return Text.assemble(
        (f"{harmless(p.phase):<14}", "bold"),
        f"round {p.round:<3} dirty {p.dirty_pages:>10,} pages  sent {p.sent_pages:>10,} {share}  ",
        f"in all {p.total_sent_pages:>11,}  {rate(p)}",
        f"  downtime {downtime(p)}" if p.expected_downtime_ms is not None else "",
        f"  left {left(p)}" if p.left_s is not None else "",
        (f"  {harmless(p.note)}" if p.note else "", "yellow"),
    )


def rate(p: Progress) -> str:
    """How fast pages are copied."""
    return f"{p.bytes_per_s / (1 << 20):,.0f} MiB/s" if p.bytes_per_s else "–"


def downtime(p: Progress) -> str:
    """The expected downtime."""
    return f"{p.expected_downtime_ms:,.0f} ms" if p.expected_downtime_ms is not None else "–"


def left(p: Progress) -> str:
    """Until this round is sent."""
    if p.left_s is None:
        return "–"
    return f"{p.left_s:.1f} s" if p.left_s < 100 else f"{p.left_s / 60:,.0f} min"


def summary(report: Report, console: Console) -> None:
    """Print what a migration did."""
    if report.status == "completed":
        downtime = f"{report.downtime_ms:.1f} ms" if report.downtime_ms is not None else "none"
        word = facts.outcome(report)
        console.print(
            f"[bold green]{word}[/] in {report.total_ms:,.0f} ms, downtime [bold]{downtime}[/]"
        )
    else:
        console.print(f"[bold red]{report.status}[/]: ", end="")
        console.print(harmless(report.reason), markup=False)
    for warning in report.warnings:
        console.print("[bold yellow]warning[/]: ", end="")
        console.print(harmless(warning), markup=False, soft_wrap=True)
    console.print(_facts(report))
    if report.rounds:
        console.print(_rounds(report))
    if report.downtime_phases and report.downtime_ms is not None:
        console.print(_downtime(report))


def _facts(report: Report) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for fact in facts.facts(report):
        style = "" if fact.good is None else "green" if fact.good else "red"
        table.add_row(fact.name, Text(harmless(fact.text), style))
    return table


def _rounds(report: Report) -> Table:
    table = Table(title="rounds", title_justify="left", pad_edge=False)
    heads, rows = facts.rounds(report)
    for heading in heads:
        table.add_column(Text(harmless(heading)), justify="right")
    for row in rows:
        table.add_row(*[Text(harmless(cell)) for cell in row])
    return table


def _downtime(report: Report) -> Table:
    table = Table(title="downtime", title_justify="left", pad_edge=False)
    table.add_column("", justify="left")
    for heading in ("was", "was expected to be"):
        table.add_column(heading, justify="right")
    for name, was, expected in facts.downtime(report):
        style = "bold" if name == "together" else ""
        table.add_row(Text(harmless(name)), Text(facts.ms(was), style), facts.ms(expected))
    return table


def findings(found: Sequence[Finding], console: Console) -> None:
    """Print why preflight refused."""
    console.print("[bold red]refused[/]: this VM cannot be migrated like this")
    for finding in found:
        console.print(harmless(f"  {finding.check}: {finding.problem}"), markup=False)
        console.print(harmless(f"    → {finding.mend}"), markup=False)
