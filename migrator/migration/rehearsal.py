"""Everything but the hand-over: stop, last collects, verify, and the source goes on.

Useful for any VM, also one that QEMU cannot migrate: it tells whether tracking misses anything, and
what the downtime would be made of. The destination is not run.
"""

from __future__ import annotations

import asyncio

from migrator.errors import VmError
from migrator.migration.budget import Budget
from migrator.migration.guard import Guard
from migrator.migration.handover import HandedOver, check_goes_on, stop_guest
from migrator.migration.lastrounds import LastRounds
from migrator.preflight.plan import Plan
from migrator.qemu.qmp import Qmp
from migrator.qemu.standing import Standing
from migrator.report.phases import Phase, Phases

_QUIET_S = 0.3  # a device that QEMU cannot stop ends what it is at
_LOOKS = 20


class Rehearsal:
    """One attempt, in the place of a :class:`~migrator.migration.switchover.Switchover`.

    :ivar committed: never: there is no point of no return
    :ivar was_running: whether the guest ran until it was stopped for this; ``None`` before that
    :ivar paused_by_us: whether it may be paused because we executed ``stop``
    """

    def __init__(
        self,
        source: Qmp,
        plan: Plan,
        phases: Phases,
        guard: Guard,
        last_rounds: LastRounds,
    ) -> None:
        self._source = source
        self._plan = plan
        self._phases = phases
        self._guard = guard
        self._last_rounds = last_rounds
        self.committed = False
        self.was_running: bool | None = None
        self.paused_by_us = False

    async def run(self, budget: Budget) -> HandedOver:
        """Do all of it.

        :param budget: the time for which the guest may stand
        :raise VmError: the source does not answer, does not go on, or did not stand
        """
        self._phases.enter(Phase.SWITCHOVER)
        await self._last_rounds.ease()
        self.was_running = await check_goes_on(self._source) == "running"
        self._guard.begun(self.was_running, by_stop=True)
        self.paused_by_us = True
        stopped = await stop_guest(self._source)
        standing = Standing(self._source, self._source.mark())
        self.was_running = stopped is not None
        budget.begin()
        self._phases.enter(Phase.STOP, at=stopped.at if stopped else None)
        try:
            await budget.spend(self._compare_both())
        finally:
            standing.check_events()  # a better reason than that pages differ
        await standing.check(("paused",))
        self._phases.enter(Phase.RESUME)
        mark = self._source.mark()
        if self.was_running:
            await self._source.execute("cont")
            if await self._source.run_state() != "running":
                raise VmError("source", "does not go on")
        resumed = self._source.seen("RESUME", since=mark)
        self._guard.over()
        self._phases.enter(Phase.FINISH, at=resumed.at if resumed else None)
        stood_ms = (resumed.at - stopped.at) * 1000 if stopped and resumed else None
        return HandedOver(stood_ms, device_state_bytes=None)

    async def _compare_both(self) -> None:
        await self._last_rounds.collect_and_send(Phase.FINAL_COLLECT, Phase.FINAL_SEND)
        self._phases.enter(Phase.LAST_COLLECT)
        await self._collect_until_quiet()
        await self._last_rounds.verify()

    async def _collect_until_quiet(self) -> None:
        """A last round; several, while a device that QEMU cannot stop still writes."""
        await self._last_rounds.collect_and_send(Phase.LAST_COLLECT, Phase.LAST_COLLECT)
        for _ in range(_LOOKS if self._plan.unstoppable_devices else 0):
            await asyncio.sleep(_QUIET_S)
            if not await self._last_rounds.collect_and_send(Phase.LAST_COLLECT, Phase.LAST_COLLECT):
                return

    def hurry(self) -> None:
        """There is no point of no return to be past of."""

    async def close(self) -> None:
        """Nothing is open."""
