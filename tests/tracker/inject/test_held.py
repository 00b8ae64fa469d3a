"""Threads that are held execute nothing, and go on whatever becomes of the process that holds."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tracker.errors import InjectionError, TargetGone
from tracker.inject.held import Held

_COUNTS = struct.Struct("=QQ")
_TWO_THREADS = """
import mmap, sys, threading
fd = open(sys.argv[1], "r+b")
counts = memoryview(mmap.mmap(fd.fileno(), 4096)).cast("Q")
def count(i):
    while True:
        counts[i] += 1
threading.Thread(target=count, args=(1,), daemon=True).start()
print(threading.get_native_id(), flush=True)
count(0)
"""
_HOLD_AND_WAIT = """
import sys, time
from tracker.inject.held import Held
Held(int(sys.argv[1]), {int(sys.argv[2])}).hold(5.0)
print("held", flush=True)
time.sleep(60)
"""
_PATIENCE_S = 20.0


@dataclass
class Counter:
    """A process whose threads count in shared memory: the main one, and another one."""

    process: subprocess.Popen[str]
    memory: mmap.mmap

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def other(self) -> int:
        """The second thread."""
        return next(int(t) for t in os.listdir(f"/proc/{self.pid}/task") if int(t) != self.pid)

    def counts(self) -> tuple[int, int]:
        main, other = _COUNTS.unpack_from(self.memory)
        return main, other

    def await_counting(self, thread: int) -> None:
        before = self.counts()[thread]
        deadline = time.monotonic() + _PATIENCE_S
        while self.counts()[thread] == before:
            assert time.monotonic() < deadline, "the thread stands"
            time.sleep(0.001)

    def tracer(self, tid: int) -> int:
        status = Path(f"/proc/{tid}/status").read_text()
        return int(status.split("TracerPid:")[1].split()[0])


@pytest.fixture
def counter(tmp_path: Path) -> Iterator[Counter]:
    shared = tmp_path / "counts"
    shared.write_bytes(bytes(4096))
    process = subprocess.Popen(
        [sys.executable, "-c", _TWO_THREADS, shared], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process, shared.open("r+b") as file, mmap.mmap(file.fileno(), 4096) as memory:
        process.stdout.readline()
        found = Counter(process, memory)
        found.await_counting(0)
        found.await_counting(1)
        yield found
        process.kill()


def test_a_thread_that_is_held_executes_nothing(counter: Counter) -> None:
    # the interpreter's lock is in nobody's way: the main thread waits for it, and says so
    held = Held(counter.pid, {counter.pid, counter.other})
    held.hold(_PATIENCE_S)
    before = counter.counts()
    time.sleep(0.1)
    assert counter.counts() == before
    held.release()
    counter.await_counting(0)
    counter.await_counting(1)
    assert counter.tracer(counter.pid) == 0


def test_other_threads_go_on(counter: Counter) -> None:
    held = Held(counter.pid, {counter.other})
    held.hold(_PATIENCE_S)
    tracer = counter.tracer(counter.other)
    untraced = counter.tracer(counter.pid)
    held.release()
    held.release()
    assert untraced == 0
    assert tracer != 0
    assert counter.tracer(counter.other) == 0
    counter.await_counting(1)


def test_the_holder_is_killed(counter: Counter) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD_AND_WAIT, str(counter.pid), str(counter.other)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == "held\n"
        assert counter.tracer(counter.other) != 0
        holder.send_signal(signal.SIGKILL)
    counter.await_counting(1)
    assert counter.tracer(counter.other) == 0


def test_a_process_that_has_ended(counter: Counter) -> None:
    threads = {counter.pid, counter.other}
    counter.process.kill()
    counter.process.wait()
    with pytest.raises(TargetGone):
        Held(counter.pid, threads).hold(_PATIENCE_S)


def test_a_thread_that_is_traced_already(counter: Counter) -> None:
    first, second = Held(counter.pid, {counter.other}), Held(counter.pid, {counter.other})
    first.hold(_PATIENCE_S)
    with pytest.raises(InjectionError):
        second.hold(_PATIENCE_S)
    first.release()
    counter.await_counting(1)
    assert counter.tracer(counter.other) == 0


def test_no_thread_is_held_where_one_cannot_be(counter: Counter) -> None:
    first = Held(counter.pid, {counter.other})
    first.hold(_PATIENCE_S)
    try:
        with pytest.raises(InjectionError):
            Held(counter.pid, {counter.pid, counter.other}).hold(_PATIENCE_S)
        deadline = time.monotonic() + _PATIENCE_S
        while counter.tracer(counter.pid):  # until the kernel has ended the tracing thread
            assert time.monotonic() < deadline
    finally:
        first.release()


def test_other_children_are_left_alone(counter: Counter) -> None:
    """Their ends are for the code that started them to see."""
    child = subprocess.Popen(["true"])
    deadline = time.monotonic() + _PATIENCE_S
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        assert time.monotonic() < deadline
    held = Held(counter.pid, {counter.other})
    held.hold(_PATIENCE_S)
    held.release()
    assert child.wait() == 0


def test_nothing_to_hold() -> None:
    held = Held(os.getpid(), ())
    held.hold(_PATIENCE_S)
    held.release()
