"""The order of a migration, top to bottom."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from migrator.errors import (
    Aborted,
    ConfigError,
    Failed,
    MigrationError,
    MigratorError,
    Undecided,
    VmError,
)
from migrator.guard import Guard, Wards
from migrator.phases import DOWNTIME, Phase, Phases
from migrator.policy import Limits, Observation, SendAll, Verdict
from migrator.preflight import preflight
from migrator.qmp import Qmp
from migrator.rehearsal import Rehearsal
from migrator.report import Progress, Report, Round
from migrator.rollback import Before, bring_back, remember
from migrator.settle import in_thread, settle
from migrator.sources import Sources
from migrator.switchover import HandedOver, Switchover, stop_guest
from migrator.transport import Transport
from migrator.transport.local import LocalCopy
from tracker.bitmap import DirtyBitmap
from tracker.errors import TrackerError
from tracker.kernels import warm_up

_log = logging.getLogger(__name__)
_SHOW_S = 0.1
_UNMEASURED_BYTES_PER_S = 500e6  # nothing but zeros was sent so far
_COMPARED_BYTES_PER_S = 2e9  # nothing is compared before the guest stands
_TELLING_BYTES = 1 << 20  # a smaller sending says nothing about the rate


@dataclass(frozen=True)
class Options:
    """What a caller may choose.

    :ivar limits: when to switch over, when to give up
    :ivar verify: compare all of RAM before the destination runs; a difference is a failure
    :ivar memory_only: rehearse: do everything but the hand-over, verify, and let the source go on
    """

    limits: Limits = field(default_factory=Limits)
    verify: bool = False
    memory_only: bool = False


async def migrate(
    source: str,
    destination: str,
    options: Options | None = None,
    *,
    watch: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Move a running VM from one QEMU to another on this host.

    :param source: QMP socket of the QEMU that runs it
    :param destination: QMP socket of a QEMU started with the same command line, RAM files of its
        own, and ``-incoming defer``
    :param watch: called in the event loop whenever something changed
    :return: the report of a migration that completed: the destination runs, the source never will;
        of a rehearsal: the source runs on
    :raise Refused: preflight found reasons not to begin
    :raise VmError: a QEMU does not answer
    :raise Aborted: given up; the source runs. The report is in the error, as in the next two
    :raise Failed: something broke; the source runs
    :raise Undecided: which side may run is not known
    """
    if os.path.realpath(source) == os.path.realpath(destination):
        raise ConfigError("expected two sockets: source and destination are the same")
    watch(Progress("compile", 0, 0, 0, 0, 0.0))  # seconds, but only the first time
    await in_thread(warm_up)
    async with (
        _connected("source", source) as source_qmp,
        _connected("destination", destination) as destination_qmp,
    ):
        return await Migration(source_qmp, destination_qmp, options or Options(), watch).run()


class _connected:
    def __init__(self, name: str, path: str) -> None:
        self._name, self._path = name, path

    async def __aenter__(self) -> Qmp:
        self._qmp = await Qmp.connect(self._name, self._path)
        return self._qmp

    async def __aexit__(self, *_: object) -> None:
        await settle(self._qmp.close(), too_late=True)


