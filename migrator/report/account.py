"""The account of a migration while it runs: its phases, its rounds, and who is told of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from itertools import chain

from migrator.report.dirtymap import Recorder
from migrator.report.phases import DOWNTIME, Phase, Phases
from migrator.report.report import Progress, Report, Round
from tracker.bits.bitmap import DirtyBitmap
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

    def of(self, blocks: tuple[RamBlock, ...], *, dirty_map: bool = False) -> None:
        """Tell what is moved.

        :param dirty_map: remember where it was dirty
        """
        self._page_sizes = {block.page_size for block in blocks}
        self._recorder = Recorder(blocks) if dirty_map else None

    def begin(self, begun: Round) -> None:
        """Begin a round: its pages are known, and not yet sent."""
        self.round = begun
        begun.began_s = self.phases.elapsed_s - (begun.collect_ms + begun.merge_ms) / 1000
        self.show()

    def note_dirty(self, dirty: Mapping[str, DirtyBitmap]) -> None:
        """Tell what is dirty in this round.

        :param dirty: while the guest stands, nobody may change it any more
        """
        if self._recorder is not None:
            stands = self.phases.current in DOWNTIME
            self._recorder.note(self.round.number, self.round.began_s, dirty, later=stands)

    def end_round(self) -> None:
        """Its pages have been sent, or it has failed."""
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

    def finish(self, status: str, reason: str) -> None:
        """Complete the report."""
        self.phases.end()
        report = self.report
        report.status = status  # type: ignore[assignment]
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
