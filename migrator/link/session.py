"""The source's end of a migration to another host: one connection for messages, some for pages.

Whatever is asked is answered. A link that breaks while the guest runs is made again, and the other
side says how much of what was sent has arrived.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from migrator.aio import within
from migrator.choices import COMPRESS, RECONNECT_S, SILENCE_S, STREAMS
from migrator.errors import LinkError, LinkLost, VmError
from migrator.link.connection import Connection, hang_up
from migrator.link.messages import Arrived, Told, is_busy, parse

_log = logging.getLogger(__name__)
_ANSWER_S = 15.0  # who is busy says so every second
_AGAIN_S = 0.2
_ATTEMPT_S = 1.0
_WORDS = 4096  # of what the other host says, in characters


@dataclass(frozen=True)
class Link:
    """Where a VM is received, and how it gets there.

    :ivar tls: directory of this host's keys (:func:`migrator.link.tls.load`); ``None``: not secured
    :ivar peer: whom to expect there, if not ``host``: a name, or a fingerprint
    :ivar streams: connections for pages
    :ivar compress: ``none``, ``auto``, ``zstd`` or ``zstd:LEVEL``
    :ivar bandwidth_bytes_per_s: what may be sent; ``None``: no limit
    :ivar reconnect_s: how long to try to reach a host again that was lost; 0: not at all
    :ivar silence_s: a host that acknowledges nothing for so long is lost
    """

    host: str
    port: int
    tls: str | None = None
    peer: str | None = None
    streams: int = STREAMS
    compress: str = COMPRESS
    bandwidth_bytes_per_s: float | None = None
    reconnect_s: float = RECONNECT_S
    silence_s: float = SILENCE_S

    async def connect(
        self, greeting: dict[str, Any], *, timeout_s: float = SILENCE_S
    ) -> tuple[Connection, dict[str, Any]]:
        """Make a connection, and say what it is for.

        :param timeout_s: for the connection to be made
        :return: the connection, and the answer
        :raise LinkError: nobody is there, it is somebody else, or it said no
        :raise ConfigError: the keys cannot be used
        """
        context = None
        if self.tls is not None:
            from migrator.link.tls import load

            context = load(Path(self.tls)).client_context(self.peer)
        wanted = self.peer or self.host
        connection = await Connection.connect(
            self.host,
            self.port,
            context,
            server_name=self.host if wanted.startswith("sha256:") else wanted,
            wanted=wanted,
            timeout_s=timeout_s,
        )
        try:
            connection.lose_after(self.silence_s)
            await connection.send(greeting)
            return connection, await answer_of(connection)
        except BaseException:
            connection.close()
            raise

    def to_json(self) -> dict[str, Any]:
        """As JSON; ``Link(**said)`` is the way back."""
        return asdict(self)


async def answer_of(connection: Connection) -> dict[str, Any]:
    """The answer to what was asked.

    :raise LinkLost: the connection broke, or nobody says anything any more
    :raise VmError: the QEMU there failed
    :raise LinkError: the other host said no
    """
    while True:
        try:
            said, _ = await within(_ANSWER_S, connection.receive())
        except asyncio.TimeoutError as error:
            raise LinkLost(connection.peer, f"no answer in {_ANSWER_S:g} s") from error
        if is_busy(said):
            continue
        if "vm" in said:
            raise VmError("destination", str(said["vm"])[:_WORDS])
        if "no" in said:
            raise LinkError(connection.peer, str(said["no"])[:_WORDS])
        return said


@dataclass(frozen=True)
class Applied:
    """How far a stream has come, at the other side.

    :ivar round: number of the round that is under way there
    :ivar frames: of it, frames that were written to RAM
    """

    round: int
    frames: int

    @classmethod
    def from_json(cls, said: dict[str, Any], peer: str) -> Applied:
        """What the other side told.

        :raise WireError: that makes no sense
        """
        arrived = parse(Arrived, said, peer)
        return cls(arrived.round, arrived.frames)

    def of_round(self, number: int) -> int | None:
        """How many frames of a round have arrived; ``None``: all of them.

        What was told of an earlier round says that nothing of this one came.
        """
        if self.round > number:
            return None
        return self.frames if self.round == number else 0


class Session:
    """The connections of one migration.

    :ivar token: names the migration
    :ivar streams: blocking sockets, each for a thread of its own
    :ivar rtt_s: shortest time that an answer took
    """

    def __init__(self, link: Link, control: Connection) -> None:
        self.link = link
        self._control = control
        self.token = secrets.token_hex(16)
        self.streams: list[socket.socket] = []
        self.rtt_s = 0.0

    @classmethod
    async def begin(cls, link: Link) -> Session:
        """Connect; nothing is agreed yet.

        :raise LinkError: see :meth:`Link.connect`
        """
        control, _ = await link.connect({"purpose": "migrate"})
        session = cls(link, control)
        times = []
        for _ in range(3):
            started = time.monotonic()
            await session.ask("ping")
            times.append(time.monotonic() - started)
        session.rtt_s = min(times)
        return session

    @property
    def peer(self) -> str:
        """The other host, for people."""
        return self._control.peer

    async def ask(self, what: str, blob: bytes = b"", **arguments: Any) -> dict[str, Any]:
        """Ask for something to be done; return the answer.

        :raise LinkLost, VmError, LinkError: see :func:`answer_of`
        """
        await self._control.send({"do": what, **arguments}, blob)
        return await answer_of(self._control)

    async def open(self, blocks: Sequence[str]) -> None:
        """Let the other side open its RAM, and connect the streams.

        :param blocks: names, in the order of the indices in frames
        """
        await self.ask(
            "open",
            session=self.token,
            blocks=list(blocks),
            reconnect_s=self.link.reconnect_s,
            silence_s=self.link.silence_s,
        )
        await self._connect_streams(0)

    async def _connect_streams(self, number: int, *, timeout_s: float = SILENCE_S) -> list[Applied]:
        applied = []
        for index in range(self.link.streams):
            greeting = {
                "purpose": "stream",
                "session": self.token,
                "stream": index,
                "round": number,
            }
            connection, answer = await self.link.connect(greeting, timeout_s=timeout_s)
            self.streams.append(connection.for_thread())
            applied.append(Applied.from_json(answer, connection.peer))
        return applied

    async def resume(self, number: int) -> list[Applied]:
        """Make all connections again.

        :param number: of the round that comes next
        :return: how far each stream had come
        :raise LinkError: not within the time for that, or the other side has given up
        """
        self.hang_up()
        if not self.link.reconnect_s:
            raise LinkLost(self.peer, "lost, and not to be reached again")
        deadline = time.monotonic() + self.link.reconnect_s
        while True:
            timeout_s = _attempt_s(deadline)
            try:
                greeting = {"purpose": "resume", "session": self.token}
                self._control, _ = await self.link.connect(greeting, timeout_s=timeout_s)
                applied = await self._connect_streams(number, timeout_s=timeout_s)
            except LinkLost as error:
                self.hang_up()
                if time.monotonic() > deadline:
                    raise
                _log.info("not yet: %s", error)
                await asyncio.sleep(_AGAIN_S)
            else:
                _log.info("connected again to %s", self.peer)
                return applied

    def break_streams(self) -> None:
        """Let whoever sends or receives on a stream fail at once."""
        for stream in self.streams:
            hang_up(stream)

    def break_off(self) -> None:
        """Let whoever waits for an answer fail at once."""
        self._control.hang_up()

    def hang_up(self) -> None:
        """Close everything. May be called again. No thread may be in a stream any more."""
        self._control.close()
        while self.streams:
            self.streams.pop().close()


def _attempt_s(deadline: float) -> float:
    """How long one attempt to connect may take, so that the last one ends near the deadline."""
    return min(SILENCE_S, max(_ATTEMPT_S, deadline - time.monotonic()))


async def settle_outcome(link: Link, token: str, decide: str | None, *, patience_s: float) -> Told:
    """Ask the receiving side what became of a migration, perhaps deciding it.

    :param token: the migration; ``""`` for the one it has
    :param decide: ``source``: unless it was told to go, it never will; ``destination``: run, if all
        is there; ``None``: only tell
    :param patience_s: how long to try to reach it
    :return: its state, and what is known
    :raise LinkError: it cannot be reached, or refuses
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            connection, answer = await link.connect(
                {"purpose": "resolve", "session": token, "decide": decide},
                timeout_s=_attempt_s(deadline),
            )
        except LinkLost:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(_AGAIN_S)
        else:
            connection.close()
            return parse(Told, answer, connection.peer)
