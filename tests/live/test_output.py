"""The exit status is the truth, also where nothing can be printed, or a signal comes meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from migrator.cli.output import Ending, Stream
from migrator.guest.workload import Workload
from migrator.qemu.qmp import Qmp
from tests.live.vms import MIB, Machine, Pair, pair

pytestmark = pytest.mark.live

SMALL = Machine(memory=128 * MIB, workload=Workload(working_set_bytes=16 * MIB))
MIGRATOR = str(Path(sys.executable).with_name("migrator"))
PATIENCE_S = 120.0


class Sink:
    """Somewhere that output does not arrive."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.fd = -1
        self._other = -1

    def __enter__(self) -> Sink:
        if self.kind == "full":
            self.fd = os.open("/dev/full", os.O_WRONLY)
        elif self.kind == "gone":
            reader, self.fd = os.pipe()
            os.close(reader)
        elif self.kind == "stalled":
            self._other, self.fd = os.pipe()
            os.set_blocking(self.fd, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(self.fd, bytes(4096))
            os.set_blocking(self.fd, True)
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (self.fd, self._other):
            if fd >= 0:
                os.close(fd)
        self.fd = self._other = -1


def start(command: Sequence[str], sink: Sink, which: str) -> subprocess.Popen[bytes]:
    """Start a command whose stdout, stderr, or both, lead nowhere."""
    numbers = {"stdout": (1,), "stderr": (2,), "both": (1, 2)}[which]

    def close() -> None:
        for number in numbers:
            os.close(number)

    def stream(number: int) -> int:
        return sink.fd if number in numbers and sink.fd >= 0 else subprocess.PIPE

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stream(1),
        stderr=stream(2),
        preexec_fn=close if sink.kind == "closed" else None,
    )


def run(command: Sequence[str], kind: str, which: str) -> subprocess.Popen[bytes]:
    """Start a command as :func:`start` does; its sink, and with it a reader, is closed at once."""
    with Sink(kind) as sink:
        return start(command, sink, which)


