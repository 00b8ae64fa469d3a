"""Slowing writers in one migration: what is decided is done, shown, and undone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from migrator.aio import in_thread
from migrator.migration.account import Account
from migrator.policy.judge import Decision, Limits, Observation, Verdict
from migrator.policy.throttling import EASED_MS, LONGEST_MS, Throttling
from migrator.tracking.readings import Readings
from tracker.bits.pageset import PageSet
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
        hot: Callable[[], PageSet],
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
                self._account.noted(f"writers cannot be slowed: {error}")
            else:
                self.percent = percent
                self._account.slowed(percent)
                said = f"expected downtime {decision.expected_downtime_ms:.0f} ms"
                decision = replace(decision, verdict=Verdict.CONTINUE, reason=said)
        note = self._account.note
        return replace(decision, reason=f"{decision.reason}; {note}") if note else decision

    async def ease(self) -> None:
        """Let them wait for moments only: the guest is about to be stopped."""
        if self.percent:
            await self._sources.slow(self.percent, EASED_MS)

    async def let_go(self) -> None:
        """Let nobody wait any more."""
        if self.percent:
            await self._sources.slow(0, 0.0)
            self.percent = 0
            self._account.slowed(0)
