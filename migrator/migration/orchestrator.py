"""The order of a migration, top to bottom."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

from migrator.aio import in_thread, settle
from migrator.errors import (
    Aborted,
    ConfigError,
    Failed,
    GuestEnded,
    MigrationError,
    MigratorError,
    NoSpace,
    QmpUnreachable,
    SourceUnreachable,
    Undecided,
    VmError,
)
from migrator.link.session import Link
from migrator.migration.budget import Budget, standstill_s
from migrator.migration.destination import Destination, LocalDestination
from migrator.migration.guard import Guard
from migrator.migration.rehearsal import Rehearsal
from migrator.migration.remote import RemoteDestination
from migrator.migration.rounds import Rounds
from migrator.migration.slowing import Slowing
from migrator.migration.switchover import HandedOver, Switchover, stop_guest
from migrator.migration.wards import Wards
from migrator.policy.downtime import Fixed
from migrator.policy.judge import Limits, PolicyName
from migrator.policy.policies import policy_of
from migrator.policy.throttling import Throttling
from migrator.preflight.preflight import preflight
from migrator.qemu.qmp import Qmp
from migrator.qemu.rollback import Before, bring_back, remember
from migrator.qemu.settings import put_back
from migrator.qemu.standing import ENDED_STATES, GuestEnd, guest_end, stopped_by_io_error
from migrator.report.account import Account
from migrator.report.phases import Phase
from migrator.report.report import Progress, Report
from migrator.tracking.sources import Sources
from migrator.tracking.strategies import cpu_source
from migrator.transport.space import given_up_in_time
from tracker.errors import TrackerError
from tracker.warm import warm_up

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What a caller may choose.

    :ivar limits: when to switch over, when to give up
    :ivar policy: what is sent, and when it is time: see :func:`migrator.policy.policies.policy_of`
    :ivar fixed: what a switchover is taken to cost without pages
    :ivar verify: compare all of RAM before the destination runs; a difference is a failure
    :ivar tracker: source of CPU writes: ``uffd``, ``uffd-sync``, or ``auto``
    :ivar throttle_percent: of their time, how much writers may be made to wait where the migration
        would not converge otherwise: 1 to 99; with 0 they never are
    :ivar memory_only: rehearse: do everything but the hand-over, verify, and let the source go on
    :ivar dirty_map: have in the report where memory was dirty
    :ivar standstill_s: the most seconds for which the guest may stand, after which it goes on at
        the source; ``None``: see :func:`migrator.migration.budget.standstill_s`
    """

    limits: Limits = field(default_factory=Limits)
    verify: bool = False
    memory_only: bool = False
    tracker: str = "auto"
    policy: PolicyName = "adaptive"
    fixed: Fixed = field(default_factory=Fixed)
    throttle_percent: int = 0
    dirty_map: bool = False
    standstill_s: float | None = None


async def migrate(
    source: str,
    destination: str | Link,
    options: Options | None = None,
    *,
    watch: Callable[[Progress], None] | None = None,
) -> Report:
    """Move a running VM from one QEMU to another, on this host or on another one.

    :param source: QMP socket of the QEMU that runs it
    :param destination: QMP socket of a QEMU started with the same command line, RAM files of its
        own, and ``-incoming defer``; or where such a one is received (``migrator receive``)
    :param watch: called in the event loop whenever something changed; ``None``: nothing is
    :return: the report of a migration that completed: the destination runs, the source never will;
        of a rehearsal: the source runs on
    :raise Refused: preflight found reasons not to begin
    :raise SourceUnreachable: the source does not answer, and nothing was begun
    :raise VmError: the destination does not answer
    :raise LinkError: the other host does not answer, or is not the one that was expected
    :raise Aborted: given up; the source runs. The report is in the error, as in the next two
    :raise Failed: something broke; the source runs
    :raise GuestEnded: the guest ended meanwhile; neither side has it
    :raise Undecided: which side may run is not known
    """
    if isinstance(destination, str) and os.path.realpath(source) == os.path.realpath(destination):
        raise ConfigError("expected two sockets: source and destination are the same")
    watch = watch or (lambda _: None)
    watch(Progress("compile", 0, 0, 0, 0, 0.0))  # seconds, but only the first time
    await in_thread(warm_up)
    async with _source(source) as source_qmp, _reached(destination) as there:
        return await Migration(source_qmp, there, options or Options(), watch).run()


@contextlib.asynccontextmanager
async def _connected(name: str, path: str) -> AsyncIterator[Qmp]:
    qmp = await Qmp.connect(name, path)
    try:
        yield qmp
    finally:
        await settle(qmp.close(), too_late=True)


