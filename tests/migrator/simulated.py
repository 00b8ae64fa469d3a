"""Migrations of guests that write as told, over a link of a given speed: arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.simulate.costs import Costs
from bench.simulate.run import NEVER_SLOWED, migrate
from migrator.policy.judge import Decision, Verdict
from migrator.policy.policies import Policy
from migrator.policy.throttling import Throttling
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.memory.ram import RamBlock

PAGE = 4096
_COLLECT_MS = 2.0


@dataclass(frozen=True)
class Walker:
    """Writes its pages in order, over and over.

    :ivar until_s: and then no more
    """

    first: int
    pages: int
    pages_per_s: float
    until_s: float = 1e9

    def written(self, from_s: float, to_s: float) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Pages written in an interval."""
        start = int(min(from_s, self.until_s) * self.pages_per_s)
        stop = int(min(to_s, self.until_s) * self.pages_per_s)
        steps = np.arange(max(start, stop - self.pages), stop)
        return self.first + steps % self.pages


class Walkers:
    """A guest of walkers; see :class:`bench.simulate.run.Guest`. All of its memory holds data."""

    def __init__(self, walkers: Sequence[Walker], npages: int) -> None:
        self._walkers = walkers
        self._npages = npages
        self.blocks = (RamBlock("ram", npages * PAGE, PAGE, 0, 0, 0),)
        self.data, self.zeros = PageSet.full(self.blocks), PageSet.empty(self.blocks)

    def written(self, from_s: float, to_s: float) -> PageSet:
        """Pages written in an interval."""
        pages = np.concatenate([walker.written(from_s, to_s) for walker in self._walkers])
        return PageSet(self.blocks, {"ram": DirtyBitmap.from_pages(self._npages, pages)})


@dataclass(frozen=True)
class Outcome:
    """How it ended.

    :ivar decision: the last one
    :ivar final_pages: sent while the guest stood
    :ivar faults: that the guest paid for
    :ivar throttle_percents: how much writers were slowed, by round while the guest ran
    """

    decision: Decision
    rounds: int
    final_pages: int
    sent_pages: int
    faults: int
    throttle_percents: Sequence[int]


def simulate(
    policy: Policy,
    walkers: Sequence[Walker],
    npages: int,
    bytes_per_s: float,
    throttling: Throttling = NEVER_SLOWED,
) -> Outcome:
    """Migrate. A guest that is slowed has less time, in which it writes as ever."""
    costs = Costs(policy.judge.fixed, _COLLECT_MS, _COLLECT_MS, send_ms=0.0)
    outcome = migrate(Walkers(walkers, npages), policy, bytes_per_s, costs, throttling)
    report = outcome.report
    assert report.predicted_downtime_ms is not None
    decided = [r for r in report.rounds if r.decision]
    decision = Decision(
        Verdict.SWITCH_OVER if report.status == "completed" else Verdict.ABORT,
        report.predicted_downtime_ms,
        report.reason or decided[-1].decision,
        terms=report.predicted_downtime,
    )
    return Outcome(
        decision,
        len(decided),
        report.final_pages,
        report.pages_sent,
        outcome.faults,
        [r.throttle_percent for r in (report.rounds[0], *decided)],
    )
