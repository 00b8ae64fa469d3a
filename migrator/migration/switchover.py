"""From the last round to the running destination: stop, last collects, hand over, or roll back.

The order makes it safe:

1. The guard is told; the source stops, its block I/O drained; all written until then is sent.
2. QEMU saves the device state into a buffer of ours. That may write guest RAM, so the sources are
   read once more, and the pages they found are sent. Nothing can write any more.
3. The destination loads all of the device state but its end. RAM went first, because loading reads
   it. A destination that lacks the end cannot run; until here, every failure ends with the source
   running.
4. The source's virtual processors are held, and it is seen to have stood since it was stopped.
5. The end is sent: the point of no return. The destination runs when it has loaded it.

It is QEMU's own migration that stops the source, unless that would take the dirty bits of VFIO
devices away: then ``stop`` comes first, and the migration after the bits have been read. Such a
source is paused when its state is saved, so that the destination waits for our ``cont``.

A source that dies once it has saved everything needs no rollback: the destination is the VM then,
and gets the pages that differ from the source's RAM files, which outlive it here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os

from migrator.aio import in_thread, settle, within
from migrator.errors import (
    MigratorError,
    NotStanding,
    QmpUnreachable,
    Unconfirmed,
    Undecided,
    VmError,
)
from migrator.migration.budget import DECISION_S, Budget
from migrator.migration.destination import Destination
from migrator.migration.guard import Guard
from migrator.migration.handover import HandedOver, check_goes_on, stop_guest
from migrator.migration.lastrounds import LastRounds
from migrator.preflight.jobs import job_findings
from migrator.preflight.plan import Plan
from migrator.qemu.devicestate import Incoming, saved_run_state, split_at_end
from migrator.qemu.qmp import Event, Qmp, is_alive
from migrator.qemu.settings import SOURCE_CAPABILITIES, SOURCE_PARAMETERS
from migrator.qemu.standing import Standing, stopped_by_io_error
from migrator.report.phases import Phase, Phases
from tracker.errors import TrackerError
from tracker.inject.held import Held

_log = logging.getLogger(__name__)
_STOP_S = 60.0  # QEMU's own first pass: ROMs, video memory
_HOLD_S = 0.5
_GONE_S = 0.3  # a process that ends closes its sockets first
_STOPPING_S = 0.05  # for QEMU's main loop to come to a command
_STOOD = ("finish-migrate", "postmigrate", "paused")


class Switchover:
    """One attempt to hand over.

    :ivar committed: whether the point of no return was passed
    :ivar was_running: whether the guest ran until it was stopped for this; ``None`` before that
    :ivar paused_by_us: whether it may be paused because we executed ``stop``
    """

    def __init__(
        self,
        source: Qmp,
        destination: Destination,
        plan: Plan,
        phases: Phases,
        guard: Guard,
        last_rounds: LastRounds,
    ) -> None:
        self._source = source
        self._destination = destination
        self._plan = plan
        self._phases = phases
        self._guard = guard
        self._last_rounds = last_rounds
        self._incoming: Incoming | None = None
        self._vcpus = Held(source.pid, ())
        self._standing = Standing(source, source.mark())
        self._pidfd = -1
        self._source_is_gone = False
        self._going: asyncio.Future[float | None] | None = None
        self._warnings: list[str] = []
        self.committed = False
        self.was_running: bool | None = None
        self.paused_by_us = False

    async def run(self, budget: Budget) -> HandedOver:
        """Do all of it.

        :param budget: the time for which the guest may stand
        :raise VmError: before the point of no return: roll back. After it: never
        :raise Undecided: after the point of no return, neither side is known to run
        """
        self._phases.enter(Phase.SWITCHOVER)
        self.was_running = await check_goes_on(self._source) == "running"
        await self._check_no_jobs()
        self._guard.begun(self.was_running)  # before anything is changed
        await self._prepare()
        await self._last_rounds.ease()
        if self._plan.stop_first:
            stopped = await self._stop(budget)
        else:
            stopped = await self._begin_migration(budget)
        stream = await budget.spend(self._make_ready(budget))
        resumed_at = await self._commit(budget)
        downtime_ms = (resumed_at - stopped.at) * 1000 if stopped and resumed_at else None
        return HandedOver(downtime_ms, len(stream), self._warnings)

    async def _check_no_jobs(self) -> None:
        for finding in await job_findings(self._source):
            raise VmError("source", f"{finding.problem}: {finding.mend}")

    async def _prepare(self) -> None:
        self._pidfd = os.pidfd_open(self._source.pid)
        self._vcpus = Held(self._source.pid, await self._source.vcpu_threads())
        await self._destination.prepare()
        await self._source.set_capabilities(SOURCE_CAPABILITIES)
        await self._source.execute("migrate-set-parameters", **SOURCE_PARAMETERS)

    # -- the guest stops ------------------------------------------------------------------------

    async def _stop(self, budget: Budget) -> Event | None:
        """Stop the guest by command: block I/O is drained, and migratable devices stand."""
        self._guard.begun(bool(self.was_running), by_stop=True)
        self.paused_by_us = True
        mark = self._source.mark()
        await stop_guest(self._source)
        return self._note_stop(mark, budget)

    def _note_stop(self, mark: int, budget: Budget) -> Event | None:
        """The guest stands from the last STOP on: by QEMU's time, if it ran until then."""
        events = self._source.events(mark)
        stops = [i for i, event in enumerate(events) if event.name == "STOP"]
        stopped = events[stops[-1]] if stops else None
        budget.begin()
        self._standing = Standing(self._source, mark + (stops[-1] + 1 if stops else 0))
        self.was_running = stopped is not None and not stopped_by_io_error(self._source, mark)
        self._phases.enter(Phase.STOP, at=stopped.at if stopped else None)
        return stopped

    async def _begin_migration(self, budget: Budget) -> Event | None:
        """Let QEMU's own migration come to where the guest stands and nothing is saved yet."""
        mark = self._source.mark()
        self._incoming = await Incoming.begin(self._source)
        ends = ("pre-switchover", "failed", "cancelled")
        await self._source.wait_for(
            lambda e: e.name == "STOP" or e.data.get("status") in ends,
            since=mark,
            timeout_s=_STOP_S,
        )
        budget.begin()
        event = await budget.spend(
            self._source.migration_status("pre-switchover", since=mark, timeout_s=_STOP_S)
        )
        self._expect(event, "pre-switchover")
        stopped: Event | None = None
        if not self._plan.stop_first:
            ran = self.was_running
            stopped = self._note_stop(mark, budget)
            if self.was_running != ran:
                self._guard.begun(bool(self.was_running))
        await self._check_qemu_leaves_ram_to_us()
        return stopped

    async def _check_qemu_leaves_ram_to_us(self) -> None:
        total = (await self._source.migration()).get("ram", {}).get("total")
        smallest = min(block.size for block in self._plan.source)
        if total is None:
            raise VmError("source", "does not say how much RAM it sends itself")
        if total >= self._plan.other_ram_bytes + smallest:
            raise VmError("source", f"sends {total} bytes of RAM itself, ignoring x-ignore-shared")

    # -- everything comes to the destination, but the end ---------------------------------------

    async def _make_ready(self, budget: Budget) -> bytes:
        """Bring the destination to where it lacks nothing but the end; return the stream."""
        await self._last_rounds.collect_and_send(Phase.FINAL_COLLECT, Phase.FINAL_SEND)
        await self._last_rounds.devices_stand()
        self._phases.enter(Phase.DEVICE_STATE)
        if self._plan.stop_first:
            await self._begin_migration(budget)
        stream = await self._save_device_state(budget)
        head, end = split_at_end(stream)
        if not self._plan.stop_first and saved_run_state(stream) not in ("running", None):
            # another client stopped it, a moment before the migration
            self.was_running = False
            self._guard.begun(False)
        self._phases.enter(Phase.LAST_COLLECT)
        await self._last_collect()
        await self._verify_unless_disturbed()
        self._phases.enter(Phase.LOAD)
        await self._destination.load(head, end, timeout_s=budget.left_s)
        await self._hold_and_look()
        return stream

    async def _save_device_state(self, budget: Budget) -> bytes:
        assert self._incoming is not None
        mark = self._source.mark()
        await self._source.execute("migrate-continue", state="pre-switchover")
        await self._destination.begin_loading()  # while the source saves
        try:
            event = await self._source.migration_status(
                "completed", since=mark, timeout_s=budget.left_s
            )
        except QmpUnreachable:
            if not await self._source_ended():
                raise
        else:
            self._expect(event, "completed")
        return await self._incoming.whole(timeout_s=budget.left_s)

    def _expect(self, event: Event, status: str) -> None:
        if event.data.get("status") != status:
            raise VmError("source", f"its own migration {event.data.get('status')}")

    async def _verify_unless_disturbed(self) -> None:
        try:
            await self._last_rounds.verify()
        except MigratorError:
            await self._check_stood()  # which is the better reason, if it is one
            raise

    # -- the source has stood, or is gone -------------------------------------------------------

    async def _check_stood(self) -> None:
        if not self._source_is_gone:
            try:
                await self._standing.check(_STOOD)
            except QmpUnreachable:
                if not await self._source_ended():
                    raise
        self._standing.check_events()

    async def _source_ended(self) -> bool:
        """Whether the source's process has ended, or is about to."""
        with contextlib.suppress(VmError):
            await self._source.run_state()
            return False
        for _ in range(int(_GONE_S / 0.01)):
            if not is_alive(self._pidfd):
                self._source_is_gone = True
                return True
            await asyncio.sleep(0.01)
        return False

    async def _last_collect(self) -> None:
        """Collect all that saving wrote; of a source that has died meanwhile, by comparing.

        It has saved everything. Its RAM files are mapped here, and nothing writes them any more.
        Its page tables are gone, and with them the record of written pages.
        """
        try:
            if not self._source_is_gone:
                await self._last_rounds.collect_and_send(Phase.LAST_COLLECT, Phase.LAST_COLLECT)
                await self._standing.check(_STOOD)
                return
        except (MigratorError, TrackerError, OSError) as error:
            if not await self._source_ended():
                raise
            _log.warning("the source died after it had saved everything: %s", error)
        self._standing.check_events()
        await self._last_rounds.compare_and_send()
        self._warnings.append(
            "the source's process ended after it had saved its state; the destination was "
            "completed by comparing all of RAM"
        )

    async def _hold_and_look(self) -> None:
        """Look at the source for the last time, and keep it from executing anything from then on.

        It is held before the look, so that no other client can let it run after it. Where one has
        let it run already, a virtual processor may be held that has QEMU's lock: then there is no
        answer, until it is let go.
        """
        if not self._source_is_gone:
            try:
                await in_thread(self._vcpus.hold, _HOLD_S)
            except (TrackerError, OSError) as error:
                _log.warning("the source's virtual processors cannot be held: %s", error)
        try:
            await within(_HOLD_S, self._check_stood())
        except asyncio.TimeoutError:
            self._vcpus.release()
            await self._check_stood()
            raise NotStanding("source", "did not answer while it was held") from None

    # -- the point of no return -----------------------------------------------------------------

    async def _commit(self, budget: Budget) -> float | None:
        self._phases.enter(Phase.RESUME)
        self._guard.committed()
        self.committed = True
        watching = asyncio.create_task(self._keep_standing())
        told = asyncio.Event()
        self._going = asyncio.ensure_future(self._go(told, max(budget.left_s, DECISION_S)))
        try:
            resumed_at = await self._going
            self._phases.enter(Phase.FINISH, at=resumed_at)
            await self._look_once_more()
        except Unconfirmed as error:
            known = ["the source is paused, and complete", *error.known]
            raise Undecided(
                self._phases.current.value, "the destination did not confirm", known
            ) from error
        except VmError:
            self.committed = False
            raise
        except asyncio.CancelledError:
            # a task that is cancelled before its first step never takes it
            self.committed = told.is_set()
            raise
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            self._vcpus.release()
        return resumed_at

    async def _go(self, told: asyncio.Event, timeout_s: float) -> float | None:
        told.set()
        return await self._destination.go(run=bool(self.was_running), timeout_s=timeout_s)

    def hurry(self) -> None:
        """Past the point of no return: have the destination say now whether it runs."""
        if self._going is not None:
            self._going.cancel()

    async def _keep_standing(self) -> None:
        """Answer a RESUME of the source with ``stop``; its virtual processors are held."""
        while not self._source_is_gone:
            with contextlib.suppress(VmError):
                await self._source.wait_for(
                    lambda e: e.name == "RESUME", since=self._standing.since, timeout_s=_STOP_S
                )
                await settle(self._stop_again())
            await asyncio.sleep(_STOPPING_S)

    async def _stop_again(self) -> None:
        self.paused_by_us = True
        self._standing = Standing(self._source, self._source.mark())
        stopping = asyncio.ensure_future(self._source.execute("stop"))
        # QEMU answers only when its virtual processors have: they are let go once it waits for them
        await asyncio.sleep(_STOPPING_S)
        self._vcpus.release()
        self._warnings.append(
            "another client resumed the source while it was handed over; it was stopped again, and "
            "must not be let run: the VM runs at the destination"
        )
        await stopping

    async def _look_once_more(self) -> None:
        """The destination runs. A source that was resumed meanwhile is stopped, at once."""
        with contextlib.suppress(VmError):
            if not self._source_is_gone and await self._source.run_state() == "running":
                await self._stop_again()

    # -- the way back, and the end --------------------------------------------------------------

    async def close(self) -> None:
        """Close the stream from the source; a QEMU that still writes to it fails its migration."""
        self._vcpus.release()
        if self._incoming is not None:
            await self._incoming.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
