"""The cheapest that could be: bare loops of send and receive, over as many connections.

``hot`` loops send one buffer of 1 MiB over and over, and receive into one, so that memory hardly
takes part. The others send a mapped file, each byte once, and write what comes to a new one.
"""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.hosts.worker import PORT
from bench.stream.content import fresh
from migrator.link.tls import load

_PIECE = 1 << 20


@dataclass(frozen=True)
class Loop:
    """How to send.

    :ivar size: bytes
    :ivar hot: no files
    :ivar host: the receiver's address; ``keys`` has directories for both, or is ``None``
    """

    size: int
    connections: int
    hot: bool
    host: str
    keys: tuple[str, str] | None

    def share(self, index: int) -> range:
        """Where the pieces begin that go over a connection."""
        return range(index * _PIECE, self.size, self.connections * _PIECE)


@dataclass(frozen=True)
class Took:
    """What one end spent: seconds, and seconds of CPU time."""

    wall_s: float
    cpu_s: float


def send(_: socket.socket, loop: Loop, source: Path) -> Took:
    """Send; return when the last byte was acknowledged by the receiver itself."""
    context = load(Path(loop.keys[0])).client_context() if loop.keys else None
    sockets = []
    for _index in range(loop.connections):
        sock: socket.socket = socket.create_connection((loop.host, PORT))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            sock = context.wrap_socket(sock, server_hostname=loop.host)
        sockets.append(sock)
    buffer = memoryview(os.urandom(_PIECE))
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = memoryview(mapped)

        def run(index: int) -> None:
            sock = sockets[index]
            for at in loop.share(index):
                sock.sendall(buffer if loop.hot else view[at : at + _PIECE])
            assert sock.recv(1)

        took = _on_all(loop.connections, run)
        view.release()
    for sock in sockets:
        sock.close()
    return took


def receive(listener: socket.socket, loop: Loop, destination: Path) -> Took:
    """Receive, and acknowledge the last byte."""
    context = load(Path(loop.keys[1])).server_context() if loop.keys else None
    sockets = []
    for _ in range(loop.connections):
        sock, _ = listener.accept()
        if context is not None:
            sock = context.wrap_socket(sock, server_side=True)
        sockets.append(sock)
    fd = -1 if loop.hot else fresh(destination, loop.size)

    def run(index: int) -> None:
        sock, buffer = sockets[index], memoryview(bytearray(_PIECE))
        for at in loop.share(index):
            left = buffer
            while left:
                received = sock.recv_into(left)
                assert received, "hung up"
                left = left[received:]
            if fd >= 0:
                assert os.pwrite(fd, buffer, at) == _PIECE
        sock.sendall(b".")

    took = _on_all(loop.connections, run)
    for sock in sockets:
        sock.close()
    if fd >= 0:
        os.close(fd)
    return took


def _on_all(count: int, run: Callable[[int], None]) -> Took:
    with ThreadPoolExecutor(count) as pool:
        started, cpu = time.monotonic(), time.process_time()
        for done in [pool.submit(run, index) for index in range(count)]:
            done.result()
        return Took(time.monotonic() - started, time.process_time() - cpu)
