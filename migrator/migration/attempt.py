"""One attempt to migrate, from the first page to the end or the way back."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import replace

from migrator.aio import in_thread, settle
from migrator.errors import (
    Aborted,
    Failed,
    GuestEnded,
    MigrationError,
    MigratorError,
    NoSpace,
    Undecided,
    VmError,
)
from migrator.migration.account import Account
from migrator.migration.budget import Budget, standstill_s
from migrator.migration.destination import Destination
from migrator.migration.guard import Guard
from migrator.migration.handover import HandedOver, Handover, stop_guest
from migrator.migration.lastrounds import LastRounds
from migrator.migration.options import Options
from migrator.migration.rehearsal import Rehearsal
from migrator.migration.rounds import Rounds
from migrator.migration.slowing import Slowing
from migrator.migration.switchover import Switchover
from migrator.migration.wards import Wards
from migrator.policy.policies import policy_of
from migrator.policy.throttling import Throttling
from migrator.preflight.plan import Plan
from migrator.qemu.qmp import Qmp
from migrator.qemu.rollback import Before, bring_back
from migrator.qemu.settings import put_back
from migrator.qemu.standing import ENDED_STATES, GuestEnd, guest_end, stopped_by_io_error
from migrator.report.phases import Phase
from migrator.tracking.sources import Sources
from migrator.tracking.strategies import cpu_source
from migrator.transport.space import given_up_in_time
from tracker.errors import TrackerError

_log = logging.getLogger(__name__)


class Attempt:
    """One attempt to migrate.

    :param plan: what preflight found
    :param before: what the source was before
    :param began: where the events of this attempt begin
    """

    def __init__(
        self,
        source: Qmp,
        destination: Destination,
        options: Options,
        plan: Plan,
        before: Before,
        began: int,
        account: Account,
    ) -> None:
        self._source = source
        self._destination = destination
        self._options = options
        self._plan = plan
        self._before = before
        self._began = began
        self._account = account
        self._phases = account.phases
        self._draining = False
        tracking = plan.tracking
        cpu = cpu_source(tracking.tracker, source.pid, tracking.blocks)
        self._sources = Sources(source, tracking, cpu)
        self._transport = destination.transport(source.pid, plan)
        slowing = Slowing(Throttling(options.throttle_percent), self._sources, account)
        self._rounds = Rounds(
            plan.source,
            policy_of(options.policy, options.limits, options.fixed),
            slowing,
            self._sources,
            self._transport,
            account,
        )
        self._last_rounds = LastRounds(
            self._rounds,
            slowing,
            self._sources,
            self._transport,
            account,
            verify=options.verify or options.memory_only,
            memory_only=options.memory_only,
        )

    # -- the order ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Migrate; see :func:`migrator.migration.orchestrator.migrate` for what is raised."""
        ward = self._destination.ward()
        wards = Wards(os.path.abspath(self._source.path), ward, self._before)
        guard = await in_thread(Guard, wards)
        handover = self._handover(guard)
        decided = False
        try:
            handed_over = await self._until_it_runs_there(handover, guard)
            decided = True
            if self._options.memory_only:
                await settle(self._give_back(), too_late=True)
            ended = "it was a rehearsal" if self._options.memory_only else ""
            await settle(self._let_go(handover, ended), too_late=True)
        except MigrationError as error:
            decided = True
            self._account.finish(error.status, error.reason)
            if isinstance(error, Undecided):
                self._account.known(error.known)
            error.report = self._account.report
            raise
        finally:
            end = guard.dismiss if decided else guard.leave_it_to_you
            await settle(asyncio.to_thread(end), too_late=True)
        self._account.handed_over(handed_over)
        self._account.finish("completed", "")

    def _handover(self, guard: Guard) -> Handover:
        how = (self._plan, self._phases, guard, self._last_rounds)
        if self._options.memory_only:
            return Rehearsal(self._source, *how)
        return Switchover(self._source, self._destination, *how)

    async def _until_it_runs_there(self, handover: Handover, guard: Guard) -> HandedOver:
        try:
            async with given_up_in_time(self._transport.shortage, self._phases):
                await self._attach()
                await self._drain(guard)
                self._phases.enter(Phase.COPY)
                await self._rounds.copy_everything()
                self._phases.enter(Phase.ROUNDS)
                await self._rounds.until_converged()
                return await _not_cancelled_once_committed(handover, self._budget())
        except BaseException as error:
            await settle(self._roll_back(handover, error))
            raise AssertionError("a rollback raises") from error

    def _budget(self) -> Budget:
        options, plan = self._options, self._plan
        if options.standstill_s is not None:
            return Budget(options.standstill_s)
        compares = options.verify or options.memory_only or plan.stop_first or plan.direct_io
        return Budget(
            standstill_s(
                options.limits.downtime_ms,
                self._account.report.predicted_downtime_ms or 0.0,
                plan.guest_bytes if compares else 0,
            )
        )

    async def _attach(self) -> None:
        self._phases.enter(Phase.ATTACH)
        await self._transport.open()
        await self._sources.start()

    async def _drain(self, guard: Guard) -> None:
        """Wait for reads past the page cache that were under way when tracking began.

        They pinned their pages before these were protected, so that nobody would report what
        arrives in them after they were copied. A guest that is stopped has no I/O under way.
        """
        if not self._plan.direct_io:
            return
        self._phases.enter(Phase.DRAIN)
        if await self._source.run_state() == "running":
            guard.begun(True, by_stop=True)
            self._draining = True
            await settle(self._stop_and_go())
            self._draining = False
            guard.over()

    async def _stop_and_go(self) -> None:
        if await stop_guest(self._source):
            await self._source.execute("cont")

    async def _ram_that_qemu_sent(self) -> int | None:
        try:
            ram = (await self._source.migration()).get("ram", {})
        except VmError:  # it may have been ended already
            return None
        return int(ram.get("transferred", 0))

    async def _put_back(self) -> None:
        """The source will not run any more; a snapshot of it is to have RAM all the same."""
        try:
            await put_back(self._source, self._before.settings)
        except VmError as error:  # it may have been ended already
            _log.info("the source is not as it was before: %s", error)

    # -- the ends -------------------------------------------------------------------------------

    async def _let_go(self, handover: Handover, reason: str = "") -> None:
        """Close the streams, unprotect the source, unmap both sides."""
        await handover.close()
        if not self._options.memory_only and self._phases.current is not Phase.ROLLBACK:
            self._account.let_go(await self._ram_that_qemu_sent())
            await self._put_back()
        await self._sources.stop()
        await self._destination.close(reason)
        await self._transport.close()

    async def _give_back(self) -> None:
        """Give the destination's space back: it will not run, and the source may need it."""
        try:
            await self._transport.give_back()
        except OSError as error:
            _log.warning("the space of the destination's RAM is not given back: %s", error)

    async def _roll_back(self, handover: Handover, cause: BaseException) -> None:
        """Let the source go on, and raise what the migration ends with."""
        phase = self._phases.current.value
        _log.info("rolling back from phase %s: %r", phase, cause)
        if handover.committed and not isinstance(cause, Undecided):
            known = ["the destination has all of the device state, and may run", repr(cause)]
            cause = Undecided(phase, "it broke off after the point of no return", known)
        if isinstance(cause, Undecided):
            await self._let_go(handover, str(cause))
            raise cause
        before = self._before_it_was_stopped(handover)
        self._phases.enter(Phase.ROLLBACK)
        scarce = self._transport.shortage() is not None
        if scarce:  # the source would die of it when it goes on; else it need not wait for this
            await self._give_back()
        await handover.close()
        try:
            state = await bring_back(self._source, before)
        except VmError as error:
            if end := guest_end(self._source):
                raise GuestEnded(
                    phase, f"{end.words()}; it does not run anywhere", end.reason
                ) from cause
            known = [f"it was given up because {cause}", str(error), "the destination was not run"]
            raise Undecided(phase, "the source could not be brought back", known) from cause
        finally:
            if not scarce:
                await self._give_back()
            await self._let_go(handover, str(cause) or "interrupted")
        if state in ENDED_STATES:
            end = guest_end(self._source) or GuestEnd(state)
            raise GuestEnded(
                phase, f"{end.words()}; the source is {state!r}", end.reason
            ) from cause
        as_it_is = "" if state == "running" else f"; the source is {state!r}, and was not let run"
        if isinstance(cause, MigrationError):
            cause.reason += as_it_is
            raise cause
        if isinstance(cause, asyncio.CancelledError):
            raise Aborted(phase, "interrupted" + as_it_is) from cause
        if isinstance(cause, NoSpace):
            raise Aborted(phase, str(cause) + as_it_is) from cause
        if isinstance(cause, (MigratorError, TrackerError, OSError, ValueError)):
            raise Failed(phase, str(cause) + as_it_is) from cause
        raise cause

    def _before_it_was_stopped(self, handover: Handover) -> Before:
        """The source as the rollback has to leave it: a guest stopped by others stays stopped."""
        was_running = self._before.was_running
        if handover.was_running is not None:
            was_running = handover.was_running
        if stopped_by_io_error(self._source, self._began):
            was_running = False
        paused_by_us = handover.paused_by_us or self._draining
        return replace(self._before, was_running=was_running, paused_by_us=paused_by_us)


async def _not_cancelled_once_committed(handover: Handover, budget: Budget) -> HandedOver:
    """Run a handover; past the point of no return, a cancellation only hastens its end."""
    task = asyncio.create_task(handover.run(budget))
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if handover.committed:
                handover.hurry()
            else:
                task.cancel()
        except BaseException:  # noqa: BLE001 (raised below, by the task's result)
            break
    return task.result()
