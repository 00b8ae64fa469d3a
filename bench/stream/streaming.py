"""Both ends of our own stream, without QEMU: memory is a file in each process."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.stream.content import PAGE, Shape, fresh
from bench.stream.loops import Took
from migrator.link import envelope
from migrator.link.connection import Connection
from migrator.link.session import Link, Session
from migrator.link.tls import load
from migrator.transport.arrivals import Arrivals, Target
from migrator.transport.stream import StreamCopy
from migrator.transport.warm import warm_up
from tracker.bits.pageset import PageSet
from tracker.memory.ram import RamBlock

_NAME = "ram"


@dataclass(frozen=True)
class Streamed:
    """What the source's end saw.

    :ivar content_bytes: pages that were not zeros
    :ivar wire_bytes: before encryption
    """

    took: Took
    pages: int
    content_bytes: int
    wire_bytes: int


def send(_: socket.socket, link: Link, source: Path, shape: Shape) -> Streamed:
    """Send a file's dirty pages once; the time ends when the receiver has written the last."""
    return asyncio.run(_send(link, source, shape))


async def _send(link: Link, source: Path, shape: Shape) -> Streamed:
    fd = os.open(source, os.O_RDWR | os.O_CLOEXEC)
    block = _block(fd)
    session = await Session.begin(link)
    copy = StreamCopy(session, os.getpid(), [block])
    try:
        await copy.open()
        dirty = PageSet([block], {_NAME: shape.dirty(block.size)})
        started, cpu = time.monotonic(), time.process_time()
        sent = await copy.send(dirty, PageSet.full([block]))
        took = Took(time.monotonic() - started, time.process_time() - cpu)
        if sent.error is not None:
            raise sent.error
        await session.ask("bye")
    finally:
        await copy.close()
        os.close(fd)
    return Streamed(took, sent.pages, sent.bytes, sent.wire_bytes)


def receive(
    listener: socket.socket, keys: str | None, destination: Path, size: int, streams: int
) -> Took:
    """Receive into a new file what comes in one migration."""
    listener.setblocking(False)
    try:
        return asyncio.run(_receive(listener, keys, destination, size, streams))
    finally:
        listener.setblocking(True)


async def _receive(
    listener: socket.socket, keys: str | None, destination: Path, size: int, streams: int
) -> Took:
    warm_up()
    context = load(Path(keys)).server_context() if keys else None

    async def accept(**answer: Any) -> Connection:
        sock, _ = await asyncio.get_running_loop().sock_accept(listener)
        connection = await Connection.accept(sock, context)
        await connection.receive()
        await connection.send(answer)
        return connection

    control = await accept()
    fd = fresh(destination, size)
    target = Target(os.getpid(), _block(fd))
    arrivals: list[Arrivals] = []
    problems: list[Exception] = []
    started = cpu = 0.0
    asked = ""
    while asked != "bye":
        # nothing is reserved: the allocation of pages is a part of the time that is measured
        said, _ = await control.receive(blob=envelope.STATE_LIMIT)
        asked = said["do"]
        await control.send({})
        if asked == "open":
            for _ in range(streams):
                connection = await accept(round=0, frames=0)
                sock = connection.for_thread()
                arrivals.append(Arrivals(sock, "source", [target], 0, spoilt=problems.append))
            for arrival in arrivals:
                arrival.start()
        if asked == "reserve":
            started, cpu = time.monotonic(), time.process_time()
    took = Took(time.monotonic() - started, time.process_time() - cpu)
    for arrival in arrivals:
        arrival.hang_up()
    if problems:
        raise problems[0]
    control.close()
    target.close()
    os.close(fd)
    return took


def _block(fd: int) -> RamBlock:
    status = os.fstat(fd)
    return RamBlock(_NAME, status.st_size, PAGE, 0, status.st_dev, status.st_ino)
