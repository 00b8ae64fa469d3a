"""The doctor on this host: what works here is found to work, and what is taken away is missed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from migrator.doctor.check import Check
from migrator.doctor.examine import examine
from tests.conftest import require
from tests.tracker.targets import wait_until
from tracker.pins.matrix import count
from tracker.probe.probe import PROBES

pytestmark = pytest.mark.live

MIGRATOR = [sys.executable, "-c", "from migrator.cli.main import main; main()", "doctor"]
QEMU = "qemu-system-x86_64"


@pytest.fixture
def mark() -> str:
    """A word in the environment of all processes that a doctor starts."""
    return f"DOCTOR_TEST={uuid.uuid4()}"


def marked(mark: str) -> list[str]:
    """Command lines of the processes that have it."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if mark.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return found


def start(mark: str, *arguments: str) -> subprocess.Popen[str]:
    name, _, value = mark.partition("=")
    return subprocess.Popen(
        [*MIGRATOR, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, name: value, "COLUMNS": "200"},
    )


def test_this_host_is_able(mark: str) -> None:
    require(None if shutil.which(QEMU) else f"no {QEMU}")
    with start(mark, "--json") as process:
        out, err = process.communicate(timeout=120)
    said = json.loads(out.splitlines()[-1])
    failed = [check for check in said["checks"] if check["result"] == "failed"]
    require("; ".join(f"{c['check']}: {c['seen']}" for c in failed))
    assert (said["able"], process.returncode) == (True, 0)
    names = [check["check"] for check in said["checks"]]
    assert len(set(names)) == len(names)
    assert [f"tracking: {name}" for name in PROBES] == [n for n in names if "tracking: " in n]
    for check in said["checks"]:
        assert check["check"] in err
        assert check["mend"] or check["result"] == "passed"
    assert "this host is able to" in err
    assert marked(mark) == []


def test_a_host_without_qemu_is_not_able(mark: str) -> None:
    with start(mark, "--json", "--qemu", "/no/such/qemu") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    said = json.loads(out.splitlines()[-1])
    assert said["able"] is False
    check = said["checks"][0]
    assert (check["check"], check["result"]) == ("QEMU", "failed")
    assert "install QEMU" in check["mend"]
    assert "this host is not able to" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_doctor_leaves_nothing(
    number: signal.Signals, mark: str, tmp_path: Path
) -> None:
    qemu = tmp_path / "qemu"
    qemu.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexec sleep 1000\n")
    qemu.chmod(0o755)
    with start(mark, "--qemu", str(qemu)) as process:
        wait_until((tmp_path / "started").exists)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 1
    assert marked(mark) == []


# -- pins -----------------------------------------------------------------------------------------


def test_pins(mark: str) -> None:
    with start(mark, "--pins", "--json", "--qemu", "/no/such/qemu") as process:
        out, err = process.communicate(timeout=300)
    said = json.loads(out.splitlines()[-1])
    require("; ".join(said["trouble"]))
    assert process.returncode == 0
    assert said["kernel"] == os.uname().release
    assert len(said["experiments"]) == count()
    for experiment in said["experiments"]:
        assert experiment["cpu_writes_reported"]["seen"]
        if experiment["cpu_writes_reported"]["answer"] != "not tried":
            assert experiment["pin"] in err
    assert "pins and write-protection agree" in err
    assert marked(mark) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_pins_leave_nothing(number: signal.Signals, mark: str) -> None:
    with start(mark, "--pins") as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("pinning private")
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 1
    wait_until(lambda: marked(mark) == [])


def test_what_is_passed_to_stderr_while_it_takes_long(tmp_path: Path) -> None:
    said: list[str] = []
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\nsleep 1.5\nexit 1\n")
    qemu.chmod(0o755)
    checks = asyncio.run(examine(str(qemu), said.append))
    assert said[0] == "still trying: QEMU"
    assert checks[0].result == "failed"


# -- calls that are taken away, as seccomp profiles of containers do ------------------------------

WITHOUT = """
import ctypes, json, struct, sys
from dataclasses import asdict
from migrator.doctor import kernel

number = int(sys.argv[1])
# struct sock_filter: load seccomp_data.nr; if it is the number, EPERM; otherwise allow
instructions = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]
program = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
buffer = ctypes.create_string_buffer(program)
fprog = struct.pack("HxxxxxxQ", 4, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, fprog, 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP, a filter
checks = kernel.tracing_checks() + kernel.tracking_checks()
print(json.dumps([asdict(check) for check in checks]))
"""


def without(number: int) -> dict[str, Check]:
    """What is seen by a doctor, and by all that it starts, for whom a system call is denied."""
    command = [sys.executable, "-c", WITHOUT, str(number)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=True)
    checks = [Check(**check) for check in json.loads(done.stdout)]
    for check in checks:
        assert check.mend or check.result == "passed"
    return {check.check: check for check in checks}


def results(checks: dict[str, Check]) -> tuple[str, ...]:
    return tuple(checks[name].result for name in ("ptrace", "userfaultfd", "pidfd_getfd"))


def tracking(checks: dict[str, Check]) -> set[str]:
    return {check.result for name, check in checks.items() if name.startswith("tracking: ")}


@pytest.fixture(autouse=True)
def x86_64(request: pytest.FixtureRequest) -> None:
    if "without_" in request.node.name:
        require(None if os.uname().machine == "x86_64" else "numbers of x86-64 are used")


def test_without_ptrace_tracking_is_tried_all_the_same() -> None:
    checks = without_call = without(101)
    assert results(checks) == ("failed", "warning", "warning")
    assert "ptrace" in without_call["ptrace"].seen
    assert checks["userfaultfd's features"].result == "passed"
    assert tracking(checks) == {"passed"}


def test_without_pidfd_getfd() -> None:
    checks = without(438)
    assert results(checks) == ("passed", "passed", "failed")
    assert checks["pidfd_getfd"].seen == "pidfd_getfd: Operation not permitted"
    assert tracking(checks) == {"passed"}


def test_without_userfaultfd_nothing_is_tracked() -> None:
    # in this process's children, the one to be traced among them
    checks = without(323)
    assert results(checks) == ("passed", "failed", "warning")
    assert "userfaultfd inside the process" in checks["userfaultfd"].seen
    assert checks["userfaultfd's features"].result == "failed"
    assert tracking(checks) == {"failed"}


def test_without_memory_scanning_the_probes_say_so() -> None:
    # ioctl(2): userfaultfd is there, but not what it is for
    checks = without(16)
    assert checks["userfaultfd's features"].result == "failed"
    assert tracking(checks) == {"failed"}
