"""When a migration was in which phase, and when its guest stood still."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from migrator.report.phases import DOWNTIME, Phase
from migrator.report.report import Report

_DOWNTIME = {phase.value for phase in DOWNTIME}


@dataclass(frozen=True)
class Span:
    """A stretch of time, in seconds since the migration began."""

    name: str
    began_s: float
    ended_s: float


def phases(report: Report) -> Iterator[Span]:
    """Each phase, in the order in which they came."""
    at_s = 0.0
    for name, spent_ms in report.phases.items():
        yield Span(name, at_s, at_s + spent_ms / 1000)
        at_s += spent_ms / 1000


def stood(report: Report) -> Span | None:
    """When the guest stood still at the end, comparison included; until it ran, or was let run."""
    found = [span for span in phases(report) if span.name in _DOWNTIME]
    if not found:
        return None
    return Span("guest stands", found[0].began_s, found[-1].ended_s)


def drained(report: Report) -> Span | None:
    """When the guest stood still for a moment at the beginning."""
    return next((s for s in phases(report) if s.name == Phase.DRAIN.value), None)
