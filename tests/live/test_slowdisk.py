"""A read past the page cache marks its page when the page is pinned, and its data arrive later.

Shown with a process and a disk whose reads stay in flight; and what that disk promises.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.live.slowdisk import Read, SlowDisk, content, slow_disk
from tests.live.tracked import PAGE, Mirror, Tracked, Tracker, pages, tracked, tracking
from tracker.bits.bitmap import DirtyBitmap
from tracker.warm import warm_up

pytestmark = pytest.mark.live

FIRST, COUNT, OFFSET = 5, 3, 4 * PAGE
READ = list(range(FIRST, FIRST + COUNT))


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    warm_up()


# --- a process ------------------------------------------------------------------------------------


@contextlib.contextmanager
def reader(flags: int) -> Iterator[tuple[SlowDisk, Tracked, int]]:
    """A slow disk, and a process that has all its pages and the disk as a descriptor."""
    with slow_disk() as disk:
        fd = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC | flags)
        try:
            with tracked(npages=256, fds=[fd]) as child:
                child.store(0, child.block.npages)
                yield disk, child, fd
                disk.flow()
        finally:
            os.close(fd)


def begin(disk: SlowDisk, child: Tracked, fd: int) -> Read:
    disk.hold()
    assert child.tell("begin_read", fd, FIRST, COUNT, OFFSET) == 0
    return disk.await_read()


def end(disk: SlowDisk, child: Tracked) -> None:
    disk.flow()
    assert child.tell("end_read") == COUNT * PAGE


def synchronised(child: Tracked, tracker: Tracker) -> Mirror:
    mirror = Mirror(child)
    mirror.take(DirtyBitmap.full(child.block.npages), tracker.data)
    assert mirror.differing() == []
    return mirror


def test_the_page_is_reported_once_before_its_data_arrive() -> None:
    with reader(os.O_DIRECT) as (disk, child, fd), tracking(child) as tracker:
        mirror = synchronised(child, tracker)
        read = begin(disk, child, fd)
        assert (read.offset, read.size) == (OFFSET, COUNT * PAGE)
        dirty = tracker.collect()
        assert pages(dirty).tolist() == READ
        mirror.take(dirty, tracker.data)
        assert mirror.differing() == []  # nothing has arrived yet
        end(disk, child)
        assert not tracker.collect().any()
        assert mirror.differing() == READ
        assert child.contents()[READ].tobytes() == read.content
        mirror.take(dirty, tracker.data)  # what was reported once
        assert mirror.differing() == []


def test_a_read_that_ends_before_the_page_is_collected_is_no_danger() -> None:
    with reader(os.O_DIRECT) as (disk, child, fd), tracking(child) as tracker:
        mirror = synchronised(child, tracker)
        begin(disk, child, fd)
        end(disk, child)
        assert mirror.differing() == READ
        mirror.take(tracker.collect(), tracker.data)
        assert mirror.differing() == []


def test_a_read_in_flight_when_tracking_begins_is_never_reported() -> None:
    with reader(os.O_DIRECT) as (disk, child, fd):
        read = begin(disk, child, fd)
        with tracking(child) as tracker:
            mirror = synchronised(child, tracker)
            end(disk, child)
            assert not tracker.collect().any()
            assert mirror.differing() == READ
            assert child.contents()[READ].tobytes() == read.content


def test_reads_through_the_page_cache_are_reported_when_the_data_arrive() -> None:
    with reader(0) as (disk, child, fd), tracking(child) as tracker:
        mirror = synchronised(child, tracker)
        begin(disk, child, fd)
        assert not tracker.collect().any()
        end(disk, child)
        assert mirror.differing() == READ
        dirty = tracker.collect()
        assert pages(dirty).tolist() == READ
        mirror.take(dirty, tracker.data)
        assert mirror.differing() == []


# --- the disk -------------------------------------------------------------------------------------


def test_every_read_brings_other_data() -> None:
    with slow_disk(size=2 * PAGE) as disk:
        fd = os.open(disk.path, os.O_RDONLY | os.O_DIRECT)
        try:
            assert os.fstat(fd).st_size == disk.size
            for number in (1, 2):
                assert os.pread(fd, PAGE, PAGE) == content(number, PAGE, PAGE)
            # as QEMU asks when it looks for the alignment that a disk needs
            assert os.pread(fd, 1, 513) == content(3, 513, 1)
            assert os.pread(fd, PAGE, 2 * PAGE) == b""
            assert disk.state.in_flight == ()
        finally:
            os.close(fd)
    assert content(3, 513, 1) == content(3, 512, 512)[1:2]
    assert content(1, PAGE, PAGE) != content(2, PAGE, PAGE)


def test_a_read_is_in_flight_for_as_long_as_it_was_told() -> None:
    with reader(os.O_DIRECT) as (disk, child, fd):
        first = begin(disk, child, fd)
        disk.delay(0)
        assert disk.state.in_flight == (first,)  # what is held stays held
        assert os.pread(fd, PAGE, 0) == content(2, 0, PAGE)
        assert disk.release().in_flight == (first,)
        assert child.tell("end_read") == COUNT * PAGE
        assert child.contents()[READ].tobytes() == first.content
        disk.delay(10)
        assert os.pread(fd, PAGE, 0) == content(3, 0, PAGE)


def test_a_process_that_waits_for_the_disk_can_be_killed() -> None:
    with slow_disk() as disk:
        disk.hold()
        program = f"import os; os.pread(os.open({disk.path!r}, os.O_RDONLY), 4096, 0)"
        with subprocess.Popen([sys.executable, "-c", program]) as process:
            disk.await_read()
            process.kill()
            assert process.wait(60) == -9
        assert disk.state.in_flight == ()


def test_what_is_in_flight_at_the_end_fails() -> None:
    with slow_disk() as disk:
        disk.hold()
        program = (
            f"import os; fd = os.open({disk.path!r}, os.O_RDONLY | os.O_DIRECT)\n"
            "try: os.pread(fd, 4096, 0)\n"
            "except OSError as error: raise SystemExit(error.errno)"
        )
        process = subprocess.Popen([sys.executable, "-c", program])
        disk.await_read()
        where = disk.path
    assert process.wait(60) == errno.ECONNABORTED
    assert not os.path.exists(where)
