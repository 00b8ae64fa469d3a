"""What our migration is to reach against QEMU's own, and whether it does. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Sample = Mapping[str, Any]
Entry = Mapping[str, Any]
"""Samples of one way to move one guest over one link: see :func:`bench.versus.run.measure`."""


@dataclass(frozen=True)
class Target:
    """What the ratio of ours to QEMU's best is to be.

    :ivar measure: the samples' key
    :ivar limit: at most so much; at least, where ``more`` is better
    :ivar chooses: whether QEMU's best setting has another turn
    """

    name: str
    measure: str
    limit: float
    more: bool = False
    chooses: bool = True

    def met(self, ratio: float) -> bool:
        """Whether it is."""
        return ratio >= self.limit if self.more else ratio <= self.limit

    def __str__(self) -> str:
        return f"{self.name} {'≥' if self.more else '≤'} {self.limit:.1f}"


TARGETS = (
    Target("downtime", "downtime_ms", 0.5),
    Target("longest gap", "felt_ms", 0.5, chooses=False),  # as the downtime does
    Target("total", "total_s", 0.7),
    Target("bytes", "bytes", 1.0),
    Target("guest", "progress", 1.0, more=True),
)


@dataclass(frozen=True)
class Ratio:
    """One of ours to QEMU's best.

    :ivar values: of each run in which both completed
    :ivar best: the setting of QEMU that was best in this measure; empty if nothing was set
    """

    target: Target
    values: tuple[float, ...]
    best: str

    @property
    def median(self) -> float:
        """Of all runs."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool:
        """Whether the median is what it is to be."""
        return self.target.met(self.median)


def ratio(target: Target, ours: Entry, theirs: Iterable[Entry]) -> Ratio | None:
    """Compare with the setting of QEMU whose median is the best in this measure.

    :param theirs: with different settings. One that was not run as often as the most is not
        considered: it was best in nothing.
    :return: ``None`` where there is no run in which both have this measure
    """
    mine = _by_run(ours, target.measure)
    others = {
        entry["setting"]: found for entry in theirs if (found := _by_run(entry, target.measure))
    }
    most = max(map(len, others.values()), default=0)
    others = {name: found for name, found in others.items() if len(found) == most}
    if not others:
        return None
    choose = max if target.more else min
    best = choose(others, key=lambda name: statistics.median(others[name].values()))
    pairs = [(mine[run], value) for run, value in others[best].items() if run in mine]
    values = tuple(a / b for a, b in pairs if b)
    return Ratio(target, values, best) if values else None


def finalists(entries: Iterable[Entry]) -> set[str]:
    """Which settings were the best in something.

    One that would have slowed the guest, but did not, has set nothing.
    """
    entries = [entry for entry in entries if not _idle(entry)]
    found = set()
    for target in TARGETS:
        if not target.chooses:
            continue
        medians = {
            entry["setting"]: statistics.median(values.values())
            for entry in entries
            if (values := _by_run(entry, target.measure))
        }
        if medians:
            choose = max if target.more else min
            found.add(choose(medians, key=lambda name: medians[name]))
    return found


def completed(entry: Entry) -> list[Sample]:
    """Of its samples those of moves that came to their end."""
    return [sample for sample in entry["samples"] if not sample["problem"]]


def _idle(entry: Entry) -> bool:
    return entry["setting"] == "auto-converge" and not any(
        sample["throttle_percent"] for sample in completed(entry)
    )


def _by_run(entry: Entry, measure: str) -> dict[int, float]:
    return {
        sample["run"]: sample[measure]
        for sample in completed(entry)
        if sample[measure] is not None and not math.isnan(sample[measure])
    }


def broken_by_us(entries: Sequence[Entry]) -> list[str]:
    """What we lost, did not bring to an end in order, or never did where QEMU did; else empty."""
    found = []
    for ours in (entry for entry in entries if entry["who"] == "migrator"):
        what = f"{ours['qemu']}, {ours['workload']}, {ours['link']}"
        for sample in (*ours["samples"], *ours["checks"]):
            if words := sample["lost"] or ("" if sample["gave_up"] else sample["problem"]):
                found.append(f"{what}: {words}")
        if not completed(ours) and any(map(completed, _beside(ours, entries))):
            found.append(f"{what}: not converged, and QEMU has")
    return found


def _beside(ours: Entry, entries: Sequence[Entry]) -> list[Entry]:
    """QEMU's own migrations of the same guest over the same link."""
    case = ("qemu", "workload", "link")
    return [e for e in entries if e["who"] != "migrator" and all(e[k] == ours[k] for k in case)]