@contextlib.asynccontextmanager
async def _source(path: str) -> AsyncIterator[Qmp]:
    try:
        qmp = await Qmp.connect("source", path)
    except QmpUnreachable as error:
        raise SourceUnreachable(error.vm, error.reason) from error
    try:
        yield qmp
    finally:
        await settle(qmp.close(), too_late=True)


@contextlib.asynccontextmanager
async def _reached(destination: str | Link) -> AsyncIterator[Destination]:
    if isinstance(destination, Link):
        remote = await RemoteDestination.connect(destination)
        try:
            yield remote
        finally:
            await settle(remote.close(), too_late=True)
        return
    async with _connected("destination", destination) as qmp:
        try:
            local = LocalDestination(qmp)
        except OSError as error:
            raise VmError("destination", f"process {qmp.pid}: {error.strerror}") from error
        try:
            yield local
        finally:
            await settle(local.close(), too_late=True)


class Migration:
    """One attempt to migrate."""

    def __init__(
        self,
        source: Qmp,
        destination: Destination,
        options: Options,
        watch: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._source = source
        self._destination = destination
        self._options = options
        self._account = Account(watch)
        self._phases, self._report = self._account.phases, self._account.report
        self._draining = False

    # -- the order ------------------------------------------------------------------------------

    async def run(self) -> Report:
        """Migrate; see :func:`migrate` for what is raised."""
        try:
            plan = await preflight(
                self._source,
                await self._destination.look(),
                memory_only=self._options.memory_only,
                tracker=self._options.tracker,
                throttles=self._options.throttle_percent > 0,
            )
            self._began = self._source.mark()
            self._before = before = await remember(self._source, plan.was_running)
        except (TrackerError, OSError, VmError) as error:
            await self._check_reachable(error)
            if isinstance(error, VmError):
                raise
            raise Failed(Phase.PREFLIGHT.value, str(error)) from error
        self._report.guest_bytes = plan.guest_bytes
        self._report.warnings += plan.warnings
        if before.settings.capabilities.get("x-ignore-shared"):
            self._report.warnings.append(
                "the source has the capability x-ignore-shared on, as a migration that was killed "
                "leaves it: its snapshots (savevm) would hold no RAM; migrator resolve --source "
                "puts it back"
            )
        self._report.memory_only = self._options.memory_only
        self._report.policy = self._options.policy
        self._report.downtime_limit_ms = self._options.limits.downtime_ms
        self._report.stopped_by = (
            "stop" if plan.stop_first or self._options.memory_only else "migrate"
        )
        self._plan = plan
        tracking = plan.tracking
        cpu = cpu_source(tracking.tracker, self._source.pid, tracking.blocks)
        self._sources = Sources(self._source, tracking, cpu)
        self._transport = self._destination.transport(self._source.pid, plan)
        self._account.of(plan.source, dirty_map=self._options.dirty_map)
        policy = policy_of(self._options.policy, self._options.limits, self._options.fixed)
        throttling = Throttling(self._options.throttle_percent)
        slowing = Slowing(throttling, self._sources, self._account)
        self._rounds = Rounds(plan, policy, slowing, self._sources, self._transport, self._account)
        wards = Wards(os.path.abspath(self._source.path), self._destination.ward(), before)
        self._guard = guard = await in_thread(Guard, wards)
        switchover: Switchover | Rehearsal
        if self._options.memory_only:
            switchover = Rehearsal(
                self._source,
                plan,
                self._phases,
                guard,
                ease=slowing.ease,
                collect_and_send=self._rounds.last,
                verify=self._verify,
            )
        else:
            switchover = Switchover(
                self._source,
                self._destination,
                plan,
                self._phases,
                guard,
                ease=slowing.ease,
                collect_and_send=self._rounds.last,
                compare_and_send=self._compare_and_send,
                devices_stand=self._sources.stop_devices,
                verify=self._verify,
            )
        decided = False
        try:
            handed_over = await self._until_it_runs_there(switchover, before)
            decided = True
            if self._options.memory_only:
                await settle(self._give_back(), too_late=True)
            ended = "it was a rehearsal" if self._options.memory_only else ""
            await settle(self._let_go(switchover, ended), too_late=True)
        except MigrationError as error:
            decided = True
            self._account.finish(error.status, error.reason)
            if isinstance(error, Undecided):
                self._report.known = list(error.known)
            error.report = self._report
            raise
        finally:
            end = guard.dismiss if decided else guard.leave_it_to_you
            await settle(asyncio.to_thread(end), too_late=True)
        self._report.downtime_ms = handed_over.downtime_ms
        self._report.device_state_bytes = handed_over.device_state_bytes
        self._report.warnings += handed_over.warnings
        self._account.finish("completed", "")
        return self._report

    async def _until_it_runs_there(
        self, switchover: Switchover | Rehearsal, before: Before
    ) -> HandedOver:
        try:
            async with given_up_in_time(self._transport.shortage, self._phases):
                await self._attach()
                await self._drain()
                self._phases.enter(Phase.COPY)
                await self._rounds.copy_everything()
                self._phases.enter(Phase.ROUNDS)
                await self._rounds.until_converged()
                return await _not_cancelled_once_committed(switchover, self._budget())
        except BaseException as error:
            await settle(self._roll_back(switchover, before, error))
            raise AssertionError("a rollback raises") from error

    def _budget(self) -> Budget:
        options, plan = self._options, self._plan
        if options.standstill_s is not None:
            return Budget(options.standstill_s)
        compares = options.verify or options.memory_only or plan.stop_first or plan.direct_io
        return Budget(
            standstill_s(
                options.limits.downtime_ms,
                self._report.predicted_downtime_ms or 0.0,
                plan.guest_bytes if compares else 0,
            )
        )

    async def _attach(self) -> None:
        self._phases.enter(Phase.ATTACH)
        await self._transport.open()
        await self._sources.start()

    async def _drain(self) -> None:
        """Wait for reads past the page cache that were under way when tracking began.

        They pinned their pages before these were protected, so that nobody would report what
        arrives in them after they were copied. A guest that is stopped has no I/O under way.
        """
        if not self._plan.direct_io:
            return
        self._phases.enter(Phase.DRAIN)
        if await self._source.run_state() == "running":
            self._guard.begun(True, by_stop=True)
            self._draining = True
            await settle(self._stop_and_go())
            self._draining = False
            self._guard.over()

    async def _stop_and_go(self) -> None:
        if await stop_guest(self._source):
            await self._source.execute("cont")

    async def _compare_and_send(self) -> None:
        await self._rounds.last_by_comparison(await self._sources.data_of_ended())

    async def _verify(self) -> None:
        if not self._options.memory_only:
            await self._transport.check_room()
        if not (self._options.verify or self._options.memory_only):
            return
        self._phases.enter(Phase.VERIFY)
        found = await self._transport.compare()
        self._report.verified_pages = found.pages
        self._report.mismatched_pages = found.mismatched
        if found.mismatched:
            raise Failed(
                self._phases.current.value,
                f"{found.mismatched} of {found.pages} pages differ; the destination was not run",
            )

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

    async def _check_reachable(self, why: Exception) -> None:
        """Check that the source answers still, before it is said to run.

        :raise SourceUnreachable: it does not
        """
        try:
            await self._source.run_state()
        except VmError:
            raise SourceUnreachable("source", str(why)) from why

    # -- the ends -------------------------------------------------------------------------------

    async def _let_go(self, switchover: Switchover | Rehearsal, reason: str = "") -> None:
        """Close the streams, unprotect the source, unmap both sides."""
        await switchover.close()
        if not self._options.memory_only and self._phases.current is not Phase.ROLLBACK:
            self._report.qemu_ram_transferred = await self._ram_that_qemu_sent()
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

    async def _roll_back(
        self, switchover: Switchover | Rehearsal, before: Before, cause: BaseException
    ) -> None:
        """Let the source go on, and raise what the migration ends with."""
        phase = self._phases.current.value
        _log.info("rolling back from phase %s: %r", phase, cause)
        if switchover.committed and not isinstance(cause, Undecided):
            known = ["the destination has all of the device state, and may run", repr(cause)]
            cause = Undecided(phase, "it broke off after the point of no return", known)
        if isinstance(cause, Undecided):
            await self._let_go(switchover, str(cause))
            raise cause
        before = self._before_it_was_stopped(switchover, before)
        self._phases.enter(Phase.ROLLBACK)
        scarce = self._transport.shortage() is not None
        if scarce:  # the source would die of it when it goes on; else it need not wait for this
            await self._give_back()
        await switchover.close()
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
            await self._let_go(switchover, str(cause) or "interrupted")
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

    def _before_it_was_stopped(self, switchover: Switchover | Rehearsal, before: Before) -> Before:
        """The source as the rollback has to leave it: a guest stopped by others stays stopped."""
        was_running = before.was_running
        if switchover.was_running is not None:
            was_running = switchover.was_running
        if stopped_by_io_error(self._source, self._began):
            was_running = False
        paused_by_us = switchover.paused_by_us or self._draining
        return replace(before, was_running=was_running, paused_by_us=paused_by_us)


async def _not_cancelled_once_committed(
    switchover: Switchover | Rehearsal, budget: Budget
) -> HandedOver:
    """Run a switchover; past the point of no return, a cancellation only hastens its end."""
    task = asyncio.create_task(switchover.run(budget))
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if switchover.committed:
                switchover.hurry()
            else:
                task.cancel()
        except BaseException:  # noqa: BLE001 (raised below, by the task's result)
            break
    return task.result()
