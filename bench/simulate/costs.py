"""What moving a guest costs beside its pages: assumed, or as an earlier migration measured it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from migrator.errors import TraceError
from migrator.policy.downtime import Fixed
from migrator.report.phases import Phase
from migrator.report.report import Report, Round

_GIB = 1 << 30
_SCAN_MS_PER_GIB = 0.46  # page tables that nobody wrote to, by PAGEMAP_SCAN
_IN_DOWNTIME = 2  # rounds, at the end of a report


@dataclass(frozen=True)
class Costs:
    """Times that do not depend on how much is sent.

    :ivar fixed: of the switchover
    :ivar round_ms: of a round, beside sending; of it ``collect_ms``
    :ivar collect_ms: reading the sources, without asking QEMU
    :ivar send_ms: of a sending, however little it is
    :ivar compare_bytes_per_s: the rate at which pages are compared
    :ivar read_bytes_per_s: the rate at which zeros are found
    :ivar burst_s: what a limit of the rate lets be made up for, of a time in which nothing was sent
    :ivar guest_bytes: of the guest for which all this holds
    """

    fixed: Fixed = field(default_factory=Fixed)
    round_ms: float = 5.0
    collect_ms: float = 2.0
    send_ms: float = 1.0
    compare_bytes_per_s: float = 2e9
    read_bytes_per_s: float = 1e10
    burst_s: float = 0.0
    guest_bytes: int = _GIB

    @classmethod
    def of(cls, *reports: Report, burst_s: float = 0.0) -> Costs:
        """What migrations that completed measured, the medians; the rest is what it is here.

        :param burst_s: if their rate was limited, by :class:`migrator.transport.packing.Pace`
        :raise ValueError: one did not complete, or their guests are not of one size
        """
        if len({report.guest_bytes for report in reports}) != 1:
            raise ValueError("reports of guests of different sizes")
        measured = [_measured(report, burst_s * 1000) for report in reports]
        fixed = [Fixed.of(report) for report in reports]
        return cls(
            fixed=Fixed(
                **{f.name: median(getattr(one, f.name) for one in fixed) for f in fields(Fixed)}
            ),
            burst_s=burst_s,
            guest_bytes=reports[0].guest_bytes,
            **{name: median(one[name] for one in measured) for name in measured[0]},
        )

    def at(self, guest_bytes: int) -> Costs:
        """The same for a guest of another size: there is more, or less, to be scanned."""
        more_ms = (guest_bytes - self.guest_bytes) / _GIB * _SCAN_MS_PER_GIB
        collect_ms = max(self.collect_ms + more_ms, 0.1)
        round_ms = max(self.round_ms + more_ms, collect_ms)
        return replace(self, collect_ms=collect_ms, round_ms=round_ms, guest_bytes=guest_bytes)


def _measured(report: Report, burst_ms: float) -> dict[str, float]:
    if report.status != "completed" or len(report.rounds) <= _IN_DOWNTIME + 1:
        raise ValueError("not the report of a migration that completed")
    rounds, last = report.rounds[1:-_IN_DOWNTIME], report.rounds[-_IN_DOWNTIME:]
    beside_ms = report.phases[Phase.ROUNDS.value] - sum(r.send_ms for r in rounds)
    round_ms = beside_ms / len(rounds)
    rate = copy_rate(report) / 1000
    over = []
    for r in (*rounds, *last) if rate else ():
        # before the last ones there was a long pause
        made_up_ms = burst_ms if r in last else min(burst_ms, round_ms)
        if r.sent_pages:
            over.append(r.send_ms - max(r.sent_bytes / rate - made_up_ms, 0.0))
    return {
        "round_ms": round_ms,
        "collect_ms": mean(r.collect_ms + r.merge_ms for r in last),
        "send_ms": max(median(over or [0.0]), 0.0),
    }


def copy_rate(report: Report) -> float:
    """Bytes of pages a second at which everything was copied; 0 if nothing was."""
    copy = report.rounds[0]
    return copy.sent_bytes / copy.send_ms * 1000 if copy.send_ms else 0.0


def load(path: Path) -> Report:
    """Read a report: what ``migrator migrate --json`` or ``send --json`` printed last.

    :raise TraceError: it is none
    """
    try:
        return parse(path.read_text())
    except OSError as error:
        raise TraceError(path, str(error.strerror)) from error
    except ValueError as error:
        raise TraceError(path, str(error)) from error


def parse(text: str) -> Report:
    """Parse what such a command printed.

    :raise ValueError: it is no report
    """
    try:
        said = json.loads(text.strip().splitlines()[-1])
        rounds = [Round(**_known(Round, r)) for r in said["rounds"]]
        return Report(**_known(Report, said) | {"rounds": rounds})
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"not a report of a migration ({error!r})") from error


def _known(kind: type[Report] | type[Round], said: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in said.items() if name in names}
