"""The side that receives: what a migration asks of it, and a QEMU on this host that does it.

The same steps are taken on another host by its receiver, which holds one of these, when
:mod:`migrator.remote` asks for them.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any, Protocol

from migrator.devicestate import Outgoing
from migrator.errors import MigratorError, Unconfirmed, VmError
from migrator.preflight import Plan
from migrator.qmp import Event, Qmp, is_alive
from migrator.rollback import DESTINATION_CAPABILITIES
from migrator.side import Side, look_at
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

    def ward(self) -> dict[str, Any]:
        """How a guard finds it; see :class:`migrator.guard.Wards`."""

    async def prepare(self) -> None:
        """Set it up for device state without RAM."""

    async def begin_loading(self) -> None:
        """Let it expect device state."""

    async def load(self, head: bytes, end: bytes, *, timeout_s: float) -> None:
        """Load all of the device state but its end, which is kept; return when it was taken in."""

    async def go(self, *, run: bool) -> float | None:
        """Give QEMU the end, from which on it may run; let it run, if ``run``.

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

    @property
    def has_ended(self) -> bool:
        """Whether its process is gone; false once it was let go of."""
        return self._pidfd >= 0 and not is_alive(self._pidfd)

    async def look(self) -> Side:
        """What it is; nothing is changed."""
        return await look_at(self.qmp)

    def transport(self, source_pid: int, plan: Plan) -> Transport:
        """A copy from file to file."""
        return LocalCopy(source_pid, plan.source, self.qmp.pid, plan.destination)

    def ward(self) -> dict[str, Any]:
        """How a guard finds it."""
        return {"qmp": os.path.abspath(self.qmp.path), "pid": self.qmp.pid}

    async def prepare(self) -> None:
        """Set it up for device state without RAM."""
        await self.qmp.set_capabilities(DESTINATION_CAPABILITIES)

    async def begin_loading(self) -> None:
        """Let it expect device state."""
        self._outgoing = await Outgoing.begin(self.qmp)

    async def load(self, head: bytes, end: bytes, *, timeout_s: float) -> None:
        """See :meth:`Destination.load`."""
        if self._outgoing is None:
            raise VmError("destination", "was not told to expect device state")
        self._end = end
        await self._outgoing.load(head, timeout_s=timeout_s)

    async def go(self, *, run: bool) -> float | None:
        """See :meth:`Destination.go`."""
        assert self._outgoing is not None
        mark = self.qmp.mark()
        try:
            await self._outgoing.finish(self._end, timeout_s=_RESUME_S)
            resumed = await self._running(mark, run)
        except (MigratorError, OSError) as error:
            _log.warning("the destination did not confirm: %s", error)
            if not await self._runs_after_all(error, mark):
                raise VmError("destination", f"did not run: {error}") from error
            resumed = None
        return resumed.at if resumed else None

    async def _running(self, mark: int, run: bool) -> Event | None:
        def wanted(event: Event) -> bool:
            ended = event.name == "MIGRATION" and event.data["status"] in ("completed", "failed")
            return event.name == "RESUME" or ended

        event = await self.qmp.wait_for(wanted, since=mark, timeout_s=_RESUME_S)
        if event.data.get("status") == "failed":
            raise VmError("destination", "refused the end of the device state")
        if not run:
            return None
        if event.name != "RESUME":  # it was started with -S, or the source was paused
            await self.qmp.execute("cont")
            event = await self.qmp.wait_for(
                lambda e: e.name == "RESUME", since=mark, timeout_s=_RESUME_S
            )
        return event

    async def _runs_after_all(self, error: Exception, mark: int) -> bool:
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
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