async def ended(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    """Wait for the end of a command; its status, and what it printed where that was not in vain."""
    stdout, stderr = await asyncio.to_thread(process.communicate, timeout=PATIENCE_S)
    return process.returncode, stdout or b"", stderr or b""


def with_pair(body: Callable[[Pair], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        async with pair(SMALL) as vms:
            await body(vms)

    asyncio.run(all_of_it())


def migrate(vms: Pair, *more: str) -> list[str]:
    sockets = ["--source", vms.source.qmp, "--destination", vms.destination.qmp]
    return [MIGRATOR, "migrate", *sockets, "--on-limit", "force", "--json", *more]


@pytest.mark.parametrize(
    ("kind", "which"),
    [
        *[("full", "stdout"), ("full", "both"), ("gone", "stdout"), ("gone", "stderr")],
        *[("closed", "stderr"), ("closed", "both")],
    ],
)
@pytest.mark.one_in(3)
def test_completed(kind: str, which: str) -> None:
    async def body(vms: Pair) -> None:
        status, stdout, stderr = await ended(run(migrate(vms, "--verify"), kind, which))
        assert status == 0, stderr
        assert b"Traceback" not in stderr
        if which == "stderr":
            assert json.loads(stdout.splitlines()[-1])["status"] == "completed"
        assert await vms.state(vms.destination) == "running"
        assert await vms.state(vms.source) == "postmigrate"

    with_pair(body)


@pytest.mark.parametrize("verbose", [False, True])
def test_a_reader_that_reads_nothing_holds_nothing_up(verbose: bool) -> None:
    """Least of all a guest that stands still: with -vv, every event is printed meanwhile."""

    async def body(vms: Pair) -> None:
        command = migrate(vms, "--max-standstill", "5")
        command[1:1] = ["-vv"] if verbose else []
        with Sink("stalled") as sink:
            process = start(command, sink, "stderr")
            await vms.beats(vms.destination, 1, timeout_s=PATIENCE_S)
        status, stdout, _ = await ended(process)
        assert status == 0
        assert json.loads(stdout.splitlines()[-1])["status"] == "completed"
        await vms.check_heartbeat_unbroken()

    with_pair(body)


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        *[("full", "same"), ("closed", "aborted"), ("gone", "aborted"), ("gone", "unreachable")],
        *[("full", "refused"), ("closed", "refused")],
    ],
)
@pytest.mark.one_in(3)
def test_other_ends(kind: str, end: str) -> None:
    async def body(vms: Pair) -> None:
        command, wanted = migrate(vms), 6
        if end == "same":
            command[command.index("--destination") + 1] = vms.source.qmp + "-link"
            os.symlink(vms.source.qmp, vms.source.qmp + "-link")
            wanted = 2
        elif end == "aborted":
            command, wanted = migrate(vms, "--max-rounds", "1", "--downtime-limit", "0.01"), 1
            command[command.index("force")] = "abort"
        elif end == "refused":
            command, wanted = migrate(vms, "--memory-only"), 3
            await vms.destination.stop()
            machine = replace(SMALL, memory=64 * MIB)
            arguments = machine.arguments(vms.image, vms.destination.console, destination=True)
            os.unlink(vms.destination.qmp)
            await vms.destination.start(arguments, incoming=True)
        else:
            command[command.index("--source") + 1] = "/nonexistent"
        status, _, _ = await ended(run(command, kind, "both"))
        assert status == wanted
        assert await vms.state(vms.source) == "running"
        assert vms.traces(vms.source) == []

    with_pair(body)


@pytest.mark.parametrize(
    ("kind", "which"), [("full", "stdout"), ("gone", "both"), ("stalled", "stderr")]
)
@pytest.mark.one_in(2)
def test_received(kind: str, which: str) -> None:
    async def body(vms: Pair, sink: Sink) -> None:
        await vms.destination.stop()
        address = "127.0.0.1:17343"
        receive = [MIGRATOR, "receive", "--insecure", "--listen", address, "--json", "--"]
        arguments = SMALL.arguments(vms.image, vms.destination.console, destination=True)
        receiver = start([*receive, *arguments], sink, which)
        send = [MIGRATOR, "send", "--source", vms.source.qmp, "--insecure", "--to", address]
        deadline = time.monotonic() + PATIENCE_S
        while True:
            sender = run([*send, "--on-limit", "force", "--json"], "none", which)
            status, _, _ = await ended(sender)
            if status == 0:
                break
            assert time.monotonic() < deadline
            assert receiver.poll() is None
            await asyncio.sleep(0.2)
        deadline = time.monotonic() + PATIENCE_S
        while not vms.destination.console.read_bytes():
            assert time.monotonic() < deadline, "it does not run"
        sink.__exit__()
        assert (await ended(receiver))[0] == 0
        for pid in _processes_with(str(vms.destination.console)):
            os.kill(pid, signal.SIGKILL)

    with Sink(kind) as sink:
        with_pair(lambda vms: body(vms, sink))


def _processes_with(word: str) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and word.encode() in (entry / "cmdline").read_bytes():
                yield int(entry.name)


def test_the_source_ends_in_preflight() -> None:
    """It was reached, and is gone before anything was begun: nothing is known of it."""

    async def body(vms: Pair) -> None:
        stop = await Qmp.connect("destination", vms.destination.qmp)
        process = run(migrate(vms), "none", "both")  # waits for the destination's monitor
        await asyncio.sleep(1.5)
        os.kill(vms.source.pid, signal.SIGKILL)
        await stop.close()
        status, stdout, stderr = await ended(process)
        assert status in (1, 6), stderr  # 1 where the destination was given up before
        if status == 6:
            assert json.loads(stdout.splitlines()[-1])["status"] == "failed"

    with_pair(body)


# -- a signal while it is printed ---------------------------------------------------------------


_DECIDES = """
import os, signal, sys
from migrator.cli.output import Ending
ending = Ending()
if sys.argv[1] == "decided":
    ending.decide(0)
try:
    os.kill(os.getpid(), int(sys.argv[2]))
except KeyboardInterrupt:
    ending.decide(1)
ending.leave(lambda: 1 / 0)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("when", "status"), [("decided", 0), ("undecided", 1)])
def test_a_signal_does_not_change_what_was_decided(
    when: str, status: int, number: signal.Signals
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _DECIDES, when, str(int(number))], capture_output=True, check=False
    )
    assert done.returncode == status
    assert b"could not be printed" in done.stderr  # there was time for last words


_IS_STUCK = """
import os, signal, sys, time
from migrator.cli.output import Ending
ending = Ending()
ending.decide(3)
def tell():
    for _ in range(int(sys.argv[1])):
        os.kill(os.getpid(), signal.SIGTERM)
    print("told", flush=True)
    time.sleep(600)
ending.leave(tell)
"""


@pytest.mark.parametrize(("signals", "told"), [(1, b"told\n"), (2, b"")])
def test_a_signal_hurries_last_words_that_are_stuck(signals: int, told: bytes) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _IS_STUCK, str(signals)], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (3, told)


_ENDS = """
import os, time
from migrator.cli.output import Ending

class Last:
    def __del__(self, write=os.write, sleep=time.sleep):  # when the interpreter takes itself apart
        write(1, b"ending")
        sleep(1)

last, ending = Last(), Ending()
ending.decide(3)
ending.leave(lambda: None)
"""


def test_a_signal_while_the_interpreter_ends_does_not_change_the_status() -> None:
    with subprocess.Popen([sys.executable, "-c", _ENDS], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.read(6) == b"ending"
        child.send_signal(signal.SIGTERM)
    assert child.returncode == 3


def test_a_status_is_decided_once() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        ending = Ending()
        ending.decide(0)
        ending.decide(1)
        assert ending.status == 0
    finally:
        for number, handler in zip(
            (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), before, strict=True
        ):
            signal.signal(number, handler)


def test_a_stream_writes_all_that_it_can() -> None:
    reader, writer = os.pipe()
    stream = Stream(writer)
    assert stream.write(b"some text") == 9
    assert os.read(reader, 100) == b"some text"
    assert not stream.gone
    os.close(reader)
    assert stream.write(b"more") == 4
    assert stream.gone
    os.close(writer)
