"""The port at which a receiver is reached: connections are made there, and say what they are for.

Connections that have not said it yet are limited in number and time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

from migrator.aio import within
from migrator.errors import MigratorError, WireError
from migrator.link import envelope
from migrator.link.connection import Connection
from migrator.link.messages import Greeting, State, parse

_log = logging.getLogger(__name__)
_GREETING_S = 10.0
_PENDING = 64  # connections that have not said yet what they are for
LINGER_S = 600.0
"""How long to be there to tell a source that was lost at the wrong moment that its VM never ran."""

Attend = Callable[[Connection, Greeting], Awaitable[bool]]
"""Does what a connection is for; returns whether the connection is still needed."""


class Door:
    """Lets connections in while its ``async with`` block runs.

    :param listener: listening, not blocking
    :param context: a server's; ``None``: not secured
    :param peer: the host that may connect, if not each with a certificate; see
        :func:`migrator.link.tls.check_peer`
    :param attend: called for each connection that has said what it is for
    """

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext | None,
        peer: str | None,
        attend: Attend,
    ) -> None:
        self._listener = listener
        self._context = context
        self._peer = peer
        self._attend = attend
        self._pending: list[asyncio.Task[None]] = []
        self._attending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Door:
        self._accepting = asyncio.create_task(self._accept())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        tasks = (self._accepting, *self._pending, *self._attending)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # out of descriptors, for one
                _log.warning("cannot accept a connection: %s", error)
                await asyncio.sleep(0.1)
                continue
            if len(self._pending) >= _PENDING:
                self._pending.pop(0).cancel()
            task = asyncio.create_task(self._greet(sock))
            self._pending.append(task)
            task.add_done_callback(self._greeted)

    def _greeted(self, task: asyncio.Task[None]) -> None:
        with contextlib.suppress(ValueError):
            self._pending.remove(task)

    async def _greet(self, sock: socket.socket) -> None:
        connection: Connection | None = None
        try:
            connection = await Connection.accept(
                sock, self._context, wanted=self._peer, timeout_s=_GREETING_S
            )
            said, _ = await within(_GREETING_S, connection.receive(limit=envelope.GREETING_LIMIT))
        except (MigratorError, OSError, asyncio.TimeoutError) as error:
            _log.info("a connection came to nothing: %s", error)
            (connection or sock).close()
            return
        except BaseException:
            (connection or sock).close()
            raise
        task = asyncio.create_task(self._see_to(connection, said))
        self._attending.add(task)
        task.add_done_callback(self._attending.discard)

    async def _see_to(self, connection: Connection, said: dict[str, Any]) -> None:
        kept = False
        try:
            try:
                greeting = parse(Greeting, said, connection.peer)
            except WireError as error:
                await connection.send({"no": error.reason})
                return
            kept = await self._attend(connection, greeting)
        except (MigratorError, OSError) as error:
            _log.info("a connection ended: %s", error)
        finally:
            if not kept:
                connection.close()


def refusal(
    connection: Connection, said: Greeting, token: str, opened_by: str | None, ours: str | None
) -> dict[str, Any] | None:
    """The answer to a connection that asks for another migration, or may not decide this one.

    :param token: names the migration
    :param opened_by: fingerprint of the certificate that opened it
    :param ours: fingerprint of this host's own certificate, which may decide, too
    """
    if said.session not in ("", token):
        return {"state": State.WAITING.value, "reason": "no such migration came here"}
    if said.decide and connection.fingerprint not in (opened_by, ours):
        why = "only the host that opened this migration may decide, or this one by its own keys"
        return {"no": why}
    return None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, not blocking.

    :raise OSError: the address is not this host's, or the port is taken
    """
    family = socket.AF_INET6 if ":" in host or not host else socket.AF_INET
    with contextlib.suppress(OSError):
        family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0][0]
    dual = family == socket.AF_INET6 and not host
    listener = socket.create_server((host, port), family=family, backlog=512, dualstack_ipv6=dual)
    listener.setblocking(False)
    return listener
