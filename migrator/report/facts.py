"""What a report says, in words and columns: for people, on a terminal or on a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from migrator.report.report import Report, Round

_MIB = 1 << 20
_MOST_ROUNDS = 12


@dataclass(frozen=True)
class Fact:
    """A line of what is known.

    :ivar good: whether it is as it should be; ``None`` where nothing is to be hoped for
    """

    name: str
    text: str
    good: bool | None = None


def outcome(report: Report) -> str:
    """How it ended, in a few words; the reason is in the report."""
    if report.status != "completed":
        return report.status
    return "rehearsed (the source runs on)" if report.memory_only else "completed"


def facts(report: Report) -> Iterator[Fact]:
    """All that is not told round by round."""
    yield Fact("guest RAM", f"{report.guest_bytes / _MIB:,.0f} MiB")
    yield Fact("sent", f"{report.pages_sent:,} pages, {report.bytes_sent / _MIB:,.1f} MiB copied")
    if report.wire_bytes is not None:
        again = f", reconnected {report.reconnects} times" if report.reconnects else ""
        yield Fact("over the network", f"{report.wire_bytes / _MIB:,.1f} MiB{again}")
    yield Fact("while it stood still", f"{report.final_pages:,} pages")
    only = _only_by(report)
    if only.keys() - {"uffd", "holes"}:
        seen = ", ".join(f"only by {name} {pages:,}" for name, pages in only.items())
        several = sum(r.pages_by_several for r in report.rounds)
        yield Fact("pages reported", f"{seen}, by several {several:,}")
    if report.compared_pages:
        yield Fact(
            "compared, not sent",
            f"{report.compared_pages:,} pages, of which {report.differing_pages:,} had changed",
        )
    if report.throttle_percent:
        yield Fact("writers", f"slowed to {100 - report.throttle_percent} % of their time")
    if report.unchanged_pages:
        yield Fact("written, not changed", f"{report.unchanged_pages:,} pages not sent")
    if report.device_state_bytes:
        ram = report.qemu_ram_transferred  # not known if the source ended at once
        own = "?" if ram is None else f"{ram:,}"
        yield Fact(
            "device state", f"{report.device_state_bytes:,} bytes (QEMU's own RAM in it: {own})"
        )
    if report.verified_pages is not None:
        yield Fact(
            "verified",
            f"{report.verified_pages:,} pages compared in {report.verify_ms or 0:.0f} ms, "
            f"{report.mismatched_pages:,} differ",
            good=not report.mismatched_pages,
        )
    if report.guest is not None:
        yield Fact(
            "guest",
            f"{report.guest['heartbeats_before']:,} heartbeats at the source, went on with "
            f"{report.guest['heartbeats_after']:,} "
            f"{'there' if report.memory_only else 'at the destination'}, none lost or repeated",
        )


def _only_by(report: Report) -> dict[str, int]:
    """Pages that only one source reported, by name of the source, in all rounds."""
    found: dict[str, int] = {}
    for r in report.rounds:
        for name, pages in r.only_by_source.items():
            found[name] = found.get(name, 0) + pages
    return found


def rounds(report: Report) -> tuple[list[str], list[list[str]]]:
    """A table of the rounds: headings, and rows of numbers; of many, those in the middle left out.

    A row that stands for those left out has one cell.
    """
    sources = list(dict.fromkeys(s for r in report.rounds for s in r.dirty_pages_by_source))
    heads = ["", *sources, "to send", "waiting", "zero", "MiB"]
    heads += ["collect ms", "merge ms", "send ms"]
    return heads, [_row(r, sources) for r in _abridged(report.rounds)]


def _row(r: Round | None, sources: Sequence[str]) -> list[str]:
    if r is None:
        return ["…"]
    return [
        str(r.number),
        *(f"{r.dirty_pages_by_source.get(s, 0):,}" for s in sources),
        f"{r.dirty_pages:,}",
        f"{r.waiting_pages:,}",
        f"{r.zero_pages:,}",
        f"{r.sent_bytes / _MIB:,.1f}",
        f"{r.collect_ms:.1f}",
        f"{r.merge_ms:.1f}",
        f"{r.send_ms:.1f}",
    ]


def _abridged(found: Sequence[Round]) -> list[Round | None]:
    return list(found) if len(found) <= _MOST_ROUNDS else [*found[:5], None, *found[-6:]]


def downtime(report: Report) -> Iterator[tuple[str, float | None, float | None]]:
    """Each phase of the downtime: what it took and what was expected, in ms; then all together."""
    for name in dict.fromkeys([*report.predicted_downtime, *report.downtime_phases]):
        was, expected = report.phases.get(name), report.predicted_downtime.get(name)
        if was is not None or expected:
            yield name, was, expected
    yield "together", report.downtime_ms, report.predicted_downtime_ms


def ms(value: float | None) -> str:
    """Milliseconds, if they are known."""
    return "–" if value is None else f"{value:.1f} ms"
