"""Migrations of a guest that writes as told, over a link of a given speed, in no time.

Only what is outside the rounds is made up: the sources report what the guest wrote by then, the
link takes as long as its speed says, and a clock moves on when one of them would wait. The rounds
and the policies are the real ones (:mod:`migrator.migration.rounds`).
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Protocol

from bench.simulate.costs import Costs
from migrator.errors import Aborted
from migrator.migration.account import Account
from migrator.migration.rounds import Rounds
from migrator.migration.slowing import Slowing
from migrator.policy.policies import Policy
from migrator.policy.throttling import Throttling
from migrator.report.phases import Phase
from migrator.report.report import Report
from migrator.tracking.readings import Collected, Scan
from migrator.transport import Sent
from tracker.bits.merge import merge
from tracker.bits.pageset import PageSet
from tracker.memory.ram import RamBlock
from tracker.sources.uffd import UffdAsync

NEVER_SLOWED = Throttling(0)


class Guest(Protocol):
    """What is moved.

    :ivar blocks: its RAM
    :ivar data: pages that hold data when the migration begins; these are copied first
    :ivar zeros: of these, the ones full of zeros, of which nothing is copied
    """

    @property
    def blocks(self) -> tuple[RamBlock, ...]: ...  # noqa: D102

    @property
    def data(self) -> PageSet: ...  # noqa: D102

    @property
    def zeros(self) -> PageSet: ...  # noqa: D102

    def written(self, from_s: float, to_s: float) -> PageSet:
        """Pages written in a time; the caller's to change.

        :param from_s: since the migration began, likewise ``to_s``, which is more
        """


@dataclass
class Clock:
    """A clock that moves when it is told to."""

    now_s: float = 0.0

    def __call__(self) -> float:
        """Seconds since the simulation began."""
        return self.now_s

    def wait_ms(self, milliseconds: float) -> None:
        """Let time pass."""
        self.now_s += milliseconds / 1000


class SimulatedSources:
    """The sources of a guest; see :class:`migrator.tracking.sources.Sources`.

    :ivar stands_at: when the guest was stopped, if it was
    :ivar faults: pages that were written and protected: the guest paid for each
    """

    leaves = True

    def __init__(self, guest: Guest, clock: Clock, costs: Costs) -> None:
        self._guest = guest
        self._clock = clock
        self._costs = costs
        self._left = self._none = PageSet.empty(guest.blocks)
        self._slowed_at, self._slowed_s, self._percent = clock(), 0.0, 0
        self._looked_at = 0.0  # of the guest's own time, likewise stands_at
        self._handed_over = self._none
        self.data, self.zeros = guest.data.copy(), guest.zeros.copy()
        self.stands_at: float | None = None
        self.faults = 0

    async def scan(self) -> Scan:
        """See :meth:`migrator.tracking.sources.Sources.scan`."""
        found, handed_over = self._written(), self._handed_over
        self._handed_over = self._none
        self.faults += (found - self._left).count()
        found |= self._left | handed_over
        return Scan({UffdAsync.name: found}, found, handed_over.any(), 0.0)

    async def collect(
        self, *, backends_too: bool, scan: Scan | None = None, left: PageSet | None = None
    ) -> Collected:
        """See :meth:`migrator.tracking.sources.Sources.collect`."""
        if scan is None:
            scan = await self.scan()
        merged = merge(self._guest.blocks, scan.reports)
        self.data |= merged.dirty
        self.zeros -= merged.dirty
        self._left = self._none if left is None else left
        backends_ms = self._costs.round_ms - self._costs.collect_ms if backends_too else 0.0
        collect_ms = self._costs.collect_ms + backends_ms
        self._clock.wait_ms(collect_ms)
        return Collected(scan.reports, merged, collect_ms, 0.0, backends_ms, scan.handed_over)

    def _written(self) -> PageSet:
        """As it is when the reading begins: what is written while it goes on is for the next."""
        now = self.guest_s() if self.stands_at is None else self.stands_at
        since, self._looked_at = self._looked_at, now
        return self._guest.written(since, now) if now > since else self._none.copy()

    def guest_s(self) -> float:
        """The guest's own time, which goes slower while it has to wait; all it does is write."""
        return self._slowed_s + (self._clock() - self._slowed_at) * (1 - self._percent / 100)

    async def slow_writers(self, percent: int, longest_ms: float, hot: PageSet) -> None:
        """See :meth:`migrator.tracking.sources.Sources.slow_writers`."""
        if not self._percent:
            self._handed_over = hot.copy()
        await self.slow(percent, longest_ms)

    async def slow(self, percent: int, longest_ms: float) -> None:
        """See :meth:`migrator.tracking.sources.Sources.slow`."""
        self._slowed_s, self._slowed_at = self.guest_s(), self._clock()
        self._percent = percent

    def take_suspects(self, dirty: PageSet) -> PageSet:
        """No page: the source is exact."""
        return self._none

    def suspect_data(self) -> PageSet:
        """No page."""
        return self._none


