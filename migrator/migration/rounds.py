"""The rounds of a migration: collect, choose, decide, send; and the last ones, in the downtime."""

from __future__ import annotations

import logging

import numpy as np

from migrator.aio import in_thread
from migrator.errors import Aborted, Failed, LinkError
from migrator.migration.slowing import Slowing
from migrator.policy import skipping
from migrator.policy.deferral import Heat, room
from migrator.policy.downtime import predict
from migrator.policy.judge import Decision, Hot, Observation, Verdict
from migrator.policy.policies import Policy
from migrator.policy.skipping import Sampled
from migrator.policy.throttling import slowed_alike
from migrator.preflight.plan import Plan
from migrator.report.account import Account
from migrator.report.phases import DOWNTIME, Phase
from migrator.report.report import Round
from migrator.tracking.readings import Collected, Readings
from migrator.transport import Sender
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import Bitmaps, MutableBitmaps, any_of, count, no_pages, union, without

_log = logging.getLogger(__name__)
_UNMEASURED_BYTES_PER_S = 500e6  # nothing but zeros was sent so far
_COMPARED_BYTES_PER_S = 2e9  # nothing was compared so far
_TELLING_BYTES = 1 << 20  # a smaller sending says nothing about the rate
_STRIPE_WORDS = 16


class Rounds:
    """Send what is written, until the guest stands and nothing is left.

    Until the destination has it, a page that was written is known in one of three places. The
    *sources* report it at the next collection. *Owed* is what a sending did not deliver. *Waiting*
    is what is written again and again: it is not sent before the end, and may be unprotected, so
    that nobody knows whether it is still written.
    """

    def __init__(
        self,
        plan: Plan,
        policy: Policy,
        slowing: Slowing,
        sources: Readings,
        transport: Sender,
        account: Account,
    ) -> None:
        self._plan = plan
        self._policy = policy
        self._slowing = slowing
        self._sources = sources
        self._transport = transport
        self._account = account
        self._clock = account.clock
        self._page_sizes = {block.name: block.page_size for block in plan.source}
        self._npages = {block.name: block.npages for block in plan.source}
        self._heat = Heat(self._npages, self._page_sizes)
        self._owed = no_pages(self._npages)
        self._waiting = no_pages(self._npages)
        self._left = no_pages(self._npages)  # of what waits: unprotected
        self._asked_bytes = self._again_bytes = 0
        self._collect_ms = 0.0
        self._sent_bytes = self._sent_s = 0.0
        self._looked_at = self._clock()
        self._sampled = Sampled(0, 0, 0.0)
        self._seen: list[Observation] = []

    # -- the order ------------------------------------------------------------------------------

    async def copy_everything(self) -> None:
        """Send all pages; half way, look at what was written, to know early what is hot."""
        everything = {name: DirtyBitmap.full(n) for name, n in self._npages.items()}
        pages, nbytes = self._pages_and_bytes(everything)
        self._account.begin(Round(0, {"all": pages}, {}, pages, dirty_bytes=nbytes))
        self._looked_at = self._clock()
        if self._policy.defers:
            half = {name: _striped(pages) for name, pages in everything.items()}
            await self._send(half)
            found = await self._look(backends_too=False, defer=True)
            # also what waits: a page that is at the destination already costs less in the end
            everything = without(everything, half)
            # pages that are sent below, after the look, need not be sent again for what it found
            self._add_owed(without(without(found.merged.bitmaps, everything), self._waiting))
        await self._send(everything)
        self._account.end_round()
        # pages that are there already take less time: this rate is a guess until there is one
        self._sent_bytes = self._sent_s = 0.0

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
            self._note(decision)
            if decision.verdict is Verdict.ABORT:
                raise Aborted(self._account.phases.current.value, decision.reason)
            if decision.hot is Hot.SEND:
                await self._let_nothing_wait(dirty)
            await self._send(without(dirty, self._waiting))
            self._account.end_round()
            if decision.verdict is Verdict.SWITCH_OVER and not any_of(self._owed):
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
        waited, self._waiting = self._waiting, no_pages(self._npages)
        dirty = self._begin(found, waited)
        await self._compare_while_it_stands(dirty)
        self._account.note_dirty(dirty)
        if phases.current is not sending:
            phases.enter(sending)
        await self._send(dirty)
        self._account.report.final_pages += self._account.round.sent_pages
        self._account.end_round()
        if any_of(self._owed):
            raise Failed(phases.current.value, "the last pages could not be delivered")
        return self._account.round.sent_pages

    async def last_by_comparison(self, data: Bitmaps) -> None:
        """The last round where the source's process has ended: send all pages that differ.

        Its page tables tell nothing any more. Its RAM files do, which are mapped here.

        :param data: pages that hold data at the source
        """
        phases = self._account.phases
        everything = {name: DirtyBitmap.full(n) for name, n in self._npages.items()}
        differing = await self._transport.changed(everything, data, guest_stands=True)
        pages, nbytes = self._pages_and_bytes(differing)
        number = self._account.round.number + 1
        self._account.begin(Round(number, {}, {}, pages, dirty_bytes=nbytes))
        self._account.round.compared_pages, self._account.round.differing_pages = (
            count(everything),
            pages,
        )
        await self._send(differing)
        self._account.report.final_pages += self._account.round.sent_pages
        self._account.end_round()
        if any_of(self._owed):
            raise Failed(phases.current.value, "the last pages could not be delivered")

    # -- collecting -----------------------------------------------------------------------------

    async def _next(self) -> tuple[MutableBitmaps, Observation]:
        """Collect, let what is hot wait, leave out what is unchanged.

        :return: what is not at the destination, and what is to be decided upon
        """
        looked_at, waited = self._looked_at, self._waiting
        found = await self._look(backends_too=True, defer=self._policy.defers)
        dirty = self._begin(found, waited)
        self._account.note_dirty(dirty)
        interval_s = self._looked_at - looked_at
        unchanged = await self._unchanged(without(dirty, self._waiting))
        dirty = without(dirty, unchanged)
        self._account.round.unchanged_pages = count(unchanged)
        compare_bytes = self._bytes_of(self._sources.suspect_data())
        rest_bytes = self._bytes_of(without(dirty, self._waiting))
        gap_s = rest_bytes / self._bytes_per_s() + self._policy.judge.fixed.prepare_ms / 1000
        window_bytes, window_s = self._heat.lately(gap_s)
        later_bytes = self._heat.at_most(
            gap_s + self._bytes_of(self._waiting) / self._bytes_per_s()
        )
        if self._will_compare():
            compare_bytes += int(window_bytes)
            window_bytes *= 1 - self._sampled.share
            later_bytes *= 1 - self._sampled.share
        seen = Observation(
            round=self._account.round.number,
            elapsed_s=self._account.phases.elapsed_s,
            dirty_bytes=self._bytes_of(dirty),
            bytes_per_s=self._bytes_per_s(),
            compare_bytes=compare_bytes,
            compare_bytes_per_s=(
                self._sampled.bytes_per_s if self._will_compare() else _COMPARED_BYTES_PER_S
            ),
            waiting_bytes=self._bytes_of(self._waiting),
            interval_s=interval_s,
            asked_bytes=self._asked_bytes,
            again_bytes=self._again_bytes,
            collect_ms=self._collect_ms,
            gap_s=gap_s,
            window_bytes=window_bytes,
            window_s=window_s,
            later_bytes=later_bytes,
            throttle_percent=self._slowing.percent,
            handed_over=found.handed_over,
        )
        return dirty, seen

    def _begin(self, found: Collected, waited: MutableBitmaps) -> MutableBitmaps:
        """Begin a round with all that is not at the destination.

        :param waited: until it was found
        """
        dirty = union(found.merged.bitmaps, self._owed, waited)
        self._owed = no_pages(self._npages)
        (dirty_pages, dirty_bytes), (waiting_pages, waiting_bytes) = (
            self._pages_and_bytes(pages) for pages in (dirty, self._waiting)
        )
        self._account.begin(
            Round(
                number=self._account.round.number + 1,
                dirty_pages_by_source=dict(found.merged.pages_by_source),
                only_by_source=dict(found.merged.only_by_source),
                pages_by_several=found.merged.pages_by_several,
                dirty_pages=dirty_pages,
                waiting_pages=waiting_pages,
                throttle_percent=self._slowing.percent,
                collect_ms=found.collect_ms,
                merge_ms=found.merge_ms,
                dirty_bytes=dirty_bytes,
                waiting_bytes=waiting_bytes,
            )
        )
        return dirty

    async def _look(self, *, backends_too: bool, defer: bool) -> Collected:
        """Read the sources, and choose what waits from now on."""
        hot, left = no_pages(self._npages), no_pages(self._npages)

        def choose(written: Bitmaps) -> MutableBitmaps:
            hot.update(self._heat.hot(written, self._room()))
            left.update(self._heat.unasked(hot))
            return left

        found = await self._sources.collect(
            backends_too=backends_too, leave=choose if defer else None
        )
        looked_at = self._clock()
        written = found.merged.bitmaps
        self._asked_bytes, self._again_bytes = self._heat.again(written)
        # a byte a page: of large guests, too much for the event loop
        await in_thread(self._heat.look, written, looked_at - self._looked_at)
        if self._sources.leaves:
            self._heat.leave(hot, left)
        self._looked_at, self._waiting, self._left = looked_at, hot, left
        self._collect_ms = found.collect_ms - found.backends_ms
        return found

    async def _let_nothing_wait(self, dirty: MutableBitmaps) -> None:
        """Protect what was left unprotected, and add what was written by then."""
        self._waiting = no_pages(self._npages)
        if not any_of(self._left):
            return
        self._left = no_pages(self._npages)
        found = await self._sources.collect(backends_too=False)
        self._heat.protected()
        for name, pages in found.merged.bitmaps.items():
            dirty[name] |= pages

    def _note(self, decision: Decision) -> None:
        current, report = self._account.round, self._account.report
        _log.info("round %d: %s", current.number, decision.reason)
        current.decision = decision.reason
        current.expected_downtime_ms = decision.expected_downtime_ms
        report.predicted_downtime_ms = decision.expected_downtime_ms
        report.predicted_downtime = dict(decision.terms)

    # -- comparing ------------------------------------------------------------------------------

    async def _unchanged(self, dirty: Bitmaps) -> MutableBitmaps:
        """Of the pages, those that the destination has already, if they are worth looking for.

        They were protected before they are compared: what changes from now on is reported.
        """
        none = no_pages(self._npages)
        if not self._compares() or not skipping.worth_sampling(self._bytes_of(dirty)):
            return none
        try:
            some = {name: _sample(pages) for name, pages in dirty.items()}
            started = self._clock()
            unchanged = without(some, await self._transport.changed(some, self._sources.data))
            self._sampled = Sampled(
                self._bytes_of(some), self._bytes_of(unchanged), self._clock() - started
            )
            if not self._will_compare():
                return unchanged
            rest = without(dirty, some)
            more = await self._transport.changed(rest, self._sources.data)
            return union(unchanged, without(rest, more))
        except LinkError as error:  # sending them will make the connections again
            _log.info("nothing is compared: %s", error)
            return none

    async def _compare_while_it_stands(self, dirty: MutableBitmaps) -> None:
        """Compare what may have been written without anybody's being told; it will be sent."""
        suspects = self._sources.take_suspects(dirty)
        all_of_them = self._will_compare() and skipping.worth_sampling(self._bytes_of(dirty))
        asked = union(suspects, dirty) if all_of_them else suspects
        if not any_of(asked):
            return
        if self._account.phases.current is Phase.FINAL_COLLECT:
            self._account.phases.enter(Phase.COMPARE)
        started = self._clock()
        changed = await self._transport.changed(asked, self._sources.data, guest_stands=True)
        current = self._account.round
        current.compared_pages = count(suspects)
        current.differing_pages = count({n: changed[n] & suspects[n] for n in suspects})
        if all_of_them:
            current.unchanged_pages = count(without(dirty, changed))
            dirty.update(changed)
        else:
            for name, pages in changed.items():
                dirty[name] |= pages
        current.dirty_pages, current.dirty_bytes = self._pages_and_bytes(dirty)
        current.compare_ms = (self._clock() - started) * 1000

    def _compares(self) -> bool:
        wanted = self._policy.compares
        return wanted == "digests" or (wanted == "bytes" and self._transport.compares_bytes)

    def _will_compare(self) -> bool:
        return skipping.worth_comparing(self._sampled, self._bytes_per_s())

    # -- sending --------------------------------------------------------------------------------

    async def _send(self, dirty: Bitmaps) -> None:
        phases, current = self._account.phases, self._account.round
        started = self._clock()
        async with self._account.sending(lambda: self._transport.sent_pages):
            sent = await self._transport.send(
                dirty, self._sources.data, guest_stands=phases.current in DOWNTIME
            )
        spent_s = self._clock() - started
        self._add_owed(sent.undelivered)
        self._account.report.reconnects += sent.reconnected
        current.sent_pages += sent.pages
        current.zero_pages += sent.zero_pages
        current.sent_bytes += sent.bytes
        current.wire_bytes += sent.wire_bytes
        current.send_ms += spent_s * 1000
        if sent.bytes >= _TELLING_BYTES or (sent.bytes and not self._account.bytes_per_s):
            # one sending may be luck: older ones count too, each half as much as the next
            self._sent_bytes, self._sent_s = self._sent_bytes / 2, self._sent_s / 2
            self._sent_bytes += sent.bytes
            self._sent_s += max(spent_s, sent.least_s)
            self._account.bytes_per_s = self._sent_bytes / self._sent_s
        if sent.error is not None:
            self._account.end_round()
            raise Failed(phases.current.value, str(sent.error)) from sent.error

    def _bytes_per_s(self) -> float:
        return self._account.bytes_per_s or _UNMEASURED_BYTES_PER_S

    def _room(self) -> int:
        judge = self._policy.judge
        fixed_ms = sum(predict(judge.fixed, send_bytes=0, bytes_per_s=1.0).values())
        return room(judge.limits.downtime_ms, fixed_ms, self._bytes_per_s())

    # -- pages ----------------------------------------------------------------------------------

    def _add_owed(self, pages: Bitmaps) -> None:
        for name, owed in pages.items():
            self._owed[name] |= owed

    def _bytes_of(self, pages: Bitmaps) -> int:
        return self._pages_and_bytes(pages)[1]

    def _pages_and_bytes(self, pages: Bitmaps) -> tuple[int, int]:
        counts = {name: pages[name].count() for name in self._page_sizes}
        nbytes = sum(counts[name] * size for name, size in self._page_sizes.items())
        return sum(counts.values()), nbytes


def _striped(pages: DirtyBitmap) -> DirtyBitmap:
    """Half of the pages, from everywhere: in stripes."""
    words = pages.words.copy()
    words[np.arange(len(words)) // _STRIPE_WORDS % 2 == 1] = 0
    return DirtyBitmap(pages.npages, words)


def _sample(pages: DirtyBitmap) -> DirtyBitmap:
    """Some of the pages, from everywhere where there are any."""
    words = pages.words.copy()
    words[np.cumsum(words != 0) % skipping.SAMPLE != 1] = 0
    return DirtyBitmap(pages.npages, words)
