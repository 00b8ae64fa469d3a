"""The runner of the lab VM: what goes wrong in there, or with it, is seen out here."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.boot import CHECKOUT, INSIDE, LAB, LabError, Limits, run
from tests.tracker.targets import wait_until


def shell(program: str, **options: object) -> tuple[int, bytes]:
    out = io.BytesIO()
    status = run(["sh", "-c", program], out=out, **options)  # type: ignore[arg-type]
    return status, out.getvalue()


class Watched(io.BytesIO):
    """Output that has something done once it contains a line."""

    def __init__(self, line: bytes, action: Callable[[], object]) -> None:
        super().__init__()
        self._line, self._action = line, action
        self.done = False

    def write(self, data: object) -> int:
        written = super().write(data)  # type: ignore[arg-type]
        if not self.done and self._line in self.getvalue():
            self.done = True
            self._action()
        return written


def qemus_of(pid: int) -> list[int]:
    """QEMUs among the children of a process."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                name, _, rest = (process / "stat").read_text().rpartition(")")
            except OSError:  # ended meanwhile
                continue
            if int(rest.split()[1]) == pid and "qemu-system" in name:
                found.append(int(process.name))
    return found


def directories_of(pid: int) -> list[Path]:
    """What the runs of a process keep in the cache."""
    return list(LAB.glob(f"run.{pid}.*"))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No directory of a run stays behind."""
    yield
    assert directories_of(os.getpid()) == []
    assert qemus_of(os.getpid()) == []


def test_status_and_output_are_the_commands() -> None:
    assert shell("echo out; echo err >&2; exit 3") == (3, b"out\nerr\n")


def test_a_failing_test_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIGRATOR_REQUIRE_LIVE", "1")
    out = io.BytesIO()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/lab/fails.py"]
    assert run(command, out=out) == pytest.ExitCode.TESTS_FAILED
    text = out.getvalue().decode()
    assert "1 failed" in text
    assert "'1') == ('outside', None)" in text
    assert f"('{os.uname().release}', '1')" not in text


def test_a_command_that_hangs_is_an_error() -> None:
    out = io.BytesIO()
    with pytest.raises(LabError, match="the command in the lab VM hangs: no output for 3 s"):
        run(["sh", "-c", "echo begun; sleep 100000"], out=out, limits=Limits(silence_s=3))
    assert out.getvalue().strip() == b"begun"


def test_a_vm_that_does_not_start_is_an_error() -> None:
    with pytest.raises(LabError, match=r"the lab VM does not start: no output for 0\.1 s"):
        run(["true"], out=io.BytesIO(), limits=Limits(boot_s=0.1))


def test_a_panic_is_an_error() -> None:
    out = io.BytesIO()
    with pytest.raises(LabError, match="ended before the command") as caught:
        run(["sh", "-c", "echo begun; echo c >/proc/sysrq-trigger"], out=out)
    assert out.getvalue().strip() == b"begun"
    assert any("Kernel panic" in line for line in caught.value.kernel)


def test_a_qemu_that_is_killed_is_an_error() -> None:
    def kill() -> None:
        (qemu,) = qemus_of(os.getpid())
        os.kill(qemu, signal.SIGKILL)

    out = Watched(b"begun", kill)
    with pytest.raises(LabError, match=r"ended before the command in it \(QEMU: -9\)"):
        run(["sh", "-c", "echo begun; sleep 100000"], out=out)
    assert out.done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_runner_takes_the_vm_along(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "tests.lab.boot", f"{INSIDE}/test_lab.py"]
    with subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as runner:
        wait_until(lambda: bool(qemus_of(runner.pid)), 300)
        (qemu,) = qemus_of(runner.pid)
        runner.send_signal(number)
        _, err = runner.communicate(timeout=60)
    assert runner.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert b"Traceback" not in err
    wait_until(lambda: not Path(f"/proc/{qemu}").exists(), 60)
    if number != signal.SIGKILL:
        assert directories_of(runner.pid) == []
    else:  # nobody is left to remove it
        (directory,) = directories_of(runner.pid)
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