class SimulatedLink:
    """The way to another host; see :class:`migrator.transport.Sender`.

    :param bytes_per_s: content of pages that it carries
    """

    compares_bytes = False

    def __init__(
        self,
        sources: SimulatedSources,
        bytes_per_s: float,
        clock: Clock,
        costs: Costs,
    ) -> None:
        self._sources = sources
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._costs = costs
        self._due_s = -math.inf  # when the last byte that was sent was due
        self.sent_pages = 0

    async def send(self, dirty: PageSet, data: PageSet, *, guest_stands: bool = False) -> Sent:
        """See :meth:`migrator.transport.Sender.send`."""
        sent = Sent()
        held = dirty & data
        copied = held - self._sources.zeros
        sent.pages = dirty.count()
        sent.zero_pages = sent.pages - copied.count()
        sent.bytes = copied.nbytes()
        zero_bytes = held.nbytes() - sent.bytes
        self.sent_pages = sent.pages
        if sent.pages:
            began_s = self._clock()
            self._due_s = max(self._due_s, began_s - self._costs.burst_s)
            sent.least_s = sent.bytes / self._bytes_per_s
            self._due_s += sent.least_s
            spent_s = max(self._due_s - began_s, 0.0) + zero_bytes / self._costs.read_bytes_per_s
            self._clock.wait_ms(self._costs.send_ms + spent_s * 1000)
        return sent

    async def changed(
        self, pages: PageSet, data: PageSet, *, guest_stands: bool = False
    ) -> PageSet:
        """All of them: what was written is taken to have changed."""
        self._clock.wait_ms((pages & data).nbytes() / self._costs.compare_bytes_per_s * 1000)
        return pages.copy()


@dataclass(frozen=True)
class Outcome:
    """How it ended.

    :ivar report: as of a real migration; ``aborted`` if it does not converge
    :ivar faults: that the guest paid for
    """

    report: Report
    faults: int

    @property
    def converges(self) -> bool:
        """Whether it came to an end by itself."""
        forced = any("forced" in r.decision for r in self.report.rounds)
        return self.report.status == "completed" and not forced


def migrate(
    guest: Guest,
    policy: Policy,
    bytes_per_s: float,
    costs: Costs,
    throttling: Throttling = NEVER_SLOWED,
) -> Outcome:
    """Go through a migration.

    :param policy: with what it takes the switchover to cost, which need not be what it does
    :param bytes_per_s: content of pages that the link carries
    :param costs: what takes time beside
    :param throttling: how much writers may be slowed
    """
    return asyncio.run(_Migration(guest, policy, bytes_per_s, costs, throttling).run())


class _Migration:
    def __init__(
        self,
        guest: Guest,
        policy: Policy,
        bytes_per_s: float,
        costs: Costs,
        throttling: Throttling,
    ) -> None:
        self._costs = costs
        self._clock = clock = Clock()
        self._account = Account(clock=clock)
        self._sources = SimulatedSources(guest, clock, costs)
        link = SimulatedLink(self._sources, bytes_per_s, clock, costs)
        self._slowing = slowing = Slowing(throttling, self._sources, self._account)
        self._rounds = Rounds(guest.blocks, policy, slowing, self._sources, link, self._account)
        self._account.of(guest.blocks)

    async def run(self) -> Outcome:
        report = self._account.report
        try:
            await self._go_through()
            self._account.finish("completed", "")
        except Aborted as error:
            self._account.finish(error.status, error.reason)
        return Outcome(report, self._sources.faults)

    async def _go_through(self) -> None:
        phases, fixed = self._account.phases, self._costs.fixed
        phases.enter(Phase.COPY)
        await self._rounds.copy_everything()
        phases.enter(Phase.ROUNDS)
        await self._rounds.until_converged()
        phases.enter(Phase.SWITCHOVER)
        self._clock.wait_ms(fixed.prepare_ms)
        await self._slowing.ease()
        phases.enter(Phase.STOP)
        stopped_at, self._sources.stands_at = self._clock(), self._sources.guest_s()
        self._clock.wait_ms(fixed.stop_ms)
        await self._rounds.last(Phase.FINAL_COLLECT, Phase.FINAL_SEND)
        for phase, spent_ms in (
            (Phase.DEVICE_STATE, fixed.device_state_ms),
            (Phase.LAST_COLLECT, 0.0),
            (Phase.LOAD, fixed.load_ms),
            (Phase.RESUME, fixed.resume_ms),
        ):
            phases.enter(phase)
            self._clock.wait_ms(spent_ms)
            if phase is Phase.LAST_COLLECT:
                await self._rounds.last(Phase.LAST_COLLECT, Phase.LAST_COLLECT)
        phases.enter(Phase.FINISH)
        self._account.report.downtime_ms = (self._clock() - stopped_at) * 1000
