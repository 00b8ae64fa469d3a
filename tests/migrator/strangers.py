"""Somebody at the other end who says what a test wants said."""

from __future__ import annotations

import asyncio
import json
import ssl
from typing import Any

from migrator.link import envelope


class Stranger:
    """A connection on which anything may be said."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(
        cls,
        port: int,
        greeting: dict[str, Any] | None = None,
        *,
        host: str = "127.0.0.1",
        context: ssl.SSLContext | None = None,
    ) -> Stranger:
        """Connect; say who we are, and ``greeting``, unless there is none."""
        stranger = cls(*await asyncio.open_connection(host, port, ssl=context))
        if greeting is not None:
            stranger.writer.write(envelope.opening())
            assert await stranger.reader.readexactly(envelope.OPENING_SIZE) == envelope.opening()
            stranger.write(greeting)
        return stranger

    def write(self, said: dict[str, Any], blob: bytes = b"") -> None:
        self.writer.write(envelope.message(said, len(blob)) + blob)

    async def hear(self) -> dict[str, Any]:
        """The next message that says something."""
        while True:
            head = await self.reader.readexactly(envelope.MESSAGE_SIZE)
            sizes = envelope.message_sizes(head, "", limit=envelope.MESSAGE_LIMIT, blob=0)
            said = json.loads(await self.reader.readexactly(sizes[0]))
            if "busy" not in said:
                assert isinstance(said, dict)
                return said

    async def ask(self, what: str, blob: bytes = b"", **arguments: Any) -> dict[str, Any]:
        self.write({"do": what, **arguments}, blob)
        return await self.hear()

    async def rest(self) -> bytes:
        """All that comes until the other side hangs up."""
        try:
            return await asyncio.wait_for(self.reader.read(), 60)
        except ConnectionError:
            return b""

    def close(self) -> None:
        self.writer.transport.abort()


async def ask(port: int, greeting: dict[str, Any]) -> dict[str, Any]:
    """What a connection is answered that says this."""
    stranger = await Stranger.connect(port, greeting)
    try:
        return await stranger.hear()
    finally:
        stranger.close()
