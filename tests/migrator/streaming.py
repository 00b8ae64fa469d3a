"""A stream between the RAM of two processes: all of it is real but QEMU, and the way may be cut."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from migrator.aio import within
from migrator.errors import MigratorError
from migrator.link.session import Link, Session
from migrator.link.tls import load
from migrator.migration.destination import LocalDestination
from migrator.qemu.qmp import MemoryBackend
from migrator.receiver.door import listen
from migrator.receiver.incoming import Outcome
from migrator.receiver.receiver import Receiver
from migrator.transport.stream import StreamCopy
from tests.tracker import naive
from tests.tracker.mapper import PAGE, Mapper, Ram
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet

LOOPBACK = "127.0.0.1"
_END_S = 10.0

Pages = Mapping[str, set[int]]
"""Numbers of pages, by block."""


class Side:
    """A process with RAM blocks."""

    def __init__(self, directory: Path, sizes: Mapping[str, int]) -> None:
        directory.mkdir()
        self.mapper = Mapper()
        self.rams = {
            name: Ram(directory / name, npages, name, self.mapper) for name, npages in sizes.items()
        }

    def end(self) -> None:
        self.mapper.end()

    def data(self) -> PageSet:
        """Pages that hold data."""
        found = {}
        for name, ram in self.rams.items():
            with ram.path.open("rb") as file:
                data = naive.data(file.fileno(), ram.npages, PAGE)
            found[name] = DirtyBitmap.from_pages(ram.npages, sorted(data))
        return PageSet((ram.block for ram in self.rams.values()), found)

    def full(self) -> PageSet:
        return PageSet.full(ram.block for ram in self.rams.values())

    def pages(self, pages: Pages) -> PageSet:
        return PageSet(
            (ram.block for ram in self.rams.values()),
            {
                name: DirtyBitmap.from_pages(ram.npages, sorted(pages.get(name, set())))
                for name, ram in self.rams.items()
            },
        )


class Waiting:
    """In the place of a QEMU that waits: only its RAM is real.

    :ivar closed: why it was given up
    """

    def __init__(self, side: Side) -> None:
        self.name, self.pid = "destination", side.mapper.pid
        self.qmp = self
        self.closed: str | None = None
        self._rams = side.rams

    async def memory_backends(self) -> list[MemoryBackend]:
        return [
            MemoryBackend(name, "memory-backend-file", ram.size, True, str(ram.path))
            for name, ram in self._rams.items()
        ]

    async def close(self, reason: str = "") -> None:
        self.closed = reason


@dataclass
class Cut:
    """When the way of one connection is cut: once more than so many bytes have come.

    :ivar up: from the source; likewise ``down``, from the receiver
    """

    up: int | None = None
    down: int | None = None


NEVER = Cut()


class Way:
    """Passes on what comes, and cuts some connections: all that was passed on until then arrives.

    :ivar cuts: what happens to the next connections, in the order in which they are made
    :ivar up: bytes that came from the source, by connection; likewise ``down``
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()
        self.cuts: list[Cut] = []
        self.up: list[int] = []
        self.down: list[int] = []

    async def listen(self) -> int:
        self._server = await asyncio.start_server(self._pass_on, LOOPBACK, 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _pass_on(self, near: asyncio.StreamReader, to_near: asyncio.StreamWriter) -> None:
        far, to_far = await asyncio.open_connection(LOOPBACK, self._port)
        cut = self.cuts.pop(0) if self.cuts else NEVER
        number = len(self.up)
        self.up.append(0)
        self.down.append(0)
        ways = [
            self._one_way(near, to_far, self.up, number, cut.up),
            self._one_way(far, to_near, self.down, number, cut.down),
        ]
        tasks = [asyncio.create_task(way) for way in ways]
        self._tasks.update(tasks)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._end(far, to_far)
            to_near.close()  # which makes the source come back: what is not read by then is dropped

    async def _end(self, far: asyncio.StreamReader, to_far: asyncio.StreamWriter) -> None:
        """Close with nothing unread: otherwise the receiver would lose what it has not read yet."""
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            to_far.write_eof()
            await within(_END_S, far.read())  # what comes back is dropped
        to_far.close()

    async def _one_way(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        counts: list[int],
        number: int,
        most: int | None,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                room = len(data) if most is None else most - counts[number]
                counts[number] += len(data)
                writer.write(data[: max(0, room)])
                await writer.drain()
                if room < len(data):
                    return

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@dataclass
class Hosts:
    """A source, a receiver, and the way between them.

    :ivar said: what the receiver said for people
    """

    source: Side
    destination: Side
    waiting: Waiting
    receiver: Receiver
    receiving: asyncio.Task[Outcome]
    way: Way
    copy: StreamCopy
    said: list[str] = field(default_factory=list)

    def differing(self) -> dict[str, set[int]]:
        """Pages that differ, by looking at all bytes of both sides."""
        return {
            name: naive.differing(ram.content(), self.destination.rams[name].content(), PAGE)
            for name, ram in self.source.rams.items()
        }


@asynccontextmanager
async def connected(
    directory: Path,
    sizes: Mapping[str, int],
    *,
    keys: Path | None = None,
    cuts: list[Cut] | None = None,
    prepare: Callable[[Side, Side], None] = lambda source, destination: None,
    destination_directory: Path | None = None,
    **link: Any,
) -> AsyncIterator[Hosts]:
    """Two hosts, and a stream that is open between them.

    :param keys: see :func:`migrator.link.tls.load`; not secured without
    :param cuts: see :class:`Way`; the first connection is the one for messages
    :param prepare: fills their RAM
    """
    source = Side(directory / "source", sizes)
    destination = Side((destination_directory or directory) / "destination", sizes)
    said: list[str] = []
    listener = listen(LOOPBACK, 0)
    try:
        prepare(source, destination)
        waiting = Waiting(destination)
        context = load(keys).server_context() if keys else None
        receiver = Receiver(cast(LocalDestination, waiting), context, None, said.append)
        receiving = asyncio.create_task(receiver.serve(listener))
        way = Way(listener.getsockname()[1])
        port = await way.listen()
        way.cuts = list(cuts or [])
        session = await Session.begin(Link(LOOPBACK, port, tls=str(keys) if keys else None, **link))
        blocks = [ram.block for ram in source.rams.values()]
        copy = StreamCopy(session, source.mapper.pid, blocks)
        hosts = Hosts(source, destination, waiting, receiver, receiving, way, copy, said)
        try:
            await copy.open()
            yield hosts
        finally:
            with contextlib.suppress(MigratorError):
                await session.ask("abort", reason="the test is over")
            await copy.close()
            receiver.stop()  # which may be over
            await asyncio.wait_for(receiving, 60)
            await way.close()
    finally:
        listener.close()
        source.end()
        destination.end()
