"""QEMU's machine protocol, as much of it as a migration speaks. The only importer of qemu.qmp."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError
from qemu.qmp.protocol import StateError

from migrator.aio import within
from migrator.errors import CommandFailed, QmpUnreachable

_log = logging.getLogger(__name__)
_ANSWER_S = 10.0
_NOT_LISTENING_YET = 25
_CREDENTIALS = struct.Struct("iII")


@dataclass(frozen=True)
class Event:
    """An event of QEMU.

    :ivar name: such as ``STOP``
    :ivar data: its members
    :ivar at: QEMU's own time of it, in seconds on this host's monotonic clock
    """

    name: str
    data: Mapping[str, Any]
    at: float


@dataclass(frozen=True)
class MemoryBackend:
    """A memory backend as QEMU describes it.

    :ivar name: its id
    :ivar kind: its QOM type, such as ``memory-backend-file``
    :ivar size: bytes
    :ivar share: whether ``share=on``
    :ivar mem_path: file or directory, ``""`` where the kind has none
    """

    name: str
    kind: str
    size: int
    share: bool
    mem_path: str


class Qmp:
    """A connection to one QEMU.

    :ivar name: who this is in errors and logs: ``source`` or ``destination``
    :ivar path: the socket
    :ivar pid: the process behind it (SO_PEERCRED)
    """

    def __init__(self, name: str, path: str, pid: int, client: QMPClient) -> None:
        self.name = name
        self.path = path
        self.pid = pid
        self._client = client
        self._listener = EventListener()
        client.register_listener(self._listener)
        self._events: list[Event] = []
        self._arrived = asyncio.Condition()
        self._reader = asyncio.create_task(self._read_events())

    @classmethod
    async def connect(cls, name: str, path: str, *, timeout_s: float = 5.0) -> Qmp:
        """Connect to a QMP socket that nobody else is connected to.

        :raise QmpUnreachable: nobody listens, or somebody else is being served
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        connection.setblocking(False)
        client = QMPClient(name)
        try:
            await _connect(connection, path)
            pid, _, _ = _CREDENTIALS.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            await within(timeout_s, client.connect(connection))
        except asyncio.TimeoutError as error:
            connection.close()
            raise QmpUnreachable(
                name, f"{path}: no greeting in {timeout_s:g} s; is another client connected?"
            ) from error
        except (OSError, QMPError) as error:
            connection.close()
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise QmpUnreachable(name, f"{path}: {reason or error}") from error
        return cls(name, path, pid, client)

    async def close(self) -> None:
        """Hang up. Never raises for a connection that is already lost."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        with contextlib.suppress(Exception):
            await self._client.disconnect()

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Execute a command; ``_`` in argument names stands for ``-``.

        :raise CommandFailed: QEMU refused it
        :raise QmpUnreachable: the connection is gone, or there is no answer in ten seconds
        """
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            return await within(_ANSWER_S, self._client.execute(command, named or None))
        except asyncio.TimeoutError as error:
            raise QmpUnreachable(self.name, f"no answer to {command} in {_ANSWER_S:g} s") from error
        except ExecuteError as error:
            raise CommandFailed(self.name, command, str(error)) from error
        except (StateError, ExecInterruptedError, QMPError, OSError, EOFError) as error:
            raise QmpUnreachable(self.name, f"lost QMP during {command}") from error

    async def human(self, line: str) -> str:
        """Execute a line of the human monitor; return what it prints."""
        return str(await self.execute("human-monitor-command", command_line=line))

    # -- events ---------------------------------------------------------------------------------

    async def _read_events(self) -> None:
        async for message in self._listener:
            stamp: Any = message["timestamp"]
            realtime = stamp["seconds"] + stamp["microseconds"] / 1e6
            event = Event(
                name=str(message["event"]),
                data=dict(message.get("data") or {}),  # type: ignore[call-overload]
                at=realtime - time.time() + time.monotonic(),
            )
            _log.debug("%s: %s %s", self.name, event.name, dict(event.data))
            async with self._arrived:
                self._events.append(event)
                self._arrived.notify_all()

    def mark(self) -> int:
        """Where the record of events ends now: give it to :meth:`wait_for`."""
        return len(self._events)

    def events(self, since: int = 0) -> list[Event]:
        """All events after ``since``, the first first."""
        return self._events[since:]

    def seen(self, name: str, since: int = 0) -> Event | None:
        """The first event of this name after ``since``, if there was one."""
        return next((e for e in self._events[since:] if e.name == name), None)

    async def wait_for(
        self, wanted: Callable[[Event], bool], *, since: int, timeout_s: float
    ) -> Event:
        """Wait for the first event after ``since`` that is ``wanted``.

        :raise QmpUnreachable: the connection was lost, or the time is over
        """
        deadline = time.monotonic() + timeout_s
        async with self._arrived:
            while True:
                for event in self._events[since:]:
                    if wanted(event):
                        return event
                    since += 1
                if self._client.runstate.name != "RUNNING":
                    raise QmpUnreachable(self.name, "QEMU hung up")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise QmpUnreachable(self.name, f"nothing happened in {timeout_s:g} s")
                # a lost connection brings no event: look again from time to time
                with contextlib.suppress(asyncio.TimeoutError):
                    await within(min(left, 0.05), self._arrived.wait())

    async def migration_status(self, *wanted: str, since: int, timeout_s: float) -> Event:
        """Wait until QEMU's own migration reaches one of the states, or ``failed``/``cancelled``.

        :raise QmpUnreachable: the connection was lost, or the time is over
        """
        states = {*wanted, "failed", "cancelled"}
        return await self.wait_for(
            lambda e: e.name == "MIGRATION" and e.data.get("status") in states,
            since=since,
            timeout_s=timeout_s,
        )

    # -- what a migration asks ------------------------------------------------------------------

    async def run_state(self) -> str:
        """``running``, ``paused``, ``inmigrate``, ``postmigrate``, … (QAPI: RunState)."""
        return str((await self.execute("query-status"))["status"])

    async def migration(self) -> dict[str, Any]:
        """What ``query-migrate`` says."""
        return dict(await self.execute("query-migrate"))

    async def memory_backends(self) -> list[MemoryBackend]:
        """All memory backends, with their files."""
        found = []
        for backend in await self.execute("query-memdev"):
            name = str(backend["id"])
            path = f"/objects/{name}"
            kind = str(await self.execute("qom-get", path=path, property="type"))
            mem_path = ""
            with contextlib.suppress(CommandFailed):
                mem_path = str(await self.execute("qom-get", path=path, property="mem-path"))
            found.append(
                MemoryBackend(name, kind, int(backend["size"]), bool(backend["share"]), mem_path)
            )
        return found

    async def vcpu_threads(self) -> frozenset[int]:
        """Numbers of the threads that execute guest code (QAPI: ``query-cpus-fast``)."""
        cpus = await self.execute("query-cpus-fast")
        return frozenset(int(cpu["thread-id"]) for cpu in cpus)

    async def capabilities(self) -> dict[str, bool]:
        """The migration capabilities, by name."""
        answer = await self.execute("query-migrate-capabilities")
        return {str(c["capability"]): bool(c["state"]) for c in answer}

    async def set_capabilities(self, wanted: Mapping[str, bool]) -> None:
        """Set migration capabilities."""
        await self.execute(
            "migrate-set-capabilities",
            capabilities=[{"capability": k, "state": v} for k, v in wanted.items()],
        )

    async def hand_over(self, fd: int, name: str) -> None:
        """Give QEMU a copy of a descriptor, to be named as ``fd:NAME`` later.

        :raise CommandFailed: QEMU refused it
        :raise QmpUnreachable: the connection is gone
        """
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as error:
            raise QmpUnreachable(self.name, "lost QMP before getfd") from error
        await self.execute("getfd", fdname=name)


async def _connect(connection: socket.socket, path: str) -> None:
    # a QEMU that has just been started may have made the socket, and not listen yet
    for _ in range(_NOT_LISTENING_YET):
        with contextlib.suppress(ConnectionRefusedError):
            return await asyncio.get_running_loop().sock_connect(connection, path)
        await asyncio.sleep(0.02)
    return await asyncio.get_running_loop().sock_connect(connection, path)


def is_alive(pidfd: int) -> bool:
    """Whether the process of a pidfd has not ended yet."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)
