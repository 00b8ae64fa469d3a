"""A connection to another host: made and secured in the event loop, some then given to a thread.

Half-duplex on purpose: whoever asks waits for the answer, and no two threads ever use one TLS
object.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from migrator.aio import within
from migrator.choices import SILENCE_S
from migrator.errors import LinkError, LinkLost
from migrator.link import envelope
from migrator.link.keys import fingerprint
from migrator.link.tls import check_peer

_T = TypeVar("_T")
"""A host that does not acknowledge anything for so long is lost."""
_PROBES = 4
_PIECE = 1 << 20


class Connection:
    """A connection that sends and receives messages.

    :ivar peer: the other end, for people
    :ivar fingerprint: of its certificate; ``None`` where the connection is not secured
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._socket = sock
        self.peer = peer
        self.fingerprint: str | None = None

    @classmethod
    async def connect(
        cls,
        host: str,
        port: int,
        context: ssl.SSLContext | None,
        *,
        server_name: str,
        wanted: str | None = None,
        timeout_s: float = SILENCE_S,
    ) -> Connection:
        """Connect, secure, and say who we are.

        :param context: a client's; ``None`` for a connection that is not secured
        :param server_name: what its certificate has to be good for, if the context asks for that
        :param wanted: see :func:`migrator.link.tls.check_peer`
        :raise LinkLost: nobody answers
        :raise PeerRefused: it is not who was wanted
        :raise LinkError: it speaks something else
        """
        name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            sock = await within(timeout_s, _reach(host, port))
        except asyncio.TimeoutError as error:
            raise LinkLost(name, f"no answer in {timeout_s:g} s") from error
        except OSError as error:
            # asyncio's own text has the address once more, and not what is wrong
            known = error.errno is not None and error.errno > 0  # getaddrinfo's are below
            why = os.strerror(error.errno) if known else error.strerror  # type: ignore[arg-type]
            raise LinkLost(name, why or str(error)) from error
        return await cls._begin(
            sock,
            name,
            lambda raw: context.wrap_socket(  # type: ignore[union-attr]
                raw, server_hostname=server_name, do_handshake_on_connect=False
            ),
            secured=context is not None,
            wanted=wanted,
            timeout_s=timeout_s,
        )

    @classmethod
    async def accept(
        cls,
        sock: socket.socket,
        context: ssl.SSLContext | None,
        *,
        wanted: str | None = None,
        timeout_s: float = SILENCE_S,
    ) -> Connection:
        """Secure a connection that was accepted, and say who we are.

        :raise LinkError: see :meth:`connect`
        """
        address = sock.getpeername()
        return await cls._begin(
            sock,
            f"{address[0]}:{address[1]}",
            lambda raw: context.wrap_socket(  # type: ignore[union-attr]
                raw, server_side=True, do_handshake_on_connect=False
            ),
            secured=context is not None,
            wanted=wanted,
            timeout_s=timeout_s,
        )

    @classmethod
    async def _begin(
        cls,
        sock: socket.socket,
        name: str,
        wrap: Callable[[socket.socket], ssl.SSLSocket],
        *,
        secured: bool,
        wanted: str | None,
        timeout_s: float,
    ) -> Connection:
        _set_up(sock)
        connection = cls(sock, name)
        try:
            await within(timeout_s, connection._agree(wrap, secured, wanted))
        except asyncio.TimeoutError as error:
            connection.close()
            raise LinkLost(name, f"no answer in {timeout_s:g} s") from error
        except BaseException:
            connection.close()
            raise
        return connection

    async def _agree(
        self, wrap: Callable[[socket.socket], ssl.SSLSocket], secured: bool, wanted: str | None
    ) -> None:
        if secured:
            tls = self._socket = wrap(self._socket)
            await self._until_done(tls.do_handshake)
            check_peer(tls, wanted)
            self.fingerprint = fingerprint(tls.getpeercert(binary_form=True) or b"")
        try:
            await self.write(envelope.opening())
            opening = await self.read(envelope.OPENING_SIZE)
        except LinkLost as error:
            if not secured:
                raise
            # a server looks at our certificate when for us the handshake is over
            raise LinkLost(
                self.peer, f"{error.reason} before it said anything: its log has more"
            ) from error
        envelope.check_opening(opening, self.peer)

    # -- bytes ----------------------------------------------------------------------------------

    async def _until_done(self, attempt: Callable[[], _T], *, to_write: bool = False) -> _T:
        """Try again whenever the socket is ready.

        :param to_write: what to wait for, where TLS does not say

        :raise LinkLost: it broke
        :raise LinkError: TLS refused
        """
        while True:
            try:
                return attempt()
            except ssl.SSLWantWriteError:
                await self._ready(to_write=True)
            except ssl.SSLWantReadError:
                await self._ready(to_write=False)
            except BlockingIOError:
                await self._ready(to_write=to_write)
            except ssl.SSLError as error:
                if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
                    raise LinkLost(self.peer, "hung up") from error
                raise LinkError(self.peer, f"TLS: {_why(error)}") from error
            except OSError as error:
                raise LinkLost(self.peer, error.strerror or str(error)) from error

    async def _ready(self, *, to_write: bool) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        descriptor = self._socket.fileno()
        if descriptor < 0:
            raise LinkLost(self.peer, "closed")
        add = loop.add_writer if to_write else loop.add_reader
        remove = loop.remove_writer if to_write else loop.remove_reader
        add(descriptor, _resolve, ready)
        try:
            await ready
        finally:
            remove(descriptor)

    async def read(self, size: int) -> bytearray:
        """Exactly so many bytes. Memory grows with what comes, not with what is announced."""
        data = bytearray()
        piece = bytearray(min(size, _PIECE))
        while len(data) < size:
            view = memoryview(piece)[: min(size - len(data), len(piece))]
            received = await self._until_done(partial(self._socket.recv_into, view))
            if not received:
                raise LinkLost(self.peer, "hung up")
            data += view[:received]
        return data

    async def write(self, data: bytes) -> None:
        """All of these bytes."""
        view = memoryview(data)
        while view:
            piece = view[:_PIECE]
            view = view[await self._until_done(partial(self._socket.send, piece), to_write=True) :]

    # -- messages -------------------------------------------------------------------------------

    async def send(self, said: dict[str, Any], blob: bytes = b"") -> None:
        """Send a message.

        :raise LinkLost: the connection broke
        """
        await self.write(envelope.message(said, len(blob)))
        await self.write(blob)

    async def receive(
        self, *, limit: int = envelope.MESSAGE_LIMIT, blob: int = 0
    ) -> tuple[dict[str, Any], bytes]:
        """Receive a message.

        :param limit: most bytes of JSON; likewise ``blob``, of what follows it
        :raise LinkLost: the connection broke
        :raise WireError: beyond the limits, or no JSON
        """
        sizes = envelope.message_sizes(
            await self.read(envelope.MESSAGE_SIZE), self.peer, limit=limit, blob=blob
        )
        said = envelope.parse_message(await self.read(sizes[0]), self.peer)
        return said, bytes(await self.read(sizes[1]))

    def lose_after(self, silence_s: float) -> None:
        """Notice after about so long, not the usual time, that the link is gone.

        While nothing is sent, that takes two seconds at least: probes have no fractions.
        """
        _lose_after(self._socket, silence_s)

    # -- the end, or another life in a thread ---------------------------------------------------

    def for_thread(self) -> socket.socket:
        """The socket, blocking, for a thread; it is the caller's from now on."""
        self._socket.settimeout(None)
        return self._socket

    def hang_up(self) -> None:
        """Break the connection, for somebody else who is in it, and who will close it."""
        hang_up(self._socket)

    def close(self) -> None:
        """Hang up. May be called again."""
        with contextlib.suppress(OSError):
            self._socket.close()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def hang_up(sock: socket.socket) -> None:
    """Break a connection under whoever sends or receives on it, in whatever thread."""
    with contextlib.suppress(OSError):
        # not SSLSocket's own, which would give up TLS while somebody is in it
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _why(error: ssl.SSLError) -> str:
    verify = getattr(error, "verify_message", "")
    return verify or error.reason or str(error)


async def _reach(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    problem: OSError = OSError("no address")
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            problem = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise problem


def _set_up(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    _lose_after(sock, SILENCE_S)


def _lose_after(sock: socket.socket, silence_s: float) -> None:
    """Notice a link that is gone: by unacknowledged data, or, while nothing is sent, by probes."""
    probe_s = max(1, int(silence_s / (_PROBES + 1)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))
