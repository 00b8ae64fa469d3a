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
from migrator.migration.rounds import Rounds
from migrator.migration.slowing import Slowing
from migrator.policy.policies import Policy
from migrator.policy.throttling import Throttling
from migrator.preflight.plan import Plan
from migrator.report.account import Account
from migrator.report.phases import Phase
from migrator.report.report import Report
from migrator.tracking.readings import Collected
from migrator.transport import Sent
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.merge import merge
from tracker.bits.pageset import Bitmaps, any_of, no_pages
from tracker.memory.ram import RamBlock
from tracker.sources.uffd import Leave, UffdAsync

NEVER_SLOWED = Throttling(0)


class Guest(Protocol):
    """What is moved.

    :ivar blocks: its RAM
    :ivar data: pages that hold data when the migration begins, by block; these are copied first
    :ivar zeros: of these, the ones full of zeros, of which nothing is copied
    """

    @property
    def blocks(self) -> tuple[RamBlock, ...]: ...  # noqa: D102

    @property
    def data(self) -> Bitmaps: ...  # noqa: D102

    @property
    def zeros(self) -> Bitmaps: ...  # noqa: D102

    def written(self, from_s: float, to_s: float) -> dict[str, DirtyBitmap]:
        """Pages written in a time, by block; the caller's to change.

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
        self._npages = {block.name: block.npages for block in guest.blocks}
        self._left: Bitmaps = no_pages(self._npages)
        self._slowed_at, self._slowed_s, self._percent = clock(), 0.0, 0
        self._looked_at = 0.0  # of the guest's own time, likewise stands_at
        self._handed_over = no_pages(self._npages)
        self.data = {name: pages.copy() for name, pages in guest.data.items()}
        self.zeros = {name: pages.copy() for name, pages in guest.zeros.items()}
        self.stands_at: float | None = None
        self.faults = 0

    async def collect(self, *, backends_too: bool, leave: Leave | None = None) -> Collected:
        """See :meth:`migrator.tracking.sources.Sources.collect`."""
        found, handed_over = self._written(), self._handed_over
        self._handed_over = no_pages(self._npages)
        for name, pages in found.items():
            self.faults += pages.minus(self._left[name]).count()
            pages |= self._left[name] | handed_over[name]
            self.data[name] |= pages
            self.zeros[name] = self.zeros[name].minus(pages)
        reports = {UffdAsync.name: found}
        merged = merge(self._npages, reports)
        self._left = leave(found) if leave is not None else no_pages(self._npages)
        backends_ms = self._costs.round_ms - self._costs.collect_ms if backends_too else 0.0
        collect_ms = self._costs.collect_ms + backends_ms
        self._clock.wait_ms(collect_ms)
        anew = any_of(handed_over)
        return Collected(reports, merged, collect_ms, 0.0, backends_ms, anew)

    def _written(self) -> dict[str, DirtyBitmap]:
        """As it is when the reading begins: what is written while it goes on is for the next."""
        now = self.guest_s() if self.stands_at is None else self.stands_at
        since, self._looked_at = self._looked_at, now
        return self._guest.written(since, now) if now > since else no_pages(self._npages)

    def guest_s(self) -> float:
        """The guest's own time, which goes slower while it has to wait; all it does is write."""
        return self._slowed_s + (self._clock() - self._slowed_at) * (1 - self._percent / 100)

    async def slow_writers(self, percent: int, longest_ms: float, hot: Bitmaps) -> None:
        """See :meth:`migrator.tracking.sources.Sources.slow_writers`."""
        if not self._percent:
            self._handed_over = {name: pages.copy() for name, pages in hot.items()}
        await self.slow(percent, longest_ms)

    async def slow(self, percent: int, longest_ms: float) -> None:
        """See :meth:`migrator.tracking.sources.Sources.slow`."""
        self._slowed_s, self._slowed_at = self.guest_s(), self._clock()
        self._percent = percent

    def take_suspects(self, dirty: Bitmaps) -> dict[str, DirtyBitmap]:
        """None: the source is exact."""
        return no_pages(self._npages)

    def suspect_data(self) -> dict[str, DirtyBitmap]:
        """None."""
        return no_pages(self._npages)


class SimulatedLink:
    """The way to another host; see :class:`migrator.transport.Sender`.

    :param bytes_per_s: content of pages that it carries
    """

    compares_bytes = False

    def __init__(
        self,
        sources: SimulatedSources,
        guest: Guest,
        bytes_per_s: float,
        clock: Clock,
        costs: Costs,
    ) -> None:
        self._sources = sources
        self._page_sizes = {block.name: block.page_size for block in guest.blocks}
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._costs = costs
        self._due_s = -math.inf  # when the last byte that was sent was due
        self.sent_pages = 0

    async def send(self, dirty: Bitmaps, data: Bitmaps, *, guest_stands: bool = False) -> Sent:
        """See :meth:`migrator.transport.Sender.send`."""
        sent = Sent()
        zero_bytes = 0
        for name, size in self._page_sizes.items():
            held = dirty[name] & data[name]
            copied = held.minus(self._sources.zeros[name]).count()
            pages = dirty[name].count()
            sent.pages += pages
            sent.zero_pages += pages - copied
            sent.bytes += copied * size
            zero_bytes += (held.count() - copied) * size
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
        self, pages: Bitmaps, data: Bitmaps, *, guest_stands: bool = False
    ) -> dict[str, DirtyBitmap]:
        """All of them: what was written is taken to have changed."""
        nbytes = sum((pages[n] & data[n]).count() * size for n, size in self._page_sizes.items())
        self._clock.wait_ms(nbytes / self._costs.compare_bytes_per_s * 1000)
        return {name: some.copy() for name, some in pages.items()}


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
        link = SimulatedLink(self._sources, guest, bytes_per_s, clock, costs)
        plan = Plan(guest.blocks, (), was_running=True, other_ram_bytes=0, backends=())
        self._slowing = slowing = Slowing(throttling, self._sources, self._account)
        self._rounds = Rounds(plan, policy, slowing, self._sources, link, self._account)
        self._account.report.guest_bytes = plan.guest_bytes

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
