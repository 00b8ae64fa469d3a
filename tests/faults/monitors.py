"""A second QMP monitor of a QEMU: an operator's, and the campaign's own witness of events.

It shares nothing with :mod:`migrator.qemu.qmp`: an oracle that used the product's own client would
trust the code that it is meant to check.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any

_ANSWER_S = 8.0
_CREDENTIALS = struct.Struct("iII")  # struct ucred, include/linux/socket.h
_LINE_LIMIT = 1 << 22  # bytes; an answer of QEMU is one line


@dataclass(frozen=True)
class QemuEvent:
    """An event of QEMU.

    :ivar at_s: QEMU's own time stamp, in seconds since the epoch
    """

    name: str
    at_s: float
    data: dict[str, Any] = field(default_factory=dict)


class MonitorLost(Exception):
    """QEMU has ended, or does not answer in time."""


class CommandRefused(Exception):
    """QEMU refused a command; the text is QEMU's own."""


class Monitor:
    """A connection to one QMP socket that no other client uses.

    :ivar pid: the process of QEMU, as the kernel tells it
    :ivar events: all events since the connection was made, in order
    :ivar lost_at_s: when the connection was lost, in seconds since the epoch; ``None`` until then
    """

    def __init__(
        self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.pid = pid
        self.events: list[QemuEvent] = []
        self.lost_at_s: float | None = None
        self._writer = writer
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._count = 0
        self._reading = asyncio.create_task(self._read(reader))

    @classmethod
    async def connect(cls, path: str, timeout_s: float = 30.0) -> Monitor:
        """Connect to the socket, which may not be there yet.

        :raise MonitorLost: QEMU does not listen there in time
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(path, limit=_LINE_LIMIT)
                break
            except (FileNotFoundError, ConnectionRefusedError) as error:
                if time.monotonic() > deadline:
                    raise MonitorLost(f"{path}: {error}") from error
                await asyncio.sleep(0.01)
        end: socket.socket = writer.get_extra_info("socket")
        credentials = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        monitor = cls(_CREDENTIALS.unpack(credentials)[0], reader, writer)
        await monitor.execute("qmp_capabilities", timeout_s=timeout_s)
        return monitor

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                self._take(json.loads(line))
        self.lost_at_s = time.time()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(MonitorLost("QEMU hung up"))

    def _take(self, message: dict[str, Any]) -> None:
        if "event" in message:
            stamp = message["timestamp"]
            at_s = stamp["seconds"] + stamp["microseconds"] / 1e6
            self.events.append(QemuEvent(message["event"], at_s, message.get("data") or {}))
        elif (answer := self._answers.pop(message.get("id", -1), None)) and not answer.done():
            if "error" in message:
                answer.set_exception(CommandRefused(message["error"]["desc"]))
            else:
                answer.set_result(message["return"])

    async def execute(self, command: str, timeout_s: float = _ANSWER_S, **arguments: Any) -> Any:
        """Execute a command.

        :raise CommandRefused: QEMU refused it
        :raise MonitorLost: QEMU has ended, or does not answer in time; it may answer later
        """
        if self.lost_at_s is not None:
            raise MonitorLost("QEMU has ended")
        self._count += 1
        answer = asyncio.get_running_loop().create_future()
        self._answers[self._count] = answer
        said = {"execute": command, "id": self._count, "arguments": arguments}
        self._writer.write(json.dumps(said).encode() + b"\n")
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except asyncio.TimeoutError as error:
            raise MonitorLost(f"no answer to {command} in {timeout_s:g} s") from error

    async def run_state(self) -> str:
        """The run state of the VM; ``gone`` where QEMU has ended, ``mute`` where it is silent."""
        try:
            return str((await self.execute("query-status"))["status"])
        except MonitorLost:
            return "gone" if self.lost_at_s is not None else "mute"

    async def settings(self) -> dict[str, Any]:
        """All migration capabilities and parameters, by name.

        :raise MonitorLost: QEMU has ended, or does not answer
        """
        capabilities = await self.execute("query-migrate-capabilities")
        parameters = await self.execute("query-migrate-parameters")
        return {**{each["capability"]: each["state"] for each in capabilities}, **parameters}

    async def close(self) -> None:
        """Hang up."""
        self._writer.close()
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading


def running_intervals(
    began_s: float | None, events: list[QemuEvent], gone_at_s: float | None
) -> tuple[tuple[float, float], ...]:
    """Tell when a guest ran, by QEMU's events.

    STOP comes once the vCPUs stand, and RESUME before they run: an interval is never too short.

    :param began_s: since when it runs already, in seconds since the epoch, or ``None``
    :param gone_at_s: when QEMU ended, or ``None``; an interval that has no end ends at infinity
    """
    found: list[tuple[float, float]] = []
    since_s = began_s
    for event in events:
        if event.name == "RESUME" and since_s is None:
            since_s = event.at_s
        elif event.name == "STOP" and since_s is not None:
            found.append((since_s, event.at_s))
            since_s = None
    if since_s is not None:
        found.append((since_s, float("inf") if gone_at_s is None else max(since_s, gone_at_s)))
    return tuple(found)
