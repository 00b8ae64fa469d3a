"""Pictures of ``migrator-bench simulate``: what migrations of a recorded guest would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.page import bars
from bench.page.bars import Bar
from bench.parts import Part
from bench.simulate import planning
from bench.simulate.planning import Planned
from migrator.report.page import html, style

_MIB = 1 << 20
_MEASURES: tuple[tuple[str, str, Callable[[Planned], float]], ...] = (
    ("Time in all", "s", lambda p: p.total_ms / 1000),
    ("Downtime", "ms", lambda p: p.downtime_ms),
    ("Sent", "MiB", lambda p: p.sent_bytes / _MIB),
)


def pictures(results: dict[str, Any]) -> Iterator[str]:
    """All of them, each with its heading."""
    plans = _plans(results)
    policies = list(dict.fromkeys(p.policy for p in plans))
    for title, unit, of in _MEASURES:
        groups: dict[str, dict[str, Bar]] = {}
        for p in plans:
            bar = Bar([of(p)], failed=not p.converges)
            groups.setdefault(planning.link(p), {})[p.policy] = bar
        yield html.heading(f"{title}, by link and policy", 3)
        yield html.picture(
            style.svg(bars.figure(groups, policies, unit, scale="log")),
            f"{title}, {unit}: bars of {', '.join(policies)} over {', '.join(groups)}.",
            "✗: it does not converge; the downtime is what it would be. By powers of ten.",
        )


def parts(results: dict[str, Any]) -> list[Part]:
    """What was recorded, and all numbers."""
    about = results["trace"]
    head = (
        f"Recorded: {about['seconds']:.1f} s of a guest of {about['guest_bytes'] / _MIB:,.0f} MiB "
        f"that wrote {about['working_set_bytes'] / _MIB:,.1f} MiB in all."
    )
    return [head, planning.table(_plans(results))]


def _plans(results: dict[str, Any]) -> Sequence[Planned]:
    return [Planned(**plan) for plan in results["plans"]]
