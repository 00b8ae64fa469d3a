"""The side that receives: what a migration asks of it, and a QEMU on this host that does it.

The same steps are taken on another host by its receiver, which holds one of these, when
:mod:`migrator.migration.remote` asks for them.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Protocol

from migrator.aio import settle
from migrator.errors import MigratorError, Unconfirmed, VmError
from migrator.migration.wards import LocalWard, RemoteWard
from migrator.preflight.plan import Plan
from migrator.preflight.waiting import Side, look_at
from migrator.qemu.devicestate import Outgoing
from migrator.qemu.qmp import Event, Qmp, is_alive
from migrator.qemu.settings import DESTINATION_CAPABILITIES, Settings, put_back, read_settings
from migrator.qemu.standing import Standing
from migrator.transport import Transport
from migrator.transport.local import LocalCopy

_log = logging.getLogger(__name__)
_RESUME_S = 60.0


class Destination(Protocol):
    """The side that receives, in the order in which it is asked.

    All raise a :class:`~migrator.errors.MigratorError` for what does not happen; until :meth:`go`
    that means that the destination will not run.
    """

    async def look(self) -> Side:
        """What it is; nothing is changed."""

    def transport(self, source_pid: int, plan: Plan) -> Transport:
        """What carries pages there."""

    def ward(self) -> LocalWard | RemoteWard:
        """How a guard finds it."""

    async def prepare(self) -> None:
        """Set it up for device state without RAM."""

    async def begin_loading(self) -> None:
        """Let it expect device state."""

    async def load(self, head: bytes, end: bytes, *, timeout_s: float) -> None:
        """Load all of the device state but its end, which is kept; return when it was taken in."""

    async def go(self, *, run: bool, timeout_s: float = _RESUME_S) -> float | None:
        """Give QEMU the end, from which on it may run; let it run, if ``run``.

        A cancellation is no way out: it only cuts the wait for QEMU short.

        :param timeout_s: how long to wait for QEMU before it is asked, and ended if it does not run
        :return: when its guest began to run, in seconds of this host's monotonic clock; ``None`` if
            it did not run, or if that is not known
        :raise VmError: it does not run, and never will
        :raise Unconfirmed: nobody knows
        """

    async def close(self, reason: str = "") -> None:
        """Let go of it. A destination that was not told to go will not run."""


class LocalDestination:
    """A QEMU on this host.

    :raise OSError: its process has ended
    """

    def __init__(self, qmp: Qmp) -> None:
        self.qmp = qmp
        self._pidfd = os.pidfd_open(qmp.pid)
        self._outgoing: Outgoing | None = None
        self._end = b""
        self._before: Settings | None = None
        self._changed = False
        self._standing: Standing | None = None

    @property
    def has_ended(self) -> bool:
        """Whether its process is gone; false once it was let go of."""
        return self._pidfd >= 0 and not is_alive(self._pidfd)

    async def look(self) -> Side:
        """What it is; nothing is changed."""
        side = await look_at(self.qmp)
        if not side.findings:
            self._before = await read_settings(self.qmp)
        return side

    def transport(self, source_pid: int, plan: Plan) -> Transport:
        """A copy from file to file."""
        return LocalCopy(source_pid, plan.source, self.qmp.pid, plan.destination)

    @property
    def settings(self) -> Settings:
        """Its capabilities and parameters of before, once it was looked at."""
        return self._before or Settings()

    def ward(self) -> LocalWard:
        """How a guard finds it."""
        return LocalWard(os.path.abspath(self.qmp.path), self.qmp.pid, self.settings)

    async def prepare(self) -> None:
        """Set it up for device state without RAM."""
        if self._before is None:
            self._before = await read_settings(self.qmp)
        self._changed = True
        await self.qmp.set_capabilities(DESTINATION_CAPABILITIES)

    async def put_back(self) -> None:
        """Undo what :meth:`prepare` did. May be called again; never raises."""
        if self._changed and self._before is not None and not self.has_ended:
            self._changed = False
            try:
                await put_back(self.qmp, self._before)
            except VmError as error:  # it has ended, most likely
                _log.info("the destination is not as it was before: %s", error)

    async def begin_loading(self) -> None:
        """Let it expect device state."""
        self._standing = Standing(self.qmp, self.qmp.mark())
        self._outgoing = await Outgoing.begin(self.qmp)

    async def load(self, head: bytes, end: bytes, *, timeout_s: float) -> None:
        """See :meth:`Destination.load`."""
        if self._outgoing is None:
            raise VmError("destination", "was not told to expect device state")
        self._end = end
        await self._outgoing.load(head, timeout_s=timeout_s)

    async def go(self, *, run: bool, timeout_s: float = _RESUME_S) -> float | None:
        """See :meth:`Destination.go`."""
        if self._outgoing is None or self._standing is None:
            raise VmError("destination", "was not told to expect device state")
        await self._check_waits(self._standing)
        mark = self.qmp.mark()
        try:
            await self._outgoing.finish(self._end, timeout_s=timeout_s)
            resumed = await self._running(mark, run, timeout_s)
        except (MigratorError, OSError, asyncio.CancelledError) as error:
            _log.warning("the destination did not confirm: %s", error or "interrupted")
            if not await settle(self._runs_after_all(error, mark), too_late=True):
                raise VmError("destination", f"did not run: {error or 'interrupted'}") from error
            resumed = None  # when is not known
        await settle(self.put_back(), too_late=True)
        return resumed.at if resumed else None

    async def _check_waits(self, standing: Standing) -> None:
        """Check that it has all but the end, and that nothing has changed it since.

        :raise NotStanding: another client has reset it, or let it run
        """
        try:
            await standing.check(("inmigrate",))
        except asyncio.CancelledError as error:  # it lacks the end: it will not run
            raise VmError("destination", "did not run: interrupted") from error

    async def _running(self, mark: int, run: bool, timeout_s: float) -> Event | None:
        def wanted(event: Event) -> bool:
            ended = event.name == "MIGRATION" and event.data["status"] in ("completed", "failed")
            return event.name == "RESUME" or ended

        event = await self.qmp.wait_for(wanted, since=mark, timeout_s=timeout_s)
        if event.data.get("status") == "failed":
            raise VmError("destination", "refused the end of the device state")
        if event.name == "RESUME":
            return event if run else None
        # RESUME comes before "completed": it was started with -S, or the source was paused, or its
        # images cannot be activated, of which QEMU 10 tells by its state alone
        if await self.qmp.run_state() == "inmigrate":
            raise VmError(
                "destination",
                "has all of the VM and does not start it: an image cannot be opened for writing, "
                "as another process has locked it, most likely",
            )
        if not run:
            return None
        await self.qmp.execute("cont")
        return await self.qmp.wait_for(
            lambda e: e.name == "RESUME", since=mark, timeout_s=timeout_s
        )

    async def _runs_after_all(self, error: BaseException, mark: int) -> bool:
        """Whether the destination runs (true) or is known never to run (false).

        It is stopped first, or it could start between being asked and being ended. One that has
        run already, for however short a time, is the one to go on.

        :raise Unconfirmed: neither is known
        """
        known = [str(error)]
        try:
            was = await self.qmp.run_state()
            known.append(f"the destination answers, and is {was!r}")
            await self.qmp.execute("stop")
            await self.qmp.run_state()  # events that came before this answer are here
            if was == "running" or self.qmp.seen("RESUME", since=mark):
                await self.qmp.execute("cont")
                return True
            await self.qmp.execute("quit")
        except VmError as lost:
            known.append(str(lost))
        for _ in range(200):
            if not is_alive(self._pidfd):
                if not self.qmp.seen("RESUME", since=mark):
                    return False
                known.append("the destination ran, and its process has ended")
                break
            await asyncio.sleep(0.01)
        else:
            known.append(f"the destination's process {self.qmp.pid} is alive")
        raise Unconfirmed("destination", known)

    async def close(self, reason: str = "") -> None:
        """Close the stream: a destination that lacks its end fails. May be called again."""
        if self._outgoing is not None:
            self._outgoing.close()
        await self.put_back()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
