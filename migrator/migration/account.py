"""The account of a migration while it runs: its phases, its rounds, its report.

All that is in the report is written here; the others say what happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from itertools import chain

from migrator.migration.handover import HandedOver
from migrator.policy.judge import Decision
from migrator.report.dirtymap import Recorder
from migrator.report.phases import DOWNTIME, Phase, Phases
from migrator.report.report import Progress, Report, Round, Status
from migrator.tracking.readings import Collected
from migrator.transport import Comparison, Sent
from tracker.bits.pageset import PageSet
from tracker.memory.ram import RamBlock

_log = logging.getLogger(__name__)
_SHOW_S = 0.1

Watch = Callable[[Progress], None]


class Account:
    """What has happened so far.

    :ivar phases: where the migration is
    :ivar report: what it will end with
    :ivar round: the round that is under way, or was last
    :ivar bytes_per_s: the rate of the last sending that told one; 0 before that
    :ivar clock: seconds, by which all of it is timed
    :ivar note: what people should know meanwhile
    :param watch: called in the event loop whenever something changed
    """

    def __init__(
        self, watch: Watch = lambda _: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._watch = watch
        self._sent_pages: Callable[[], int] = lambda: 0
        self._page_sizes: set[int] = set()
        self._recorder: Recorder | None = None
        self.clock = clock
        self.phases = Phases(lambda _: self.show(), clock)
        self.report = Report()
        self.round = Round(0, {}, {}, 0)
        self.bytes_per_s = 0.0
        self.note = ""

    def of(
        self, blocks: Sequence[RamBlock], warnings: Iterable[str] = (), *, dirty_map: bool = False
    ) -> None:
        """Tell what is moved.

        :param warnings: sentences for people
        :param dirty_map: remember where it was dirty
        """
        self._page_sizes = {block.page_size for block in blocks}
        self._recorder = Recorder(blocks) if dirty_map else None
        self.report.guest_bytes = sum(block.size for block in blocks)
        self.report.warnings += warnings

    def asked(
        self, policy: str, downtime_limit_ms: float, stopped_by: str, *, memory_only: bool
    ) -> None:
        """Tell what the caller asked for; see the members of the report of these names."""
        report = self.report
        report.policy, report.downtime_limit_ms = policy, downtime_limit_ms
        report.stopped_by, report.memory_only = stopped_by, memory_only

    # -- a round --------------------------------------------------------------------------------

    def begin_copy(self, everything: PageSet) -> None:
        """Begin round 0, the copy of everything."""
        pages = everything.count()
        self._begin(Round(0, {"all": pages}, {}, pages, dirty_bytes=everything.nbytes()))

    def begin_round(
        self, found: Collected, dirty: PageSet, waiting: PageSet, throttle_percent: int
    ) -> None:
        """Begin a round: its pages are known, and not yet sent.

        :param dirty: all that the destination lacks
        :param waiting: of these, pages that wait for the end
        :param throttle_percent: of their time, how much writers are made to wait
        """
        merged = found.merged
        (dirty_pages, dirty_bytes), (waiting_pages, waiting_bytes) = (
            dirty.measure(),
            waiting.measure(),
        )
        self._begin(
            Round(
                number=self.round.number + 1,
                dirty_pages_by_source=dict(merged.pages_by_source),
                only_by_source=dict(merged.only_by_source),
                pages_by_several=merged.pages_by_several,
                dirty_pages=dirty_pages,
                waiting_pages=waiting_pages,
                throttle_percent=throttle_percent,
                collect_ms=found.collect_ms,
                merge_ms=found.merge_ms,
                dirty_bytes=dirty_bytes,
                waiting_bytes=waiting_bytes,
            )
        )

    def begin_by_comparison(self, compared: PageSet, differing: PageSet) -> None:
        """Begin a round of pages that were found by comparing both sides."""
        pages = differing.count()
        begun = Round(self.round.number + 1, {}, {}, pages, dirty_bytes=differing.nbytes())
        begun.compared_pages, begun.differing_pages = compared.count(), pages
        self._begin(begun)

    def _begin(self, begun: Round) -> None:
        self.round = begun
        begun.began_s = self.phases.elapsed_s - (begun.collect_ms + begun.merge_ms) / 1000
        self.show()

    def unchanged(self, pages: PageSet) -> None:
        """Tell which pages were written, and are what the destination has."""
        self.round.unchanged_pages = pages.count()

    def compared(
        self,
        suspects: PageSet,
        differing: PageSet,
        unchanged: PageSet | None,
        rest: PageSet,
        spent_s: float,
    ) -> None:
        """Tell of a comparison in the downtime.

        :param suspects: pages that may have been written
        :param differing: of these, pages that differ
        :param unchanged: pages that were written, and do not differ; ``None``: not looked for
        :param rest: what is left to be sent
        :param spent_s: how long it took
        """
        current = self.round
        current.compared_pages, current.differing_pages = suspects.count(), differing.count()
        if unchanged is not None:
            current.unchanged_pages = unchanged.count()
        current.dirty_pages, current.dirty_bytes = rest.measure()
        current.compare_ms = spent_s * 1000

    def decided(self, decision: Decision) -> None:
        """Tell what was decided in this round."""
        _log.info("round %d: %s", self.round.number, decision.reason)
        self.round.decision = decision.reason
        self.round.expected_downtime_ms = decision.expected_downtime_ms
        self.report.predicted_downtime_ms = decision.expected_downtime_ms
        self.report.predicted_downtime = dict(decision.terms)

    def slowed(self, percent: int) -> None:
        """Tell for how much of their time writers wait from now on; 0: for none."""
        self.note = f"writers slowed to {100 - percent} %" if percent else ""
        if percent:
            self.round.throttle_percent = percent
            self.report.throttle_percent = max(percent, self.report.throttle_percent)
        self.show()

    def noted(self, note: str) -> None:
        """Tell what people should know until the end, or until there is another note."""
        self.note = note

    def sent(self, sent: Sent, spent_s: float, bytes_per_s: float) -> None:
        """Tell what came of a sending.

        :param bytes_per_s: the rate, as of this sending and those before; 0 if none told
        """
        current = self.round
        current.sent_pages += sent.pages
        current.zero_pages += sent.zero_pages
        current.sent_bytes += sent.bytes
        current.wire_bytes += sent.wire_bytes
        current.send_ms += spent_s * 1000
        self.report.reconnects += sent.reconnected
        self.bytes_per_s = bytes_per_s

    def end_last_round(self) -> None:
        """Tell that a round in the downtime has been sent."""
        self.report.final_pages += self.round.sent_pages
        self.end_round()

    def note_dirty(self, dirty: PageSet) -> None:
        """Tell what is dirty in this round.

        :param dirty: while the guest stands, nobody may change it any more
        """
        if self._recorder is not None:
            stands = self.phases.current in DOWNTIME
            self._recorder.note(self.round.number, self.round.began_s, dirty, later=stands)

    def end_round(self) -> None:
        """Tell that the pages of the round have been sent, or that sending them failed."""
        self.round.ended_s = self.phases.elapsed_s
        self.report.add(self.round)
        self.show()

    @contextlib.asynccontextmanager
    async def sending(self, sent_pages: Callable[[], int]) -> AsyncIterator[None]:
        """Show meanwhile how far a sending has come."""
        self._sent_pages = sent_pages
        ticker = asyncio.create_task(self._show_now_and_then())
        try:
            yield
        finally:
            ticker.cancel()
            self._sent_pages = lambda: 0

    async def _show_now_and_then(self) -> None:
        while True:
            self.show()
            await asyncio.sleep(_SHOW_S)

    # -- the whole ------------------------------------------------------------------------------

    def verified(self, found: Comparison) -> None:
        """Tell what comparing all of RAM found."""
        self.report.verified_pages, self.report.mismatched_pages = found.pages, found.mismatched

    def handed_over(self, how: HandedOver) -> None:
        """Tell what came of the handover."""
        self.report.downtime_ms = how.downtime_ms
        self.report.device_state_bytes = how.device_state_bytes
        self.report.warnings += how.warnings

    def let_go(self, qemu_ram_transferred: int | None) -> None:
        """Tell how many bytes of RAM QEMU has sent itself."""
        self.report.qemu_ram_transferred = qemu_ram_transferred

    def known(self, facts: Sequence[str]) -> None:
        """Tell what is known where it is not known which side runs."""
        self.report.known = list(facts)

    def finish(self, status: Status, reason: str) -> None:
        """Complete the report."""
        self.phases.end()
        report = self.report
        report.status = status
        report.reason = reason
        report.phases = self.phases.milliseconds()
        report.total_ms = self.phases.total_ms
        report.dirty_map = self._recorder.dirty_map() if self._recorder is not None else None
        report.downtime_phases = [p.value for p in DOWNTIME if p.value in report.phases]
        if report.verified_pages is not None:
            report.verify_ms = report.phases.get(Phase.VERIFY.value)
        if report.downtime_ms is not None:
            report.downtime_ms -= report.verify_ms or 0.0
        self.show()

    def show(self) -> None:
        """Tell whoever watches."""
        try:
            self._watch(self._progress())
        # theirs, whatever it is; rich exits the program where the terminal is gone, which would end
        # the event loop in the middle of a migration
        except (Exception, SystemExit):  # noqa: BLE001
            _log.exception("whoever watches the migration failed; it goes on unwatched")
            self._watch = lambda _: None

    def _progress(self) -> Progress:
        sent_pages = self.round.sent_pages + self._sent_pages()
        rounds = chain([self.round], reversed(self.report.rounds))
        expected = (r.expected_downtime_ms for r in rounds if r.expected_downtime_ms is not None)
        return Progress(
            phase=self.phases.current.value,
            round=self.round.number,
            dirty_pages=self.round.dirty_pages,
            sent_pages=sent_pages,
            total_sent_pages=self.report.pages_sent,
            bytes_per_s=self.bytes_per_s,
            expected_downtime_ms=next(expected, None),
            left_s=self._left_s(self.round.dirty_pages - self.round.waiting_pages - sent_pages),
            note=self.note,
        )

    def _left_s(self, pages: int) -> float | None:
        sends = self.phases.current in (Phase.COPY, Phase.ROUNDS)
        if not sends or not self.bytes_per_s or len(self._page_sizes) != 1:
            return None
        (page_size,) = self._page_sizes
        return max(pages, 0) * page_size / self.bytes_per_s
