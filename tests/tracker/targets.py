"""Processes to inject into: compiled, started, and asked whether they are well."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tracker.inject.acquire import AcquiredUffd, acquire_userfaultfd

SOURCE = Path(__file__).with_name("target.c")


def compile_target(directory: Path) -> Path:
    binary = directory / "target"
    warnings = ("-Wall", "-Wextra", "-Werror")
    subprocess.run(["gcc", "-O2", *warnings, "-o", binary, SOURCE, "-lpthread"], check=True)
    return binary


class Target:
    """A running target.c in one of its modes; it is killed if it is not finished."""

    def __init__(self, binary: Path, mode: str) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([binary, mode], stdin=pipe, stdout=pipe, stderr=pipe)
        self.pid = self.process.pid
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"
        self.began = time.monotonic()
        self.fds = descriptors(self.pid)

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()

    def finish(self, byte: bytes = b"x", timeout_s: float = 30) -> str:
        """Let it end, and assert that it found nothing wrong; return what it printed."""
        out, err = self.process.communicate(byte, timeout_s)
        assert (self.process.returncode, err.decode()) == (0, "")
        return out.decode()

    def assert_untouched(self) -> None:
        """No descriptor of ours in it, and nobody traces it."""
        assert descriptors(self.pid) == self.fds
        assert status(self.pid, "TracerPid") == "0"


def descriptors(pid: int) -> dict[str, str]:
    links = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # of ourselves: the listing's own
            links[fd] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return links


def status(pid: int, name: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    raise KeyError(name)


def attach(pid: int, timeout_s: float = 5.0) -> AcquiredUffd:
    """Acquire, check and close a userfaultfd."""
    acquired = acquire_userfaultfd(pid, timeout_s=timeout_s)
    try:
        assert os.readlink(f"/proc/self/fd/{acquired.fd}") == "anon_inode:[userfaultfd]"
        assert fcntl.fcntl(acquired.fd, fcntl.F_GETFL) & os.O_NONBLOCK
        assert fcntl.fcntl(acquired.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    finally:
        os.close(acquired.fd)
    return acquired


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.002)


def injectors(pid: int) -> list[int]:
    """Process ids of the injectors that are at work on ``pid``."""
    found, target = [], f"({pid}, ".encode()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                command = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            if b"tracker.inject.injector" in command and target in command:
                found.append(int(entry))
    return found


def run_tracer(pid: int, program: str, timeout_s: float = 20) -> subprocess.CompletedProcess[str]:
    """Run a tracer of its own, to show what happens when it does something differently.

    The program finds ``pid``, ``Tracee``, ``tracee`` (the module) and what else it needs.
    """
    process = start_tracer(pid, program)
    out, err = process.communicate(timeout=timeout_s)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_tracer(pid: int, program: str) -> subprocess.Popen[str]:
    preamble = (
        "import os, signal, time\n"
        "from tracker.inject import injector, tracee\n"
        "from tracker.abi import ptrace\n"
        "from tracker.inject.tracee import Tracee\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])\n"
        f"pid, deadline = {pid}, time.monotonic() + 5\n"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", preamble + program]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def read_line(process: subprocess.Popen[str], timeout_s: float = 20) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], timeout_s)[0]
    return process.stdout.readline()
