"""A process that is stopped stands still, and goes on whatever becomes of those who stopped it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import children
from tests.conftest import require
from tests.live.tracked import Tracked, tmpfs, tracked
from tests.tracker.targets import status, wait_until
from tracker.errors import InjectionError, TargetGone
from tracker.inject.frozen import frozen

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]


@pytest.fixture
def child() -> Iterator[Tracked]:
    with tracked(tmpfs, 64) as child:
        child.hammer("add", 3)
        yield child


def moves(child: Tracked, seconds: float) -> bool:
    """Whether its memory changes within so many seconds."""
    before, deadline = child.contents().tobytes(), time.monotonic() + seconds
    while time.monotonic() < deadline:
        if child.contents().tobytes() != before:
            return True
    return False


def tracers(pid: int) -> set[str]:
    return {status(int(tid), "TracerPid") for tid in os.listdir(f"/proc/{pid}/task")}


def test_all_threads_stand_still_and_then_go_on(child: Tracked) -> None:
    assert len(tracers(child.pid)) == 1
    for _ in range(3):
        assert moves(child, 20)
        with frozen(child.pid):
            assert tracers(child.pid) != {"0"}
            assert not moves(child, 0.1)
        assert moves(child, 20)
        assert tracers(child.pid) == {"0"}


def test_the_process_goes_on_when_the_block_fails(child: Tracked) -> None:
    with pytest.raises(ZeroDivisionError), frozen(child.pid):
        _ = 1 / 0
    assert moves(child, 20)


def test_the_process_goes_on_when_the_freezer_is_killed(child: Tracked) -> None:
    def kill_freezer() -> None:
        with frozen(child.pid):
            (freezer,) = tracers(child.pid)
            os.kill(int(freezer), signal.SIGKILL)
            wait_until(lambda: tracers(child.pid) == {"0"})
            assert moves(child, 20)

    with pytest.raises(InjectionError, match="ended too early"):
        kill_freezer()


def test_the_process_goes_on_when_we_are_killed(child: Tracked) -> None:
    program = (
        "import sys, time\n"
        "from tracker.inject.frozen import frozen\n"
        f"with frozen({child.pid}):\n"
        "    print('frozen', flush=True)\n"
        "    time.sleep(1000)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"frozen\n"
        assert not moves(child, 0.1)
        process.kill()
    assert moves(child, 20)
    wait_until(lambda: tracers(child.pid) == {"0"})


def test_a_stopped_process_stays_stopped(child: Tracked) -> None:
    os.kill(child.pid, signal.SIGSTOP)
    wait_until(lambda: status(child.pid, "State")[0] == "T")
    with frozen(child.pid):
        assert not moves(child, 0.05)
    wait_until(lambda: tracers(child.pid) == {"0"})
    wait_until(lambda: status(child.pid, "State")[0] == "T")
    assert not moves(child, 0.05)
    os.kill(child.pid, signal.SIGCONT)
    assert moves(child, 20)


def test_no_such_process() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(TargetGone), frozen(process.pid):
        pytest.fail("it stopped a process that is not there")


def test_a_traced_process_cannot_be_stopped_a_second_time(child: Tracked) -> None:
    with frozen(child.pid):
        with pytest.raises(InjectionError, match="already traced"), frozen(child.pid):
            pytest.fail("two tracers")
        assert not moves(child, 0.05)
    assert moves(child, 20)


def test_a_kernel_thread_that_writes_for_the_process(child: Tracked, tmp_path: Path) -> None:
    """As vhost's was: here, a process of its name."""
    name = f"vhost-{child.pid}"
    require(None if len(name) < 16 else "no name so long")
    program = f"open('/proc/self/comm', 'w').write('{name}'); print('x', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"x\n"
        with pytest.raises(InjectionError, match=f"kernel thread {name}"), frozen(child.pid):
            pytest.fail("its writer goes on")
        other.communicate(b"\n")
    assert moves(child, 20)
    with frozen(child.pid):
        assert not moves(child, 0.05)


def test_a_freezer_that_says_nothing(child: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    children.replace(monkeypatch, "tracker.inject.freezer", "import sys; sys.exit('it broke')")
    with pytest.raises(InjectionError, match="it broke"), frozen(child.pid):
        pytest.fail("nobody stopped it")
