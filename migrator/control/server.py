"""Watching and cancelling a migration from elsewhere: a unix socket, for as long as it migrates.

One JSON object a line in both directions, a request of at most ``LINE_BYTES``::

    {"command": "status"}   where it is: what, pid, and the members of Progress
    {"command": "watch"}    the same, now and whenever it changes, and at last how it ended
    {"command": "cancel"}   {"cancelling": true}, and at last how it ended
    anything else           {"error": ...}, and the connection is closed

How it ended is ``{"ended": {"status": ..., "reason": ..., "exit_code": ...}}``, as in the report.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from migrator.errors import ControlError, MigrationError, MigratorError, Refused
from migrator.report.phases import DOWNTIME
from migrator.report.report import Progress

LINE_BYTES = 1024
_CLIENTS = 32
_UNREAD_BYTES = 1 << 16  # beside what the kernel buffers
_REFRESH_S = 0.1
_LAST_WORDS_S = 0.5
_QUIET = {phase.value for phase in DOWNTIME}
_CREDENTIALS = struct.Struct("iII")  # struct ucred, include/linux/socket.h


def own_directory() -> Path:
    """Where the migrations of this user are served, each at ``PID.sock``."""
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base) / "qemu-migrator"
    user = os.geteuid()
    return Path(f"/tmp/qemu-migrator-{user}" if user else "/run/qemu-migrator")


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    """A descriptor of a directory; of our own only if nobody else can write there.

    What is reached through it cannot be replaced meanwhile, and its path may be of any length.

    :raise FileNotFoundError: there is none
    :raise ControlError: it cannot be opened, or is a symbolic link, or a stranger's
    """
    own = directory == own_directory()
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | own * os.O_NOFOLLOW)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ControlError(str(directory), os.strerror(error.errno or 0)) from error
    try:
        found = os.fstat(fd)
        if own and (found.st_uid != os.geteuid() or found.st_mode & 0o077):
            raise ControlError(
                str(directory),
                f"expected a directory of user {os.geteuid()} with mode 700, this is of user "
                f"{found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}",
            )
        yield fd
    finally:
        os.close(fd)


def address(directory_fd: int, name: str) -> str:
    """A path of a socket in an opened directory."""
    return f"/proc/self/fd/{directory_fd}/{name}"


def is_stale(directory_fd: int, name: str) -> bool:
    """Whether this is a socket whose process is gone."""
    with socket.socket(socket.AF_UNIX) as trial:
        trial.setblocking(False)  # whoever is too busy to accept is not gone
        try:
            trial.connect(address(directory_fd, name))
        except ConnectionRefusedError:  # so does what is no socket
            return stat.S_ISSOCK(os.lstat(name, dir_fd=directory_fd).st_mode)
        except OSError:
            pass
    return False


class ControlSocket:
    """Serves one migration: its own user, and root.

    :ivar path: the socket
    :param what: what is migrated, in words
    :param cancel: called in the event loop, at every request
    :param path: elsewhere than in :func:`own_directory`
    """

    def __init__(self, what: str, cancel: Callable[[], object], path: Path | None = None) -> None:
        self.path = path or own_directory() / f"{os.getpid()}.sock"
        self.cancel = cancel
        self.clients: set[_Client] = set()
        self._what = what
        self._progress = Progress("start", 0, 0, 0, 0, 0.0)
        self._told_at = 0.0
        self._told_phase = ""

    async def __aenter__(self) -> ControlSocket:
        """Begin to serve.

        :raise ControlError: the socket cannot be made; there is nothing to be undone
        """
        loop = asyncio.get_running_loop()
        try:
            if self.path.parent == own_directory():
                with contextlib.suppress(FileExistsError):
                    self.path.parent.mkdir(mode=0o700)
            with opened(self.path.parent) as directory_fd:
                listening = self._listen(directory_fd)
            self._server = await loop.create_unix_server(lambda: _Client(self), sock=listening)
        except OSError as error:
            raise ControlError(str(self.path), error.strerror or str(error)) from error
        return self

    def _listen(self, directory_fd: int) -> socket.socket:
        name = self.path.name
        if os.access(name, os.F_OK, dir_fd=directory_fd, follow_symlinks=False) and not is_stale(
            directory_fd, name
        ):
            raise ControlError(str(self.path), "is there already")
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        # under another name first: what is bound and does not listen yet looks stale
        first_name = f".{name}.{os.getpid()}"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(first_name, dir_fd=directory_fd)
            listening.bind(address(directory_fd, first_name))
            listening.listen(_CLIENTS)
            os.rename(first_name, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        except BaseException:
            listening.close()
            raise
        return listening

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Tell whoever waits how it ended, by the error that ends the ``with`` block."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._server.close()
        ended = {"ended": _ending(error)}
        for client in tuple(self.clients):
            client.end(ended)
        deadline = time.monotonic() + _LAST_WORDS_S
        while self.clients and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        for client in tuple(self.clients):
            client.drop()

    def show(self, progress: Progress) -> None:
        """Keep where the migration is, and tell whoever watches, but in the downtime nobody."""
        self._progress = progress
        if progress.phase in _QUIET:
            return
        now = time.monotonic()
        if progress.phase == self._told_phase and now - self._told_at < _REFRESH_S:
            return
        self._told_phase, self._told_at = progress.phase, now
        watchers = [client for client in self.clients if client.watches]
        if watchers:
            status = self.status()
            for client in watchers:
                client.say(status)

    def status(self) -> dict[str, Any]:
        """Where the migration is, as it is told to clients."""
        return {"what": self._what, "pid": os.getpid(), **asdict(self._progress)}


class _Client(asyncio.Protocol):
    """One connection. Nothing here waits for it: who does not read is dropped."""

    def __init__(self, control: ControlSocket) -> None:
        self.watches = False
        self._waits = False
        self._control = control
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if len(self._control.clients) >= _CLIENTS or not _may_ask(transport):
            transport.abort()
        else:
            self._control.clients.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._control.clients.discard(self)

    def data_received(self, data: bytes) -> None:
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            if not self._transport.is_closing():
                self._answer(line)
        if len(self._received) > LINE_BYTES:
            self._refuse(f"expected a line of at most {LINE_BYTES} bytes")

    def _answer(self, line: bytes) -> None:
        if len(line) > LINE_BYTES:
            self._refuse(f"expected a line of at most {LINE_BYTES} bytes")
            return
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        command = request.get("command") if isinstance(request, dict) else None
        if command == "status":
            self.say(self._control.status())
        elif command == "watch":
            self.watches = self._waits = True
            self.say(self._control.status())
        elif command == "cancel":
            self._waits = True
            self.say({"cancelling": True})
            self._control.cancel()
        else:
            self._refuse('expected {"command": "status"}, "watch" or "cancel"')

    def _refuse(self, reason: str) -> None:
        self.say({"error": reason})
        self._transport.close()

    def say(self, answer: Mapping[str, Any]) -> None:
        """Write a line; drop whoever has left too many unread."""
        if self._transport.is_closing():
            return
        self._transport.write(json.dumps(answer).encode() + b"\n")
        if self._transport.get_write_buffer_size() > _UNREAD_BYTES:
            self._transport.abort()

    def end(self, ended: Mapping[str, Any]) -> None:
        """Write the last line, if it is waited for, and close."""
        if self._waits:
            self.say(ended)
        self._transport.close()

    def drop(self) -> None:
        """Close, whatever has not been read yet."""
        self._transport.abort()


def _may_ask(transport: asyncio.Transport) -> bool:
    asking: socket.socket = transport.get_extra_info("socket")
    credentials = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    return user in (0, os.geteuid())


def _ending(error: BaseException | None) -> dict[str, Any]:
    if error is None:
        return {"status": "completed", "reason": "", "exit_code": 0}
    if isinstance(error, asyncio.CancelledError):
        status, reason = "aborted", "interrupted"
    elif isinstance(error, MigrationError):
        status, reason = error.status, error.reason
    else:
        status = "aborted" if isinstance(error, Refused) else "failed"
        reason = str(error) or type(error).__name__
    return {"status": status, "reason": reason, "exit_code": _exit_code(error)}


def _exit_code(error: BaseException) -> int:
    """The status that the command ends with; after a defect, which side runs is not known."""
    if isinstance(error, (MigratorError, asyncio.CancelledError)):
        return getattr(error, "exit_code", 1)
    return 4
