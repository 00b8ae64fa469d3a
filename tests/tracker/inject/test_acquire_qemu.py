"""Injection into a running QEMU, which must go on answering."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from tests.tracker.targets import attach, descriptors, run_tracer, status

pytestmark = pytest.mark.live

QEMU = "qemu-system-x86_64"
COMMAND = (QEMU, "-M", "q35", "-accel", "tcg", "-m", "64M", "-display", "none", "-nodefaults")
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


class Qemu:
    """A QEMU process and as much of QMP as these tests need."""

    def __init__(self, *options: str, user: str | None = None) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(30)
        with theirs:
            fd = theirs.fileno()
            qmp = ("-chardev", f"socket,id=qmp,fd={fd}", "-mon", "chardev=qmp,mode=control")
            groups: list[str] | None = [] if user else None
            self.process = subprocess.Popen(
                [*COMMAND, *qmp, *options], pass_fds=[fd], user=user, extra_groups=groups, cwd="/"
            )
        self._lines = self._socket.makefile("r")
        assert "QMP" in json.loads(self._lines.readline())
        self.execute("qmp_capabilities")

    def execute(self, command: str) -> Any:
        self._socket.sendall(json.dumps({"execute": command}).encode())
        while True:
            answer = json.loads(self._lines.readline())
            if "event" not in answer:
                return answer["return"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(params=["paused", "running", "sandbox"])
def qemu(request: pytest.FixtureRequest) -> Iterator[tuple[str, Qemu]]:
    """A QEMU, also as libvirt runs it: as a user of its own, with a seccomp filter that kills."""
    require(None if shutil.which(QEMU) else f"no {QEMU}")
    if request.param == "sandbox":
        require(None if os.geteuid() == 0 else "only root can start QEMU as another user")
        running = Qemu("-sandbox", SANDBOX, user="nobody")
    else:
        running = Qemu(*(["-S"] if request.param == "paused" else []))
    yield request.param, running
    running.close()


def test_attach_20_times(qemu: tuple[str, Qemu]) -> None:
    kind, vm = qemu
    pid = vm.process.pid
    before = descriptors(pid)
    state = vm.execute("query-status")
    assert state["running"] is (kind != "paused")
    for _ in range(20):
        acquired = attach(pid)
        assert acquired.user_mode_only is (kind == "sandbox" and restricted())
        assert vm.execute("query-status") == state
    assert descriptors(pid) == before
    assert status(pid, "TracerPid") == "0"
    vm.execute("quit")
    assert vm.process.wait(30) == 0


@pytest.mark.parametrize("qemu", ["sandbox"], indirect=True)
def test_sandbox_that_cannot_be_suspended(qemu: tuple[str, Qemu]) -> None:
    """Suspending a filter takes CAP_SYS_ADMIN; QEMU's filter lets the calls through anyway."""
    _, vm = qemu
    pid = vm.process.pid
    assert status(pid, "Uid").split()[0] == str(pwd.getpwnam("nobody").pw_uid)
    assert status(pid, "Seccomp") == "2"
    program = (
        "ptrace.PTRACE_O_SUSPEND_SECCOMP = 0\n"
        "print(injector.copy_userfaultfd(pid, deadline).user_mode_only)\n"
    )
    assert run_tracer(pid, program).stdout == f"{restricted()}\n"
    vm.execute("quit")
    assert vm.process.wait(30) == 0


def restricted() -> bool:
    """Whether only the privileged may have a userfaultfd that handles faults of the kernel."""
    return Path("/proc/sys/vm/unprivileged_userfaultfd").read_text() == "0\n"