class Migration:
    """One attempt to migrate."""

    def __init__(
        self,
        source: Qmp,
        destination: Qmp,
        options: Options,
        watch: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._source = source
        self._destination = destination
        self._options = options
        self._watch = watch
        self._policy = SendAll(options.limits)
        self._phases = Phases(lambda _: self._show())
        self._report = Report()
        self._round = Round(0, {}, {}, 0)
        self._bytes_per_s = 0.0
        self._owed: dict[str, DirtyBitmap] = {}
        self._sending = False
        self._draining = False

    # -- the order ------------------------------------------------------------------------------

    async def run(self) -> Report:
        """Migrate; see :func:`migrate` for what is raised."""
        try:
            plan = await preflight(
                self._source, self._destination, memory_only=self._options.memory_only
            )
            before = await remember(self._source, plan.was_running)
            destination_pidfd = os.pidfd_open(self._destination.pid)
        except (TrackerError, OSError) as error:
            raise Failed(Phase.PREFLIGHT.value, str(error)) from error
        self._report.guest_bytes = plan.guest_bytes
        self._report.memory_only = self._options.memory_only
        self._report.stopped_by = (
            "stop" if plan.stop_first or self._options.memory_only else "migrate"
        )
        self._plan = plan
        self._sources = Sources(self._source, plan)
        self._transport: Transport = LocalCopy(
            self._source.pid, plan.source, self._destination.pid, plan.destination
        )
        wards = Wards(
            os.path.abspath(self._source.path),
            self._source.pid,
            os.path.abspath(self._destination.path),
            self._destination.pid,
            before,
        )
        self._guard = guard = await in_thread(Guard, wards)
        switchover: Switchover | Rehearsal
        if self._options.memory_only:
            switchover = Rehearsal(
                self._source,
                plan,
                self._phases,
                guard,
                collect_and_send=self._collect_and_send,
                verify=self._verify,
            )
        else:
            switchover = Switchover(
                self._source,
                self._destination,
                destination_pidfd,
                plan,
                self._phases,
                guard,
                collect_and_send=self._collect_and_send,
                devices_stand=self._sources.stop_devices,
                verify=self._verify,
            )
        decided = False
        try:
            handed_over = await self._until_it_runs_there(switchover, before)
            decided = True
            await settle(self._let_go(switchover), too_late=True)
        except MigrationError as error:
            decided = True
            self._finish_report(error.status, error.reason)
            if isinstance(error, Undecided):
                self._report.known = list(error.known)
            error.report = self._report
            raise
        finally:
            os.close(destination_pidfd)
            end = guard.dismiss if decided else guard.leave_it_to_you
            await settle(asyncio.to_thread(end), too_late=True)
        self._report.downtime_ms = handed_over.downtime_ms
        self._report.device_state_bytes = handed_over.device_state_bytes
        self._finish_report("completed", "")
        return self._report

    async def _until_it_runs_there(
        self, switchover: Switchover | Rehearsal, before: Before
    ) -> HandedOver:
        try:
            await self._attach()
            await self._drain()
            await self._copy_everything()
            await self._rounds_until_converged()
            return await _not_cancelled_once_committed(switchover)
        except BaseException as error:
            await settle(self._roll_back(switchover, before, error))
            raise AssertionError("a rollback raises") from error

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

    async def _copy_everything(self) -> None:
        self._phases.enter(Phase.COPY)
        everything = {b.name: DirtyBitmap.full(b.npages) for b in self._plan.source}
        pages = _count(everything)
        self._round = Round(0, {"all": pages}, {}, pages)
        await self._send(everything)

    async def _rounds_until_converged(self) -> None:
        self._phases.enter(Phase.ROUNDS)
        while True:
            dirty = await self._collect()
            decision = self._policy.decide(
                Observation(
                    round=self._round.number,
                    elapsed_s=self._phases.elapsed_s,
                    dirty_bytes=self._bytes_of(dirty),
                    bytes_per_s=self._bytes_per_s or _UNMEASURED_BYTES_PER_S,
                    compare_bytes=self._bytes_of(self._sources.suspect_data()),
                    compare_bytes_per_s=_COMPARED_BYTES_PER_S,
                )
            )
            _log.info("round %d: %s", self._round.number, decision.reason)
            self._round.decision = decision.reason
            self._round.expected_downtime_ms = decision.expected_downtime_ms
            if decision.verdict is Verdict.ABORT:
                raise Aborted(self._phases.current.value, decision.reason)
            await self._send(dirty)
            if decision.verdict is Verdict.SWITCH_OVER and not self._owed:
                return

    async def _collect_and_send(self, collecting: Phase, sending: Phase) -> int:
        """A round while the source stands still.

        :return: how many pages were sent
        """
        if self._phases.current is not collecting:
            self._phases.enter(collecting)
        dirty = await self._collect()
        await self._add_suspects_that_changed(dirty)
        if self._phases.current is not sending:
            self._phases.enter(sending)
        await self._send(dirty)
        self._report.final_pages += self._round.sent_pages
        if self._owed:
            raise Failed(self._phases.current.value, "the last pages could not be delivered")
        return self._round.sent_pages

    async def _add_suspects_that_changed(self, dirty: dict[str, DirtyBitmap]) -> None:
        """Compare what may have been written without anybody's being told; it will be sent."""
        suspects = self._sources.take_suspects(dirty)
        if not any(pages.any() for pages in suspects.values()):
            return
        if self._phases.current is Phase.FINAL_COLLECT:
            self._phases.enter(Phase.COMPARE)
        started = time.monotonic()
        changed = await self._transport.changed(suspects, self._sources.data)
        for name, pages in changed.items():
            dirty[name] |= pages
        self._round.compared_pages = _count(suspects)
        self._round.differing_pages = _count(changed)
        self._round.dirty_pages = _count(dirty)
        self._round.compare_ms = (time.monotonic() - started) * 1000

    # -- one round ------------------------------------------------------------------------------

    async def _collect(self) -> dict[str, DirtyBitmap]:
        """What has to be sent now: the union of all sources, and what is still owed."""
        found = await self._sources.collect(backends_too=self._phases.current is Phase.ROUNDS)
        merged = found.merged
        dirty = merged.bitmaps
        for name, owed in self._owed.items():
            dirty[name] |= owed
        self._owed = {}
        self._round = Round(
            number=self._round.number + 1,
            dirty_pages_by_source=dict(merged.pages_by_source),
            only_by_source=dict(merged.only_by_source),
            pages_by_several=merged.pages_by_several,
            dirty_pages=_count(dirty),
            collect_ms=found.collect_ms,
            merge_ms=found.merge_ms,
        )
        self._show()
        return dirty

    def _bytes_of(self, pages: Mapping[str, DirtyBitmap]) -> int:
        return sum(pages[b.name].count() * b.page_size for b in self._plan.source)

    async def _send(self, dirty: Mapping[str, DirtyBitmap]) -> None:
        started = time.monotonic()
        self._sending = True
        ticker = asyncio.create_task(self._show_now_and_then())
        try:
            sent = await self._transport.send(dirty, self._sources.data)
        finally:
            ticker.cancel()
            self._sending = False
        spent_s = time.monotonic() - started
        self._owed = dict(sent.undelivered)
        self._round.sent_pages = sent.pages
        self._round.zero_pages = sent.zero_pages
        self._round.sent_bytes = sent.bytes
        self._round.send_ms = spent_s * 1000
        if sent.bytes >= _TELLING_BYTES or (sent.bytes and not self._bytes_per_s):
            self._bytes_per_s = sent.bytes / spent_s
        self._report.add(self._round)
        self._show()
        if sent.error is not None:
            raise Failed(self._phases.current.value, str(sent.error)) from sent.error

    async def _verify(self) -> None:
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

    # -- the ends -------------------------------------------------------------------------------

    async def _let_go(self, switchover: Switchover | Rehearsal) -> None:
        """Close the streams, unprotect the source, unmap both sides."""
        await switchover.close()
        if self._phases.current is Phase.FINISH and not self._options.memory_only:
            self._report.qemu_ram_transferred = await self._ram_that_qemu_sent()
        await self._sources.stop()
        await self._transport.close()

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
            await self._let_go(switchover)
            raise cause
        if switchover.was_running is not None:
            before = replace(before, was_running=switchover.was_running)
        before = replace(before, paused_by_us=switchover.paused_by_us or self._draining)
        self._phases.enter(Phase.ROLLBACK)
        await switchover.close()
        try:
            await bring_back(self._source, before)
        except VmError as error:
            known = [f"it was given up because {cause}", str(error), "the destination was not run"]
            raise Undecided(phase, "the source could not be brought back", known) from cause
        finally:
            await self._let_go(switchover)
        if isinstance(cause, MigrationError):
            raise cause
        if isinstance(cause, asyncio.CancelledError):
            raise Aborted(phase, "interrupted") from cause
        if isinstance(cause, (MigratorError, TrackerError, OSError, ValueError)):
            raise Failed(phase, str(cause)) from cause
        raise cause

    def _finish_report(self, status: str, reason: str) -> None:
        self._phases.end()
        report = self._report
        report.status = status  # type: ignore[assignment]
        report.reason = reason
        report.phases = self._phases.milliseconds()
        report.total_ms = self._phases.total_ms
        report.downtime_phases = [p.value for p in DOWNTIME if p.value in report.phases]
        if report.verified_pages is not None:
            report.verify_ms = report.phases.get(Phase.VERIFY.value)
        if report.downtime_ms is not None:
            report.downtime_ms -= report.verify_ms or 0.0
        self._show()

    async def _show_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(_SHOW_S)
            self._show()

    def _show(self) -> None:
        try:
            self._watch(self._progress())
        except Exception:  # noqa: BLE001 (theirs, whatever it is)
            _log.exception("whoever watches the migration failed; it goes on unwatched")
            self._watch = lambda _: None

    def _progress(self) -> Progress:
        return Progress(
            phase=self._phases.current.value,
            round=self._round.number,
            dirty_pages=self._round.dirty_pages,
            sent_pages=(self._transport.sent_pages if self._sending else self._round.sent_pages),
            total_sent_pages=self._report.pages_sent,
            bytes_per_s=self._bytes_per_s,
        )


def _count(bitmaps: Mapping[str, DirtyBitmap]) -> int:
    return sum(bitmap.count() for bitmap in bitmaps.values())


async def _not_cancelled_once_committed(switchover: Switchover | Rehearsal) -> HandedOver:
    task = asyncio.create_task(switchover.run())
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not switchover.committed:
                task.cancel()
        except BaseException:  # noqa: BLE001 (raised below, by the task's result)
            break
    return task.result()
