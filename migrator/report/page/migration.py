"""The page of one migration."""

from __future__ import annotations

from collections.abc import Iterator

from migrator.report import facts
from migrator.report.page import html, memory, style, terms, timeline
from migrator.report.report import Report

_DECISIONS = 12  # the last ones


def page(report: Report, what: str) -> str:
    """Make the page, whatever the migration ended with.

    :param what: what was moved, in a few words
    """
    with style.styled():
        return html.document(
            f"Migration: {facts.outcome(report)}", what, [*_said(report), *_pictures(report)]
        )


def _said(report: Report) -> Iterator[str]:
    completed = report.status == "completed"
    downtime = facts.ms(report.downtime_ms) if report.downtime_ms is not None else "none"
    rows = [("status", facts.outcome(report), "good" if completed else "bad")]
    if report.reason:
        rows.append(("reason", report.reason, ""))
    rows.append(("time in all", f"{report.total_ms:,.0f} ms", ""))
    if completed:
        rows.append(("downtime", downtime, ""))
    if report.downtime_limit_ms is not None:
        rows.append(("downtime limit", f"{report.downtime_limit_ms:g} ms", ""))
    rows.append(("policy", report.policy, ""))
    for fact in facts.facts(report):
        rows.append((fact.name, fact.text, {None: "", True: "good", False: "bad"}[fact.good]))
    yield html.facts(rows)
    if report.warnings:
        yield html.heading("Warnings")
        yield html.bullets(report.warnings)
    if report.known:
        yield html.heading("Look at both VMs; this is known")
        yield html.bullets(report.known)


def _pictures(report: Report) -> Iterator[str]:
    yield html.heading("Timeline")
    yield html.picture(
        style.svg(timeline.figure(report)),
        timeline.alt(report),
        "What each round found dirty, left waiting, and sent. Round 0 is the copy of everything: "
        "holes and pages of zeros in it cost no copy. Scales may go by powers of ten.",
    )
    if report.rounds:
        yield html.table(*facts.rounds(report), caption="Rounds")
        decisions = [f"Round {r.number}: {r.decision}." for r in report.rounds if r.decision]
        yield html.bullets(decisions[-_DECISIONS:])
    if report.downtime_phases and report.downtime_ms is not None:
        yield html.heading("Downtime")
        yield html.picture(
            style.svg(terms.figure(report)),
            terms.alt(report),
            "From the source's vCPUs stopping to the destination's running (or its own, in a "
            "rehearsal), phase by phase: as it was, and as the last decision expected it.",
        )
        yield html.table(
            ["", "was", "was expected to be"],
            [
                (name, facts.ms(was), facts.ms(expected))
                for name, was, expected in facts.downtime(report)
            ],
        )
    if report.dirty_map is not None and report.dirty_map.rows:
        yield html.heading("Memory")
        yield html.picture(
            style.svg(memory.figure(report.dirty_map)),
            memory.alt(report.dirty_map),
            "Where pages were not at the destination, when each round began: they had been written "
            "since they were sent, or waited. The scale goes by powers of ten.",
        )
