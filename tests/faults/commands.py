"""The real command in a process of its own, which tells its phases and can be held in one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from bench.hosts.processes import is_running

TOKEN = "MIGRATOR_FAULTS"
"""In the environment of all processes of one disturbed migration: it tells which one."""

_ROOT = str(Path(__file__).parents[2])

# The command as it is installed, but for its phases, which are told as they begin ("rounds 1.5"),
# and when the beginning is over ("-rounds 1.6"), at which the command was held in between or not.
_PROGRAM = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
told, hold, held = int(sys.argv[2]), int(sys.argv[3]), set(sys.argv[4].split(","))
from migrator.report.phases import Phases

def tell(name):
    try:
        os.write(told, f"{name} {time.time():.6f}\\n".encode())
    except OSError:
        pass

def begun(name):
    tell(name)
    if name in held:
        held.discard(name)
        os.read(hold, 1)
    tell("-" + name)

start, enter = Phases.__init__, Phases.enter

def starting(self, *args, **kwargs):
    start(self, *args, **kwargs)
    begun(self.current.value)

def entering(self, phase, **kwargs):
    enter(self, phase, **kwargs)
    begun(phase.value)

Phases.__init__, Phases.enter = starting, entering
from migrator.cli.main import main
sys.argv[:5] = ["migrator"]
main(prog_name="migrator")
"""


class Pipe:
    """The reading end of a pipe, read as it fills.

    :ivar data: all that has come
    :ivar ended: set when all writers are gone, or after :meth:`close`
    :ivar writer: the other end, for a process that is started
    """

    def __init__(self, on_line: Callable[[str], None] = lambda _: None) -> None:
        self.data = b""
        self.ended = asyncio.Event()
        self._on_line = on_line
        self._told = 0
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reader, False)
        asyncio.get_running_loop().add_reader(self._reader, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._reader, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self.close()
            return
        self.data += data
        while (end := self.data.find(b"\n", self._told)) >= 0:
            line = self.data[self._told : end].decode(errors="replace")
            self._told = end + 1
            self._on_line(line)

    def started(self) -> None:
        """The process has its end: give up ours."""
        os.close(self.writer)

    def close(self) -> None:
        """Read no more: its writers get EPIPE. May be called again."""
        if not self.ended.is_set():
            asyncio.get_running_loop().remove_reader(self._reader)
            os.close(self._reader)
            self.ended.set()

    @property
    def text(self) -> str:
        """All that has come, as text."""
        return self.data.decode(errors="replace")


class Command:
    """A process of ``migrator``.

    :ivar phases: names of the phases that began, with the time in seconds since the epoch
    :ivar went_on_s: by name, when the command went on after the phase had begun
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        namespace: str | None = None,
        held: Collection[str] = (),
        full_stdout: bool = False,
    ) -> None:
        self.phases: list[tuple[str, float]] = []
        self.went_on_s: dict[str, float] = {}
        self.began_s = time.time()
        self._begun: dict[str, asyncio.Event] = {}
        self.stdout, self.stderr, self._told = Pipe(), Pipe(), Pipe(self._take)
        hold_reader, self._hold = os.pipe2(os.O_CLOEXEC)
        there = ["nsenter", f"--net={namespace}", "--"] if namespace else []
        own = [_ROOT, str(self._told.writer), str(hold_reader), ",".join(held) or "-"]
        full = os.open("/dev/full", os.O_WRONLY) if full_stdout else -1
        self._process = subprocess.Popen(
            [*there, sys.executable, "-c", _PROGRAM, *own, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=full if full_stdout else self.stdout.writer,
            stderr=self.stderr.writer,
            pass_fds=(self._told.writer, hold_reader),
            env=environment,
            start_new_session=True,
        )
        for pipe in (self.stdout, self.stderr, self._told):
            pipe.started()
        os.close(hold_reader)
        if full_stdout:
            os.close(full)
            self.stdout.close()

    def _take(self, line: str) -> None:
        name, _, at = line.partition(" ")
        if name.startswith("-"):
            self.went_on_s.setdefault(name[1:], float(at))
        else:
            self.phases.append((name, float(at)))
            self._begun.setdefault(name, asyncio.Event()).set()

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """As of :class:`subprocess.Popen`; ``None`` while it runs."""
        return self._process.poll()

    @property
    def phase(self) -> str:
        """Name of the phase that began last; ``start`` before the first."""
        return self.phases[-1][0] if self.phases else "start"

    async def reaches(self, phase: str) -> bool:
        """Wait until a phase begins (true), or the command has ended before (false)."""
        begun = self._begun.setdefault(phase, asyncio.Event())
        while not begun.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(begun.wait(), 0.05)
            if self.exit_code is not None and self._told.ended.is_set():
                break
        return begun.is_set()

    def release(self) -> None:
        """Let the command go on where it is held, or will be held next."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._hold, b".")  # the pipe keeps it until then

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; none to a process that has ended."""
        if self.exit_code is None:
            os.kill(self.pid, number)

    def interrupt(self) -> None:
        """Do as Ctrl-C does."""
        self.signal(signal.SIGINT)

    def guards(self) -> list[int]:
        """The guards that the command has started and that run."""
        return [
            pid for pid in _children(self.pid) if b"migrator.migration.guard" in _command_line(pid)
        ]

    async def ended(self, timeout_s: float) -> bool:
        """Wait until the process has ended; false: it has not in time."""
        deadline = time.monotonic() + timeout_s
        while self.exit_code is None:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    async def close(self) -> None:
        """End it, however it is. May be called again."""
        self.signal(signal.SIGKILL)
        await self.ended(10.0)
        if self._hold >= 0:
            os.close(self._hold)
            self._hold = -1
        for pipe in (self.stdout, self.stderr, self._told):
            pipe.close()


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            listed = Path(f"/proc/{pid}/task/{task}/children").read_text()
            found += map(int, listed.split())
    return found


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


WITNESS = "migrator.receiver.witness"
"""What the command line of a receiver's witness has in it."""


def processes_of(token: str) -> dict[int, str]:
    """The processes that a disturbed migration has started and that still run.

    :return: their command lines, by process
    """
    wanted = f"{TOKEN}={token}".encode()
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            if wanted in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                pid = int(entry)
                line = _command_line(pid).replace(b"\0", b" ").decode(errors="replace").strip()
                if is_running(pid):
                    found[pid] = " ".join(line.split())[:160]
    return found
