"""What people see: progress while it runs, tables when it is over. All of it on stderr."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from migrator.findings import Finding
from migrator.phases import DOWNTIME
from migrator.report import Progress, Report

_REFRESH_S = 0.1
_WIDTH = 110  # of tables in a file
_QUIET = {phase.value for phase in DOWNTIME}  # drawing takes milliseconds


class Display:
    """A line of progress on a terminal, a line a phase elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        if not self.console.is_terminal:
            self.console.width = _WIDTH
        self._live: Live | None = None
        self._drawn_at = 0.0
        self._phase = ""

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
        self.console.print(text, markup=False, soft_wrap=True)

    def show(self, progress: Progress) -> None:
        """Show where a migration is; cheap enough to be called for every change."""
        if progress.phase in _QUIET:
            return
        entered = progress.phase != self._phase
        self._phase = progress.phase
        if self._live is None:
            if entered:
                self.say(f"phase {progress.phase}")
            return
        now = time.monotonic()
        if not entered and now - self._drawn_at < _REFRESH_S:
            return
        self._drawn_at = now
        self._live.update(_line(progress), refresh=True)


def _line(p: Progress) -> Text:
    rate = f"{p.bytes_per_s / (1 << 20):,.0f} MiB/s" if p.bytes_per_s else "–"
    share = f"{100 * p.sent_pages / p.dirty_pages:3.0f} %" if p.dirty_pages else ""
    return Text.assemble(
        (f"{p.phase:<14}", "bold"),
        f"round {p.round:<3} dirty {p.dirty_pages:>10,} pages  sent {p.sent_pages:>10,} {share}  ",
        f"in all {p.total_sent_pages:>11,}  {rate}",
    )


def summary(report: Report, console: Console) -> None:
    """Print what a migration did."""
    if report.status == "completed":
        downtime = f"{report.downtime_ms:.1f} ms" if report.downtime_ms is not None else "none"
        word = "rehearsed (the source runs on)" if report.memory_only else "completed"
        console.print(
            f"[bold green]{word}[/] in {report.total_ms:,.0f} ms, downtime [bold]{downtime}[/]"
        )
    else:
        console.print(f"[bold red]{report.status}[/]: ", end="")
        console.print(report.reason, markup=False)
    console.print(_facts(report))
    if report.rounds:
        console.print(_rounds(report))
    if report.downtime_phases and report.downtime_ms is not None:
        console.print(_downtime(report))


def _facts(report: Report) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("guest RAM", f"{report.guest_bytes / (1 << 20):,.0f} MiB")
    table.add_row(
        "sent", f"{report.pages_sent:,} pages, {report.bytes_sent / (1 << 20):,.1f} MiB copied"
    )
    table.add_row("while it stood still", f"{report.final_pages:,} pages")
    only = _only_by(report)
    if only.keys() - {"uffd", "holes"}:
        seen = ", ".join(f"only by {name} {pages:,}" for name, pages in only.items())
        several = sum(r.pages_by_several for r in report.rounds)
        table.add_row("pages reported", f"{seen}, by several {several:,}")
    if report.compared_pages:
        table.add_row(
            "compared, not sent",
            f"{report.compared_pages:,} pages, of which {report.differing_pages:,} had changed",
        )
    if report.device_state_bytes:
        ram = report.qemu_ram_transferred  # not known if the source ended at once
        own = "?" if ram is None else f"{ram:,}"
        table.add_row(
            "device state",
            f"{report.device_state_bytes:,} bytes (QEMU's own RAM in it: {own})",
        )
    if report.verified_pages is not None:
        colour = "red" if report.mismatched_pages else "green"
        table.add_row(
            "verified",
            f"{report.verified_pages:,} pages compared in {report.verify_ms or 0:.0f} ms, "
            f"[{colour}]{report.mismatched_pages:,} differ[/]",
        )
    if report.guest is not None:
        table.add_row(
            "guest",
            f"{report.guest['heartbeats_before']:,} heartbeats at the source, went on with "
            f"{report.guest['heartbeats_after']:,} "
            f"{'there' if report.memory_only else 'at the destination'}, none lost or repeated",
        )
    return table


def _only_by(report: Report) -> dict[str, int]:
    """Pages that only one source reported, by name of the source, in all rounds."""
    found: dict[str, int] = {}
    for r in report.rounds:
        for name, pages in r.only_by_source.items():
            found[name] = found.get(name, 0) + pages
    return found


def _rounds(report: Report) -> Table:
    sources = list(dict.fromkeys(s for r in report.rounds for s in r.dirty_pages_by_source))
    table = Table(title="rounds", title_justify="left", pad_edge=False)
    for heading in ("", *sources, "to send", "zero", "MiB", "collect ms", "merge ms", "send ms"):
        table.add_column(heading, justify="right")
    for r in _abridged(report.rounds):
        if r is None:
            table.add_row("…")
            continue
        table.add_row(
            str(r.number),
            *(f"{r.dirty_pages_by_source.get(s, 0):,}" for s in sources),
            f"{r.dirty_pages:,}",
            f"{r.zero_pages:,}",
            f"{r.sent_bytes / (1 << 20):,.1f}",
            f"{r.collect_ms:.1f}",
            f"{r.merge_ms:.1f}",
            f"{r.send_ms:.1f}",
        )
    return table


def _abridged(rounds: Sequence) -> list:  # type: ignore[type-arg]
    return list(rounds) if len(rounds) <= 12 else [*rounds[:5], None, *rounds[-6:]]


def _downtime(report: Report) -> Table:
    table = Table(title="downtime", title_justify="left", show_header=False, pad_edge=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    for name in report.downtime_phases:
        table.add_row(name, f"{report.phases[name]:.1f} ms")
    table.add_row("together", f"[bold]{report.downtime_ms:.1f} ms[/]")
    return table


def findings(found: Sequence[Finding], console: Console) -> None:
    """Print why preflight refused."""
    console.print("[bold red]refused[/]: this VM cannot be migrated like this")
    for finding in found:
        console.print(f"  {finding.check}: {finding.problem}", markup=False)
        console.print(f"    → {finding.mend}", markup=False)
