"""Direct I/O that is held in flight: it is, it takes and gives the right bytes, and it can end."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require
from tracker.pins.heldfile import HeldFile

pytestmark = pytest.mark.live

PAGE = mmap.PAGESIZE
ROOT = Path(__file__).parents[3]


@pytest.fixture
def held() -> Iterator[HeldFile]:
    try:
        held = HeldFile()
    except OSError as error:
        require(error.strerror or str(error))
        raise
    with held:
        yield held


def parts(*numbers: int) -> tuple[mmap.mmap, list[memoryview]]:
    pages = mmap.mmap(-1, 8 * PAGE)
    view = memoryview(pages)
    return pages, [view[number * PAGE : (number + 1) * PAGE] for number in numbers]


def test_a_write_takes_what_is_there_when_it_is_taken(held: HeldFile) -> None:
    pages, buffers = parts(5, 2)
    for value in (1, 2):
        pages[5 * PAGE : 6 * PAGE] = bytes([value]) * PAGE
        held.begin_write(buffers)
        pages[2 * PAGE] = 10 + value  # in flight, and not yet copied
        assert held.finish_write() == bytes([value]) * PAGE + bytes([10 + value]) + bytes(PAGE - 1)


def test_a_read_writes_when_it_is_answered(held: HeldFile) -> None:
    pages, buffers = parts(5, 2)
    held.begin_read(buffers)
    pages[5 * PAGE] = 1
    assert pages[2 * PAGE] == 0
    held.finish_read(b"a" * PAGE + b"b" * PAGE)
    assert pages[5 * PAGE : 6 * PAGE] == b"a" * PAGE
    assert pages[2 * PAGE : 3 * PAGE] == b"b" * PAGE
    assert pages[: 2 * PAGE] == bytes(2 * PAGE)


def test_a_read_is_not_a_write(held: HeldFile) -> None:
    _, buffers = parts(0)
    held.begin_read(buffers)
    with pytest.raises(OSError, match="FUSE request 15 where 16 was to be held"):
        held.finish_write()


def test_an_answer_that_is_too_short(held: HeldFile) -> None:
    _, buffers = parts(0, 1)
    held.begin_read(buffers)
    held.finish_read(b"x" * PAGE)  # as at the end of a file: the caller gets what there is
    held.begin_read(buffers)
    with pytest.raises(OSError, match="Invalid argument"):
        held.finish_read(b"x" * 3 * PAGE)


@pytest.mark.parametrize("begin", ["begin_read", "begin_write"])
def test_closing_ends_what_is_in_flight(begin: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    try:
        held = HeldFile()
    except OSError as error:
        require(error.strerror or str(error))
        raise
    _, buffers = parts(0)
    getattr(held, begin)(buffers)
    held.close()
    held.close()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("begin", ["begin_read", "begin_write"])
def test_a_process_with_something_in_flight_can_be_killed(begin: str, held: HeldFile) -> None:
    program = (
        "import mmap, time\n"
        "from tracker.pins.heldfile import HeldFile\n"
        "held = HeldFile()\n"
        f"held.{begin}([memoryview(mmap.mmap(-1, mmap.PAGESIZE))])\n"
        "print('in flight', flush=True)\n"
        "time.sleep(1000)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in flight\n"
        process.kill()
        assert process.wait(30) == -signal.SIGKILL


def test_the_mount_is_nowhere(held: HeldFile) -> None:
    assert " - fuse " not in Path("/proc/self/mountinfo").read_text()


def test_a_child_may_close_the_file(held: HeldFile) -> None:
    """Which is what Popen does between vfork and exec, while we wait for it."""
    _, buffers = parts(0)
    held.begin_read(buffers)
    assert subprocess.run(["true"], timeout=60, check=False).returncode == 0
    held.finish_read(b"x" * PAGE)
