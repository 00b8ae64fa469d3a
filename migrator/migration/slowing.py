"""Slowing writers in one migration: what is decided is done, shown, and undone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from migrator.aio import in_thread
from migrator.policy.judge import Decision, Limits, Observation, Verdict
from migrator.policy.throttling import EASED_MS, LONGEST_MS, Throttling
from migrator.report.account import Account
from migrator.tracking.readings import Readings
from tracker.bits.pageset import Bitmaps
from tracker.errors import TrackerError

_log = logging.getLogger(__name__)


class Slowing:
    """The writers of one guest.

    :ivar percent: of their time, how much they are made to wait
    """

    def __init__(self, throttling: Throttling, sources: Readings, account: Account) -> None:
        self._throttling = throttling
        self._sources = sources
        self._account = account
        self.percent = 0

    async def consider(
        self,
        limits: Limits,
        seen: Observation,
        before: Sequence[Observation],
        decision: Decision,
        hot: Callable[[], Bitmaps],
    ) -> Decision:
        """Slow them more, if that is better than to go on as before, or to give up.

        :param before: what was seen in earlier rounds, the first first
        :param hot: what is written most
        :return: what is to be done after all
        """
        percent = self._throttling.percent(limits, seen, before, decision)
        if percent > self.percent:
            try:
                await self._sources.slow_writers(percent, LONGEST_MS, await in_thread(hot))
            except TrackerError as error:
                _log.warning("writers cannot be slowed: %s", error)
                self._throttling = Throttling(0)
                await self.let_go()
                self._account.note = f"writers cannot be slowed: {error}"
            else:
                self._note(percent)
                self._account.round.throttle_percent = percent
                report = self._account.report
                report.throttle_percent = max(percent, report.throttle_percent)
                said = f"expected downtime {decision.expected_downtime_ms:.0f} ms"
                decision = replace(decision, verdict=Verdict.CONTINUE, reason=said)
        note = self._account.note
        return replace(decision, reason=f"{decision.reason}; {note}") if note else decision

    def _note(self, percent: int) -> None:
        self.percent = percent
        self._account.note = f"writers slowed to {100 - percent} %" if percent else ""
        self._account.show()

    async def ease(self) -> None:
        """Let them wait for moments only: the guest is about to be stopped."""
        if self.percent:
            await self._sources.slow(self.percent, EASED_MS)

    async def let_go(self) -> None:
        """Let nobody wait any more."""
        if self.percent:
            await self._sources.slow(0, 0.0)
            self._note(0)
