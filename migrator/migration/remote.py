"""A destination on another host: its receiver is asked to do each step."""

from __future__ import annotations

import asyncio
import logging
import time

from migrator.aio import settle, within
from migrator.errors import LinkError, LinkLost, Unconfirmed, VmError
from migrator.link.messages import Looked, State, Told, parse
from migrator.link.session import Link, Session, settle_outcome
from migrator.migration.wards import RemoteWard
from migrator.preflight.plan import Plan
from migrator.preflight.waiting import Side
from migrator.transport import Transport
from migrator.transport.stream import StreamCopy

_log = logging.getLogger(__name__)
_PARTING_S = 3.0
_ANSWERING_S = 5.0  # for a receiver to say what became of it


class RemoteDestination:
    """See :class:`migrator.migration.destination.Destination`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._told_to_go = False
        self._over = False

    @classmethod
    async def connect(cls, link: Link) -> RemoteDestination:
        """Reach the other host.

        :raise LinkError: nobody receives there, it is not who was expected, or it says no
        :raise ConfigError: the keys cannot be used
        """
        return cls(await Session.begin(link))

    async def look(self) -> Side:
        """What it is; nothing is changed there."""
        answer = await self._session.ask("look")
        return Side.from_said(parse(Looked, answer, self._session.peer).side)

    def transport(self, source_pid: int, plan: Plan) -> Transport:
        """A stream of pages."""
        self._copy = StreamCopy(self._session, source_pid, plan.source)
        return self._copy

    def ward(self) -> RemoteWard:
        """How a guard finds it."""
        return RemoteWard(self._session.link.to_json(), self._session.token)

    async def prepare(self) -> None:
        """Set it up for device state without RAM."""
        try:
            await self._session.ask("prepare")
        except LinkLost:
            # idle since the rounds began; the guest runs still
            await self._copy.reconnect()
            await self._session.ask("prepare")

    async def begin_loading(self) -> None:
        """Let it expect device state."""
        await self._session.ask("begin-loading")

    async def load(self, head: bytes, end: bytes, *, timeout_s: float) -> None:
        """Let it load all of the device state but its end, and keep that."""
        await self._session.ask("load", head + end, end=len(end), timeout_s=timeout_s)

    async def go(self, *, run: bool, timeout_s: float = 60.0) -> float | None:
        """See :meth:`migrator.migration.destination.Destination.go`.

        The two hosts have two clocks: when the guest began to run is told as a time after the word
        arrived, which is taken to be half a round trip after it was sent.
        """
        self._told_to_go = True
        sent_at = time.monotonic()
        asking = self._session.ask("go", run=run, timeout_s=timeout_s)
        try:
            answer = await within(timeout_s + _ANSWERING_S, asking)
            told = parse(Told, answer, self._session.peer)
        # none of which is an answer: what it is at, it did not say
        except (LinkError, VmError, asyncio.TimeoutError, asyncio.CancelledError) as error:
            told = await settle(self._ask_again(error), too_late=True)
        if told.state is State.NEVER:
            raise VmError("destination", f"did not run: {told.reason}")
        if told.state is not State.RUNNING:
            raise Unconfirmed("destination", [told.reason or f"it is {told.state.value}"])
        if told.after_s is None:
            return None
        return sent_at + self._session.rtt_s / 2 + told.after_s

    async def _ask_again(self, lost: BaseException) -> Told:
        """What became of it. To ask is to decide: if it has not gone by then, it never will."""
        self._session.break_off()  # a receiver that is busy for ever is asked anew
        link, token = self._session.link, self._session.token
        lost_by = str(lost) or type(lost).__name__
        _log.warning("lost the destination after it was told to go: %s", lost_by)
        try:
            return await settle_outcome(link, token, "source", patience_s=link.reconnect_s)
        except (LinkError, VmError) as error:
            raise Unconfirmed(
                "destination",
                [
                    f"it was told to go, and then lost: {lost_by}",
                    f"it could not be asked again: {error}",
                    "migrator resolve asks it, once it can be reached",
                ],
            ) from error

    async def close(self, reason: str = "") -> None:
        """Part: it runs, or it will not. May be called again."""
        if not self._over:
            self._over = True
            await settle(self._part(reason), too_late=True)

    async def _part(self, reason: str) -> None:
        self._session.break_streams()
        parting = self._session.ask("bye" if self._told_to_go else "abort", reason=reason)
        try:
            await within(_PARTING_S, parting)
        except (LinkError, VmError, asyncio.TimeoutError) as error:
            _log.info("parted without a word: %s", error)
        self._session.hang_up()


async def outcome(ward: RemoteWard, *, patience_s: float) -> bool:
    """Whether the destination runs; one that does not run by now never will. For a guard.

    :param ward: what :meth:`RemoteDestination.ward` gave
    :raise LinkError: it cannot be asked
    """
    link = Link(**ward.link)
    answer = await settle_outcome(link, ward.session, "source", patience_s=patience_s)
    if answer.state not in (State.RUNNING, State.NEVER):
        raise LinkError(f"{link.host}:{link.port}", answer.reason or answer.state.value)
    return answer.state is State.RUNNING
