"""The rounds of a migration: collect, choose, decide, send; and the last ones, in the downtime."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np

from migrator.aio import in_thread
from migrator.errors import Aborted, Failed
from migrator.migration.account import Account
from migrator.migration.comparing import Comparing
from migrator.migration.ledger import Ledger
from migrator.migration.rate import Rate
from migrator.migration.slowing import Slowing
from migrator.policy.deferral import Chosen, Heat, room
from migrator.policy.downtime import predict
from migrator.policy.judge import Hot, Observation, Verdict
from migrator.policy.policies import Policy
from migrator.policy.throttling import slowed_alike
from migrator.report.phases import DOWNTIME, Phase
from migrator.tracking.readings import Collected, Readings
from migrator.transport import Sender
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import Block, PageSet

_log = logging.getLogger(__name__)
_STRIPE_WORDS = 16


class Rounds:
    """Send what is written, until the guest stands and nothing is left.

    Which pages the destination lacks is in :class:`~migrator.migration.ledger.Ledger`.

    :param blocks: what is moved
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        policy: Policy,
        slowing: Slowing,
        sources: Readings,
        transport: Sender,
        account: Account,
    ) -> None:
        self._blocks = tuple(blocks)
        self._policy = policy
        self._slowing = slowing
        self._sources = sources
        self._transport = transport
        self._account = account
        self._clock = account.clock
        self._heat = Heat(self._blocks)
        self._ledger = Ledger(self._blocks)
        self._rate = Rate()
        self._comparing = Comparing(policy, sources, transport, account, self._rate)
        self._again = (0, 0)
        self._collect_ms = 0.0
        self._looked_at = self._clock()
        self._seen: list[Observation] = []

    # -- the order ------------------------------------------------------------------------------

    async def copy_everything(self) -> None:
        """Send all pages; half way, look at what was written, to know early what is hot."""
        everything = PageSet.full(self._blocks)
        self._account.begin_copy(everything)
        self._looked_at = self._clock()
        if self._policy.defers:
            half = everything.each(_striped)
            await self._send(half)
            found, chosen = await self._look(backends_too=False, defer=True)
            dirty = self._ledger.take(found.merged.dirty, chosen.hot, chosen.left)
            # also what waits: a page that is at the destination already costs less in the end
            everything = everything - half
            # pages that are sent below, after the look, need not be sent again for what it found
            self._ledger.owe(dirty - everything - chosen.hot)
        await self._send(everything)
        self._account.end_round()
        # pages that are there already take less time: this rate is a guess until there is one
        self._rate.forget()

    async def until_converged(self) -> None:
        """Go on until the policy switches over.

        :raise Aborted: it gives up
        """
        while True:
            dirty, seen = await self._next()
            judge = self._policy.judge
            decision = judge.decide(seen, slowed_alike(seen, self._seen))
            decision = await self._slowing.consider(
                judge.limits, seen, self._seen, decision, self._heat.recent
            )
            self._seen.append(seen)
            self._account.decided(decision)
            if decision.verdict is Verdict.ABORT:
                raise Aborted(self._account.phases.current.value, decision.reason)
            if decision.hot is Hot.SEND:
                dirty |= await self._let_nothing_wait()
            await self._send(dirty - self._ledger.waiting)
            self._account.end_round()
            if decision.verdict is Verdict.SWITCH_OVER and not self._ledger.owed.any():
                return

    async def last(self, collecting: Phase, sending: Phase) -> int:
        """A round while the source stands still: nothing waits any more.

        :return: how many pages were sent
        """
        phases = self._account.phases
        if phases.current is not collecting:
            phases.enter(collecting)
        await self._slowing.let_go()
        found = await self._sources.collect(backends_too=False)
        dirty = self._ledger.take(found.merged.dirty)
        self._account.begin_round(found, dirty, self._ledger.waiting, self._slowing.percent)
        dirty = await self._comparing.while_it_stands(dirty)
        self._account.note_dirty(dirty)
        if phases.current is not sending:
            phases.enter(sending)
        return await self._send_last(dirty)

    async def last_by_comparison(self, data: PageSet) -> None:
        """The last round where the source's process has ended: send all pages that differ.

        Its page tables tell nothing any more. Its RAM files do, which are mapped here.

        :param data: pages that hold data at the source
        """
        everything = PageSet.full(self._blocks)
        differing = await self._transport.changed(everything, data, guest_stands=True)
        self._account.begin_by_comparison(everything, differing)
        await self._send_last(differing)

    # -- collecting -----------------------------------------------------------------------------

    async def _next(self) -> tuple[PageSet, Observation]:
        """Collect, let what is hot wait, leave out what is unchanged.

        :return: what is not at the destination, and what is to be decided upon
        """
        looked_at = self._looked_at
        found, chosen = await self._look(backends_too=True, defer=self._policy.defers)
        dirty = self._ledger.take(found.merged.dirty, chosen.hot, chosen.left)
        waiting = self._ledger.waiting
        self._account.begin_round(found, dirty, waiting, self._slowing.percent)
        self._account.note_dirty(dirty)
        interval_s = self._looked_at - looked_at
        unchanged = await self._comparing.unchanged(dirty - waiting)
        dirty = dirty - unchanged
        self._account.unchanged(unchanged)
        return dirty, self._observed(dirty, interval_s, handed_over=found.handed_over)

    def _observed(self, dirty: PageSet, interval_s: float, *, handed_over: bool) -> Observation:
        rate, comparing = self._rate.bytes_per_s, self._comparing
        compare_bytes = self._sources.suspect_data().nbytes()
        dirty_bytes, waiting_bytes = dirty.nbytes(), self._ledger.waiting.nbytes()
        rest_bytes = (dirty - self._ledger.waiting).nbytes()
        gap_s = rest_bytes / rate + self._policy.judge.fixed.prepare_ms / 1000
        window_bytes, window_s = self._heat.lately(gap_s)
        later_bytes = self._heat.at_most(gap_s + waiting_bytes / rate)
        if comparing.is_worth_it:
            compare_bytes += int(window_bytes)
            window_bytes *= 1 - comparing.sampled.share
            later_bytes *= 1 - comparing.sampled.share
        asked_bytes, again_bytes = self._again
        return Observation(
            round=self._account.round.number,
            elapsed_s=self._account.phases.elapsed_s,
            dirty_bytes=dirty_bytes,
            bytes_per_s=rate,
            compare_bytes=compare_bytes,
            compare_bytes_per_s=comparing.bytes_per_s,
            waiting_bytes=waiting_bytes,
            interval_s=interval_s,
            asked_bytes=asked_bytes,
            again_bytes=again_bytes,
            collect_ms=self._collect_ms,
            gap_s=gap_s,
            window_bytes=window_bytes,
            window_s=window_s,
            later_bytes=later_bytes,
            throttle_percent=self._slowing.percent,
            handed_over=handed_over,
        )

    async def _look(self, *, backends_too: bool, defer: bool) -> tuple[Collected, Chosen]:
        """Read the sources, and choose what waits from now on.

        What is chosen between the scan and the protection of what it found is written meanwhile
        without being noticed, but by the protection itself.
        """
        if defer:
            scan = await self._sources.scan()
            # a byte a page: of large guests, too much for the event loop
            chosen = await in_thread(self._heat.choose, scan.written, self._room())
            if not self._sources.leaves:
                chosen = chosen.protected()
            found = await self._sources.collect(
                backends_too=backends_too, scan=scan, left=chosen.left
            )
        else:
            chosen = Chosen.nothing(self._blocks)
            found = await self._sources.collect(backends_too=backends_too)
        looked_at = self._clock()
        written = found.merged.dirty
        self._again = self._heat.again(written)
        await in_thread(self._heat.look, written, looked_at - self._looked_at, chosen)
        self._looked_at = looked_at
        self._collect_ms = found.collect_ms + found.merge_ms - found.backends_ms
        return found, chosen

    async def _let_nothing_wait(self) -> PageSet:
        """Protect what was left unprotected; return what was written by then."""
        left = self._ledger.left
        self._ledger.protected()
        if not left.any():
            return left
        found = await self._sources.collect(backends_too=False)
        self._heat.protected()
        return found.merged.dirty

    def _room(self) -> int:
        judge = self._policy.judge
        fixed_ms = sum(predict(judge.fixed, send_bytes=0, bytes_per_s=1.0).values())
        return room(judge.limits.downtime_ms, fixed_ms, self._rate.bytes_per_s)

    # -- sending --------------------------------------------------------------------------------

    async def _send(self, dirty: PageSet) -> None:
        phases = self._account.phases
        started = self._clock()
        async with self._account.sending(lambda: self._transport.sent_pages):
            sent = await self._transport.send(
                dirty, self._sources.data, guest_stands=phases.current in DOWNTIME
            )
        spent_s = self._clock() - started
        if sent.undelivered is not None:
            self._ledger.owe(sent.undelivered)
        self._rate.note(sent.bytes, max(spent_s, sent.least_s))
        self._account.sent(sent, spent_s, self._rate.measured)
        if sent.error is not None:
            self._account.end_round()
            raise Failed(phases.current.value, str(sent.error)) from sent.error

    async def _send_last(self, dirty: PageSet) -> int:
        await self._send(dirty)
        self._account.end_last_round()
        if self._ledger.owed.any():
            raise Failed(
                self._account.phases.current.value, "the last pages could not be delivered"
            )
        return self._account.round.sent_pages


def _striped(pages: DirtyBitmap) -> DirtyBitmap:
    """Half of the pages, from everywhere: in stripes."""
    words = pages.words.copy()
    words[np.arange(len(words)) // _STRIPE_WORDS % 2 == 1] = 0
    return DirtyBitmap(pages.npages, words)
