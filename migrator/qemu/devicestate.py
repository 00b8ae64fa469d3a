"""QEMU's own migration stream, which here carries device state, on its way through us.

The source writes it into a socket of ours, and only when all of it has arrived and all of RAM is at
the destination is it passed on. Its end is kept back until the destination has loaded the rest:
a destination that lacks the end cannot run, and one that has it will.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import socket
import termios

from migrator.aio import within
from migrator.errors import VmError
from migrator.qemu.qmp import Qmp

_FD_NAME = "qemu-migrator"
_VM_EOF = 0x00  # QEMU: migration/savevm.h, QEMU_VM_EOF
_VM_VMDESCRIPTION = 0x06
# QEMU: migration/savevm.c, save_section_header; migration/global_state.c, vmstate_globalstate
_GLOBAL_STATE = bytes([len(b"globalstate")]) + b"globalstate"
_INSTANCE_AND_VERSION = 8  # bytes: two big-endian uint32_t
_RUN_STATE_LENGTH = 100


def split_at_end(stream: bytes) -> tuple[bytes, bytes]:
    """Split a migration stream before its ``QEMU_VM_EOF``.

    What follows that byte is only a description of the stream in JSON, behind a type byte and a
    big-endian length (QEMU: ``migration/savevm.c``, ``qemu_savevm_state_complete_precopy``). A
    destination does not mind when the *description* is cut short: it runs. So it is not enough to
    keep back the last byte; without ``QEMU_VM_EOF`` itself loading fails.

    :return: (head, end); the end begins with ``QEMU_VM_EOF``
    :raise ValueError: this is no whole stream
    """
    at = stream.rfind(bytes([_VM_EOF, _VM_VMDESCRIPTION]))
    while at >= 0:
        length = int.from_bytes(stream[at + 2 : at + 6], "big")
        if len(stream) - at >= 6 and length == len(stream) - at - 6:
            return stream[:at], stream[at:]
        at = stream.rfind(bytes([_VM_EOF, _VM_VMDESCRIPTION]), 0, at)
    if stream and stream[-1] == _VM_EOF:  # machines with suppress-vmdesc=on
        return stream[:-1], stream[-1:]
    raise ValueError("the migration stream of the source has no end")


def saved_run_state(stream: bytes) -> str | None:
    """The run state that the source had when its own migration stopped it.

    A big-endian ``uint32_t``, the size, and 100 bytes of text that ends with a zero byte.

    :return: such as ``running``; ``None`` where the machine does not save it
    """
    at = stream.rfind(_GLOBAL_STATE)
    if at < 0:
        return None
    at += len(_GLOBAL_STATE) + _INSTANCE_AND_VERSION + 4
    text, end, _ = stream[at : at + _RUN_STATE_LENGTH].partition(b"\0")
    return text.decode("ascii") if end and text.isascii() and text else None


class Incoming:
    """The stream from the source to us."""

    def __init__(self, ours: socket.socket) -> None:
        self._socket = ours
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def begin(cls, source: Qmp) -> Incoming:
        """Start QEMU's migration into a socket of ours.

        :raise VmError: QEMU refused
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        incoming = cls(ours)
        try:
            with theirs:
                await source.hand_over(theirs.fileno(), _FD_NAME)
            await source.execute("migrate", uri=f"fd:{_FD_NAME}")
        except BaseException:
            await incoming.close()
            raise
        return incoming

    async def _read(self) -> bytes:
        loop = asyncio.get_running_loop()
        pieces = bytearray()
        while piece := await loop.sock_recv(self._socket, 1 << 20):
            pieces += piece
        return bytes(pieces)

    async def whole(self, *, timeout_s: float) -> bytes:
        """All of it, once the source has completed and closed its end.

        :raise VmError: it did not end in time
        """
        try:
            return await within(timeout_s, asyncio.shield(self._reading))
        except asyncio.TimeoutError as error:
            raise VmError("source", f"its device state did not end in {timeout_s:g} s") from error

    async def close(self) -> None:
        """Give up the stream; a QEMU that still writes to it fails its migration."""
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await self._reading
        self._socket.close()


class Outgoing:
    """The stream from us to the destination."""

    def __init__(self, ours: socket.socket, destination: Qmp) -> None:
        self._socket = ours
        self._destination = destination

    @classmethod
    async def begin(cls, destination: Qmp) -> Outgoing:
        """Let the destination load from a socket of ours.

        :raise VmError: QEMU refused
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            with theirs:
                await destination.hand_over(theirs.fileno(), _FD_NAME)
            await destination.execute("migrate-incoming", uri=f"fd:{_FD_NAME}")
        except BaseException:
            ours.close()
            raise
        return cls(ours, destination)

    async def load(self, head: bytes, *, timeout_s: float) -> None:
        """Send all but the end; return when the destination has taken it in without complaint.

        QEMU loads in a coroutine of its main loop that yields only to wait for more bytes. When
        no byte is left in the socket and the main loop answers, it waits for the end.

        :raise VmError: the destination refused the stream, died, or does not take it in time
        """
        loop = asyncio.get_running_loop()
        try:
            await within(timeout_s, loop.sock_sendall(self._socket, head))
            await within(timeout_s, self._drained())
            answer = await within(timeout_s, self._destination.migration())
        except asyncio.TimeoutError as error:
            raise VmError("destination", f"did not load in {timeout_s:g} s") from error
        except OSError as error:
            raise VmError("destination", "refused the device state") from error
        status = answer.get("status")
        if status != "active":
            raise VmError("destination", f"refused the device state: migration is {status!r}")

    async def _drained(self) -> None:
        queued = array.array("i", [1])
        while True:
            fcntl.ioctl(self._socket, termios.TIOCOUTQ, queued)
            if not queued[0]:
                return
            await asyncio.sleep(0.0002)

    async def finish(self, end: bytes, *, timeout_s: float) -> None:
        """Send the end: from the first byte on, the destination may run.

        :raise VmError: the destination does not take it in time
        :raise OSError: the destination is gone
        """
        sending = asyncio.get_running_loop().sock_sendall(self._socket, end)
        try:
            await within(timeout_s, sending)
        except asyncio.TimeoutError as error:
            raise VmError("destination", f"did not take the end in {timeout_s:g} s") from error
        self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Give up the stream: a destination that lacks the end fails to load."""
        self._socket.close()
