"""What is done with pages while the guest stands: the last rounds, and the comparison."""

from __future__ import annotations

from migrator.errors import Failed
from migrator.migration.account import Account
from migrator.migration.rounds import Rounds
from migrator.migration.slowing import Slowing
from migrator.report.phases import Phase
from migrator.tracking.sources import Sources
from migrator.transport import Transport


class LastRounds:
    """The last rounds of one migration, in the order that a handover calls them.

    :param verify: compare all of RAM
    :param memory_only: the destination will not run: it needs no room to grow
    """

    def __init__(
        self,
        rounds: Rounds,
        slowing: Slowing,
        sources: Sources,
        transport: Transport,
        account: Account,
        *,
        verify: bool,
        memory_only: bool,
    ) -> None:
        self._rounds = rounds
        self._slowing = slowing
        self._sources = sources
        self._transport = transport
        self._account = account
        self._verify = verify
        self._memory_only = memory_only

    async def ease(self) -> None:
        """Let writers wait for moments only: the guest is about to be stopped."""
        await self._slowing.ease()

    async def collect_and_send(self, collecting: Phase, sending: Phase) -> int:
        """Read all sources, and deliver the pages that they found.

        :return: how many pages were sent
        """
        return await self._rounds.last(collecting, sending)

    async def compare_and_send(self) -> None:
        """Deliver the pages that differ, where no source can be read any more."""
        await self._rounds.last_by_comparison(await self._sources.data_of_ended())

    async def devices_stand(self) -> None:
        """Let go of devices, which write no more, and whose dirty bits have been read."""
        await self._sources.stop_devices()

    async def verify(self) -> None:
        """Check that the destination has room to run, and, where wanted, that all of RAM is equal.

        :raise NoSpace: it has no room
        :raise Failed: pages differ
        """
        if not self._memory_only:
            await self._transport.check_room()
        if not self._verify:
            return
        phases = self._account.phases
        phases.enter(Phase.VERIFY)
        found = await self._transport.compare()
        self._account.verified(found)
        if found.mismatched:
            raise Failed(
                phases.current.value,
                f"{found.mismatched} of {found.pages} pages differ; the destination was not run",
            )
