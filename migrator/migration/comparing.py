"""Comparing pages with what the destination has, where that saves sending them."""

from __future__ import annotations

import logging

import numpy as np

from migrator.errors import LinkError
from migrator.migration.account import Account
from migrator.migration.rate import Rate
from migrator.policy import skipping
from migrator.policy.policies import Policy
from migrator.policy.skipping import Sampled
from migrator.report.phases import Phase
from migrator.tracking.readings import Readings
from migrator.transport import Sender
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet

_log = logging.getLogger(__name__)
_COMPARED_BYTES_PER_S = 2e9  # nothing was compared so far


class Comparing:
    """Finds pages that were written, but are what the destination has.

    :ivar sampled: what the last sample of written pages told
    """

    def __init__(
        self, policy: Policy, sources: Readings, transport: Sender, account: Account, rate: Rate
    ) -> None:
        self._wanted = policy.compares == "digests" or (
            policy.compares == "bytes" and transport.compares_bytes
        )
        self._sources = sources
        self._transport = transport
        self._account = account
        self._clock = account.clock
        self._rate = rate
        self.sampled = Sampled(0, 0, 0.0)

    @property
    def is_worth_it(self) -> bool:
        """Whether comparing takes less time than sending what it saves."""
        return skipping.worth_comparing(self.sampled, self._rate.bytes_per_s)

    @property
    def bytes_per_s(self) -> float:
        """How fast pages are compared, or a guess."""
        return self.sampled.bytes_per_s if self.is_worth_it else _COMPARED_BYTES_PER_S

    async def unchanged(self, dirty: PageSet) -> PageSet:
        """Find pages that the destination has already, if they are worth looking for.

        The pages were protected before they are compared: what changes from now on is reported.
        """
        none = PageSet.empty(dirty.blocks)
        if not self._wanted or not skipping.worth_sampling(dirty.nbytes()):
            return none
        try:
            some = dirty.each(_sample)
            started = self._clock()
            unchanged = some - await self._transport.changed(some, self._sources.data)
            spent_s = self._clock() - started
            self.sampled = Sampled(some.nbytes(), unchanged.nbytes(), spent_s)
            if not self.is_worth_it:
                return unchanged
            rest = dirty - some
            return unchanged | (rest - await self._transport.changed(rest, self._sources.data))
        except LinkError as error:  # sending them will make the connections again
            _log.info("nothing is compared: %s", error)
            return none

    async def while_it_stands(self, dirty: PageSet) -> PageSet:
        """Compare pages that may have been written without being reported, the guest standing.

        :param dirty: what is to be sent
        :return: what is to be sent after all
        """
        suspects = self._sources.take_suspects(dirty)
        all_of_them = self.is_worth_it and skipping.worth_sampling(dirty.nbytes())
        asked = suspects | dirty if all_of_them else suspects
        if not asked.any():
            return dirty
        if self._account.phases.current is Phase.FINAL_COLLECT:
            self._account.phases.enter(Phase.COMPARE)
        started = self._clock()
        changed = await self._transport.changed(asked, self._sources.data, guest_stands=True)
        unchanged = dirty - changed if all_of_them else None
        rest = changed if all_of_them else dirty | changed
        spent_s = self._clock() - started
        self._account.compared(suspects, changed & suspects, unchanged, rest, spent_s)
        return rest


def _sample(pages: DirtyBitmap) -> DirtyBitmap:
    """Some of the pages, from everywhere where there are any."""
    words = pages.words.copy()
    words[np.cumsum(words != 0) % skipping.SAMPLE != 1] = 0
    return DirtyBitmap(pages.npages, words)
