"""QEMU processes that we start ourselves: their command line, console, and end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from migrator.aio import in_thread
from migrator.errors import VmError

_PLACEHOLDER = re.compile(r"\{([a-z]+)\}")
_POLL_S = 0.02
_PREFIX = "migrator-"
_KEPT = "kept-for"  # a file with the process and its start
_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
_libc = ctypes.CDLL(None)  # before any fork


class RunDirectory:
    """A private directory for sockets, consoles and images, gone with the ``with`` block.

    One that was kept for a VM is removed when the next one is made and that VM has ended.
    """

    def __init__(self) -> None:
        self._kept = False

    def __enter__(self) -> Path:
        _remove_stale()
        self._path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        return self._path

    def keep_for(self, pid: int) -> None:
        """Let it be, for a VM that goes on in this process."""
        self._kept = True
        keep_directory(self._path, pid)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._kept:
            shutil.rmtree(self._path, ignore_errors=True)


def keep_directory(path: Path, pid: int) -> None:
    """Mark a private directory as one that a VM needs, which goes on in this process."""
    with contextlib.suppress(OSError):
        (path / _KEPT).write_text(f"{pid} {_started(pid)}\n")


def _started(pid: int) -> str:
    """When a process was started, in clock ticks since the boot (proc(5), field 22 of ``stat``)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _remove_stale() -> None:
    """Remove directories of ours that were kept for a VM that has ended."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if directory.is_symlink() or directory.stat().st_uid != os.geteuid():
                continue
            pid, started = (directory / _KEPT).read_text().split()
            try:
                ended = _started(int(pid)) != started
            except FileNotFoundError:
                ended = True
            if ended:
                shutil.rmtree(directory, ignore_errors=True)


def fill_in(arguments: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """Replace ``{name}`` in arguments; names that are not in ``values`` stay as they are."""
    return [
        _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), argument)
        for argument in arguments
    ]


class Vm:
    """A QEMU process of ours.

    :ivar name: ``source`` or ``destination``
    :ivar qmp: its QMP socket
    :ivar console: the file of its first serial port, if the command line uses ``{console}``
    """

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.qmp = str(directory / f"{name}.qmp")
        self.console = directory / f"{name}.console"
        self._stderr = directory / f"{name}.stderr"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process is not None
        return self._process.pid

    async def start(
        self,
        arguments: Sequence[str],
        *,
        incoming: bool,
        keep: bool = False,
        timeout_s: float = 30.0,
    ) -> None:
        """Start QEMU; return when its QMP socket is there.

        :param arguments: the command line, with its placeholders filled in
        :param incoming: let it wait for a migration
        :param keep: it may outlive the calling thread, which otherwise takes it along, however it
            ends
        :raise VmError: it cannot be started, or ended at once; with what it said
        """
        command = [*arguments, "-qmp", f"unix:{self.qmp},server=on,wait=off"]
        if incoming:
            command += ["-incoming", "defer"]
        self.console.touch()
        try:
            self._process = self._spawn(command, keep)
        except FileNotFoundError as error:
            raise VmError(
                self.name, f"there is no {command[0]!r}; install QEMU or name its binary"
            ) from error
        except OSError as error:
            raise VmError(self.name, f"{command[0]!r}: {error.strerror}") from error
        deadline = time.monotonic() + timeout_s
        while not os.path.exists(self.qmp):
            self.check_alive()
            if time.monotonic() > deadline:
                raise VmError(self.name, f"no QMP socket after {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)

    def _spawn(self, command: Sequence[str], keep: bool) -> subprocess.Popen[bytes]:
        # not asyncio's: it would kill what is still there when its event loop is closed
        with self._stderr.open("wb") as stderr:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C is ours to handle
                preexec_fn=None if keep else _end_with_parent,
            )

    def check_alive(self) -> None:
        """Check that QEMU has not ended.

        :raise VmError: it has; with what it said last
        """
        if self._process is not None and self._process.poll() is not None:
            said = self._stderr.read_text(errors="replace").strip().splitlines()[-3:]
            raise VmError(
                self.name,
                f"QEMU ended with {self._process.returncode}: {' / '.join(said) or 'no word'}",
            )

    async def wait_for_console(
        self, pattern: str, *, timeout_s: float, broken: str | None = None
    ) -> None:
        """Wait until the console shows a regular expression.

        :param broken: a regular expression that must not show
        :raise VmError: it did not in time, or ``broken`` did
        """
        deadline = time.monotonic() + timeout_s
        while True:
            text = self.console_text()
            if broken is not None and (found := re.search(broken, text)):
                raise VmError(self.name, f"its console says {_line_of(text, found.start())!r}")
            if re.search(pattern, text):
                return
            self.check_alive()
            if time.monotonic() > deadline:
                last = text.strip().splitlines()[-1:] or ["nothing"]
                raise VmError(
                    self.name,
                    f"its console did not show {pattern!r} in {timeout_s:g} s; it ends with "
                    f"{last[0]!r}",
                )
            await asyncio.sleep(_POLL_S)

    def console_text(self) -> str:
        """What the console has shown."""
        return self.console.read_text(errors="replace")

    def let_go(self) -> None:
        """Leave the process to itself: :meth:`stop` does nothing from now on."""
        self._process = None

    async def stop(self) -> None:
        """End the process, however it is. May be called again."""
        if self._process is None or self._process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # QEMU may have been started by a script
        await in_thread(self._process.wait)


def _end_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _line_of(text: str, position: int) -> str:
    start = text.rfind("\n", 0, position) + 1
    return text[start:].split("\n", 1)[0].strip()
