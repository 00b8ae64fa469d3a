"""The order of a migration, top to bottom."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable

from migrator.aio import in_thread, settle
from migrator.errors import ConfigError, Failed, QmpUnreachable, SourceUnreachable, VmError
from migrator.link.session import Link
from migrator.migration.account import Account
from migrator.migration.attempt import Attempt
from migrator.migration.destination import Destination, LocalDestination
from migrator.migration.options import Options
from migrator.migration.remote import RemoteDestination
from migrator.preflight.preflight import preflight
from migrator.qemu.qmp import Qmp
from migrator.qemu.rollback import remember
from migrator.report.phases import Phase
from migrator.report.report import Progress, Report
from tracker.errors import TrackerError
from tracker.warm import warm_up

_IGNORES_RAM = (
    "the source has the capability x-ignore-shared on, as a migration that was killed leaves it: "
    "its snapshots (savevm) would hold no RAM; migrator resolve --source puts it back"
)


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
    """Looks at both sides, and makes one attempt to migrate."""

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

    async def run(self) -> Report:
        """Migrate; see :func:`migrate` for what is raised."""
        options, account = self._options, self._account
        try:
            plan = await preflight(
                self._source,
                await self._destination.look(),
                memory_only=options.memory_only,
                tracker=options.tracker,
                throttles=options.throttle_percent > 0,
            )
            began = self._source.mark()
            before = await remember(self._source, plan.was_running)
        except (TrackerError, OSError, VmError) as error:
            await self._check_reachable(error)
            if isinstance(error, VmError):
                raise
            raise Failed(Phase.PREFLIGHT.value, str(error)) from error
        ignores_ram = before.settings.capabilities.get("x-ignore-shared")
        account.of(
            plan.source,
            (*plan.warnings, *[_IGNORES_RAM] * bool(ignores_ram)),
            dirty_map=options.dirty_map,
        )
        account.asked(
            options.policy,
            options.limits.downtime_ms,
            stopped_by="stop" if plan.stop_first or options.memory_only else "migrate",
            memory_only=options.memory_only,
        )
        await Attempt(self._source, self._destination, options, plan, before, began, account).run()
        return account.report

    async def _check_reachable(self, why: Exception) -> None:
        """Check that the source answers still, before it is said to run.

        :raise SourceUnreachable: it does not
        """
        try:
            await self._source.run_state()
        except VmError:
            raise SourceUnreachable("source", str(why)) from why
