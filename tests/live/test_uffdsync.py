"""Synchronous write-protection on the real kernel: every write is reported, every writer goes on.

What is not reported is what :mod:`tests.live.test_uffd` shows of the asynchronous kind.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import pytest

from tests import children
from tests.live.tracked import (
    HUGE,
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MADV_PAGEOUT,
    NAME,
    PAGE,
    Mirror,
    Tracked,
    Tracker,
    ext4,
    huge_tmpfs,
    hugetlbfs,
    pages,
    tmpfs,
    tracked,
    tracking,
)
from tests.processes import fault_servers, is_running
from tests.tracker.targets import injectors, wait_until
from tracker.abi.uio import iovec
from tracker.answered import uffdsync
from tracker.answered.uffdsync import UffdSync
from tracker.bits.bitmap import DirtyBitmap
from tracker.errors import NotTracking, SourceError
from tracker.inject import acquire as inject
from tracker.memory.ram import RamBlock
from tracker.warm import warm_up

pytestmark = pytest.mark.live

FileSystem = Callable[[], AbstractContextManager[str]]

MADV_COLLAPSE = 25  # include/uapi/asm-generic/mman-common.h, since Linux 6.1

by_page = partial(UffdSync, chunk=PAGE)


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    warm_up()


@contextlib.contextmanager
def populated(
    chunk: int = PAGE, file_system: FileSystem = tmpfs, npages: int = 2048, page_size: int = PAGE
) -> Iterator[tuple[Tracked, Tracker]]:
    """A process that has all its pages, and a tracker to which they are all clean."""
    with tracked(file_system, npages, page_size) as child:
        child.store(0, npages)
        with tracking(child, partial(UffdSync, chunk=chunk)) as tracker:
            yield child, tracker


def written(tracker: Tracker) -> list[int]:
    """What write-protection reports, without the holes."""
    return list(pages(tracker.uffd.collect()[NAME]).tolist())


def server(tracker: Tracker) -> int:
    """The process that answers faults."""
    assert isinstance(tracker.uffd, UffdSync)
    process = tracker.uffd._server
    assert process is not None
    return process.pid


def synchronised(child: Tracked, tracker: Tracker) -> Mirror:
    mirror = Mirror(child)
    tracker.collect()
    mirror.take(DirtyBitmap.full(child.block.npages), tracker.data)
    return mirror


# --- nothing is lost ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file_system", "npages", "page_size", "chunk", "seconds"),
    [
        pytest.param(tmpfs, 8192, PAGE, PAGE, 2.0, id="tmpfs"),
        pytest.param(tmpfs, 8100, PAGE, 64 << 10, 2.0, id="tmpfs, 64 KiB, the last one cut"),
        pytest.param(tmpfs, 8100, PAGE, 2 << 20, 0.7, id="tmpfs, 2 MiB, the last one cut"),
        pytest.param(hugetlbfs, 12, HUGE, PAGE, 0.7, id="hugetlbfs"),
        pytest.param(huge_tmpfs, 8192, PAGE, 64 << 10, 0.7, id="transparent huge pages"),
    ],
)
def test_no_increment_is_lost(
    file_system: FileSystem, npages: int, page_size: int, chunk: int, seconds: float
) -> None:
    with tracked(file_system, npages, page_size) as child:
        if file_system is huge_tmpfs:
            child.madvise(MADV_HUGEPAGE, 0, npages)
        child.hammer("add", 3)  # from before the first page is protected
        with tracking(child, partial(UffdSync, chunk=chunk)) as tracker:
            mirror = Mirror(child)
            mirror.take(DirtyBitmap.full(npages), tracker.data)
            rounds, deadline = 0, time.monotonic() + seconds
            while rounds < 3 or time.monotonic() < deadline:
                dirty = tracker.collect()
                mirror.take(dirty, tracker.data)
                rounds += dirty.any()
            total = child.rest()
            mirror.take(tracker.collect(), tracker.data)
            assert mirror.differing() == []
            assert not tracker.collect().any()
    assert int(mirror.copy.view(np.uint64).sum()) == total > 0


def test_no_write_of_the_kernel_is_lost() -> None:
    with tracked(tmpfs, 4096) as child:
        child.hammer("copy", 2)
        child.hammer("add", 1)
        with tracking(child, UffdSync) as tracker:
            mirror = Mirror(child)
            mirror.take(DirtyBitmap.full(4096), tracker.data)
            for _ in range(30):
                mirror.take(tracker.collect(), tracker.data)
            child.rest()
            mirror.take(tracker.collect(), tracker.data)
            assert mirror.differing() == []


TAKING = """
import sys
sys.path.append(sys.argv[1])
import numpy as np
from tracker.answered import faults, faultserver
from tracker.answered.faults import take

armed = False

def wrong(uffd, messages, ranges, opened, taken, *pacing):
    global armed
    if not armed:
        armed = True
        return take(uffd, messages, ranges, opened, taken, *pacing)
    {body}

faultserver.take = wrong
faultserver.main(*{arguments})
"""

RIGHT = "return take(uffd, messages, ranges, opened, taken, *pacing)"

# bits are gone, and their chunks stay open: what is written there from now on is not noticed
NOT_PROTECTED = """
    taken[:] = opened
    opened[:] = 0
    return 0
"""

# the bits are taken first, and what is opened until all is protected loses its own
BITS_FIRST = """
    bits = opened.copy()
    error = take(uffd, messages, ranges, opened, taken, *pacing)
    opened[:] = 0
    taken[:] = bits
    return error
"""


def some_round_differs(rounds: int) -> bool:
    """Whether in one of some rounds of writing and copying, a page was lost."""
    with tracked(npages=8192) as child, tracking(child, by_page) as tracker:
        mirror = synchronised(child, tracker)
        for _ in range(rounds):
            child.hammer("add_slowly", 3)
            for _ in range(3):
                mirror.take(tracker.collect(), tracker.data)
                time.sleep(0.01)
            child.rest()
            mirror.take(tracker.collect(), tracker.data)
            if mirror.differing():
                return True
    return False


def test_a_server_that_is_replaced_loses_nothing_if_it_takes_rightly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # what the tests after this one rest on
    children.replace(monkeypatch, "tracker.answered.faultserver", TAKING.replace("{body}", RIGHT))
    assert not some_round_differs(10)


@pytest.mark.parametrize("body", [NOT_PROTECTED, BITS_FIRST], ids=["unprotected", "bits first"])
def test_taking_bits_and_protecting_are_one_step(
    body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    children.replace(monkeypatch, "tracker.answered.faultserver", TAKING.replace("{body}", body))
    assert some_round_differs(50), "nothing was lost: then this could not be noticed either"


def test_copying_before_collecting_loses_writes() -> None:
    with populated(npages=8192) as (child, tracker):
        for _ in range(10):
            mirror = synchronised(child, tracker)
            child.hammer("add_slowly", 3)
            for _ in range(3):
                too_early = child.contents()
                time.sleep(0.01)
                rows = pages(tracker.collect())
                mirror.copy[rows] = too_early[rows]
            child.rest()
            mirror.take(tracker.collect(), tracker.data)
            if mirror.differing():
                return
    pytest.fail("copying before collecting lost nothing: then this could not be noticed either")


# --- what was written, and nothing but its chunk --------------------------------------------------


@pytest.mark.parametrize(
    ("file_system", "npages", "page_size", "chunk"),
    [
        pytest.param(tmpfs, 2048, PAGE, PAGE, id="page"),
        pytest.param(tmpfs, 2047, PAGE, 16 * PAGE, id="16 pages, the last chunk cut"),
        pytest.param(tmpfs, 1030, PAGE, 512 * PAGE, id="512 pages, the last chunk cut"),
        pytest.param(hugetlbfs, 12, HUGE, PAGE, id="hugetlbfs"),
    ],
)
def test_exactly_the_written_chunks_are_reported(
    file_system: FileSystem, npages: int, page_size: int, chunk: int
) -> None:
    last, in_chunk = npages - 1, max(1, chunk // page_size)
    patterns = [[0], [last], [0, last], [*range(0, npages, 3)], [2, 3, 8], [npages // 2], []]
    with populated(chunk, file_system, npages, page_size) as (child, tracker):
        for pattern in patterns:
            for page in pattern:
                child.store(page)
            chunks = {page // in_chunk for page in pattern}
            assert written(tracker) == [p for p in range(npages) if p // in_chunk in chunks]
            assert written(tracker) == []  # none twice
        child.load(0, npages)
        assert written(tracker) == []


@pytest.mark.parametrize(
    ("file_system", "npages", "page_size"),
    [pytest.param(tmpfs, 2048, PAGE, id="tmpfs"), pytest.param(hugetlbfs, 12, HUGE, id="huge")],
)
def test_pages_that_nobody_had_touched(
    file_system: FileSystem, npages: int, page_size: int
) -> None:
    # without WP_UNPOPULATED, which kernels before 6.4 have not
    with tracked(file_system, npages, page_size) as child, tracking(child, by_page) as tracker:
        assert written(tracker) == []
        child.store(npages - 1)
        assert written(tracker) == [npages - 1]
        child.load(0, npages)
        assert written(tracker) == []
        child.store(0, npages // 2, 2)
        assert written(tracker) == list(range(0, npages, 2))


def test_the_server_in_plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # which the server inherits
    with populated(16 * PAGE, npages=2047) as (child, tracker):
        for pattern in ([0, 2046], [*range(0, 2047, 3)], [17, 1023, 1024], []):
            for page in pattern:
                child.store(page)
            chunks = {page // 16 for page in pattern}
            assert written(tracker) == [p for p in range(2047) if p // 16 in chunks]


def test_several_blocks() -> None:
    with tracked(npages=1000) as child:
        child.store(0, 1000)
        device, inode = child.block.device, child.block.inode
        halves = [
            RamBlock("low", 100 * PAGE, PAGE, child.hva, device, inode),
            RamBlock("high", 900 * PAGE, PAGE, child.address(100), device, inode),
        ]
        source = by_page(child.pid, halves)
        source.start()
        try:
            child.store(99, 2)
            child.store(999)
            found = source.collect()
            assert pages(found["low"]).tolist() == [99]
            assert pages(found["high"]).tolist() == [0, 899]
        finally:
            source.stop()


# --- kinds of writers -----------------------------------------------------------------------------


def test_what_another_process_writes_into_its_memory_is_reported() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with populated() as (child, tracker):
        text = ctypes.create_string_buffer(b"x" * PAGE)
        ours = iovec(iov_base=ctypes.addressof(text), iov_len=PAGE)
        theirs = iovec(iov_base=child.address(9) + 100, iov_len=PAGE)  # pages 9 and 10
        done = libc.process_vm_writev(child.pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
        assert done == PAGE
        assert written(tracker) == [9, 10]


def test_what_the_kernel_copies_to_it_is_reported() -> None:
    with open(sys.executable, "rb") as file, tracked(fds=[file.fileno()]) as child:
        child.store(0, 2048)
        with tracking(child, by_page) as tracker:
            at = child.address(30) + PAGE - 1
            assert child.call("pread", file.fileno(), at, PAGE + 2, 0) == PAGE + 2
            assert written(tracker) == [30, 31, 32]


def test_direct_io_into_it_is_reported() -> None:
    with ext4() as directory, tempfile.NamedTemporaryFile(dir=directory) as file:
        file.write(os.urandom(4 * PAGE))
        file.flush()
        os.fsync(file.fileno())
        fd = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        try:
            with tracked(fds=[fd]) as child:
                child.store(0, 2048)
                with tracking(child, by_page) as tracker:
                    assert child.call("pread", fd, child.address(40), 4 * PAGE, 0) == 4 * PAGE
                    assert written(tracker) == [40, 41, 42, 43]
        finally:
            os.close(fd)


def test_without_a_userfaultfd_for_the_kernels_writes_it_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def less(pid: int) -> inject.AcquiredUffd:
        return inject.acquire_userfaultfd(pid)._replace(user_mode_only=True)

    monkeypatch.setattr(uffdsync, "acquire_userfaultfd", less)
    with tracked() as child:
        source = UffdSync(child.pid, [child.block])
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(NotTracking, match="for writes of the kernel"):
            source.start()
        assert set(os.listdir("/proc/self/fd")) == before
        assert child.traces() == []


# --- pages that are taken away --------------------------------------------------------------------


@pytest.mark.parametrize("file_system", [tmpfs, huge_tmpfs])
def test_pages_that_are_unmapped_behind_its_back(file_system: FileSystem) -> None:
    with tracked(file_system) as child:
        if file_system is huge_tmpfs:
            child.madvise(MADV_HUGEPAGE, 0, 2048)
        child.store(0, 2048)
        with tracking(child, by_page) as tracker:
            mirror = synchronised(child, tracker)
            for first, count in ((700, 1), (512, 512), (690, 20), (0, 2048)):
                child.store(700)
                child.madvise(MADV_DONTNEED, first, count)
                dirty = tracker.collect()
                assert 700 in pages(dirty)
                mirror.take(dirty, tracker.data)
                assert mirror.differing() == []
            child.store(701)
            assert written(tracker) == [701]  # the others are protected still


def race_with_discards(
    file_system: FileSystem, npages: int, page_size: int, rounds: int
) -> list[int]:
    """Write and discard random pages meanwhile; return those that differ after the first loss."""
    with tracked(file_system, npages, page_size) as child:
        child.store(0, npages)
        with tracking(child, by_page) as tracker:
            mirror = synchronised(child, tracker)
            for _ in range(rounds):
                child.hammer("punch", 1)
                child.hammer("add", 2)
                for _ in range(5):
                    mirror.take(tracker.collect(), tracker.data)
                child.rest()
                mirror.take(tracker.collect(), tracker.data)
                child.store(0, npages)  # a page that lost its protection is not noticed here
                mirror.take(tracker.collect(), tracker.data)
                if found := mirror.differing():
                    return found
    return []


@pytest.mark.parametrize(
    ("file_system", "npages", "page_size"),
    [(tmpfs, 2048, PAGE), (huge_tmpfs, 2048, PAGE), (hugetlbfs, 12, HUGE)],
)
def test_discards_while_pages_are_written_and_copied(
    file_system: FileSystem, npages: int, page_size: int
) -> None:
    assert race_with_discards(file_system, npages, page_size, 8) == []


def test_without_a_look_at_the_page_tables_discards_lose_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uffdsync, "was_modified", lambda watcher: False)
    if not race_with_discards(hugetlbfs, 12, HUGE, 40):
        pytest.fail("nobody looked, and nothing was lost: then nothing is tested here")


@pytest.mark.parametrize("advice", [MADV_DONTNEED, MADV_PAGEOUT, MADV_COLLAPSE])
@pytest.mark.parametrize("file_system", [tmpfs, huge_tmpfs])
def test_nothing_but_a_discard_takes_protection_away(
    file_system: FileSystem, advice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # why the page tables are looked at only if a file was modified
    monkeypatch.setattr(uffdsync, "was_modified", lambda watcher: False)
    with tracked(file_system) as child:
        if file_system is huge_tmpfs:
            child.madvise(MADV_HUGEPAGE, 0, 2048)
        child.store(0, 2048)
        with tracking(child, by_page) as tracker:
            child.hammer("add", 2)
            deadline = time.monotonic() + 0.7
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError):  # pages in use are not collapsed
                    child.madvise(advice, 0, 2048)
                tracker.collect()
            child.rest()
            tracker.collect()
            assert len(child.protected()) == 2048


# --- errors ---------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_write_protected_so() -> None:
    with tracked(ext4) as child:
        source = UffdSync(child.pid, [child.block])
        with pytest.raises(SourceError, match=f"cannot register '{NAME}'") as caught:
            source.start()
        assert caught.value.source == "uffd-sync"
        assert child.traces() == []


def test_a_block_on_which_somebody_has_a_userfaultfd() -> None:
    with populated() as (child, tracker):
        rival = UffdSync(child.pid, [child.block])
        with pytest.raises(SourceError, match="somebody else has a userfaultfd"):
            rival.start()
        child.store(4)
        assert written(tracker) == [4]  # the first goes on


def test_memory_that_goes_away_is_not_clean() -> None:
    with populated() as (child, tracker):
        child.call("munmap", child.hva, child.block.size)
        with pytest.raises(SourceError, match="No such file or directory"):  # ENOENT
            tracker.uffd.collect()


def test_memory_that_is_mapped_anew_is_not_clean() -> None:
    read_write, shared_fixed = 3, 1 | 0x10
    with populated() as (child, tracker):
        child.call("mmap", child.hva, child.block.size, read_write, shared_fixed, child.fd, 0)
        with pytest.raises(SourceError, match="No such file or directory"):
            tracker.uffd.collect()


def test_a_process_that_is_gone_is_not_clean() -> None:
    with populated() as (child, tracker):
        child.kill()
        child.reap()
        with pytest.raises(SourceError):
            tracker.uffd.collect()
        with pytest.raises(SourceError):
            tracker.uffd.collect()


def test_a_server_that_does_not_come_up_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    children.replace(monkeypatch, "tracker.answered.faultserver", "raise SystemExit('no')")
    with tracked() as child:
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(SourceError, match=r"nobody answers write faults.*: no$"):
            UffdSync(child.pid, [child.block]).start()
        assert set(os.listdir("/proc/self/fd")) == before
        assert child.traces() == []


def test_it_says_so_before_it_is_started() -> None:
    with tracked() as child, pytest.raises(SourceError, match="not started"):
        UffdSync(child.pid, [child.block]).collect()


# --- afterwards -----------------------------------------------------------------------------------


def test_nothing_is_left_when_it_has_stopped() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with populated() as (child, tracker):
        assert len(child.protected()) == 2048
        child.hammer("add", 2)
        tracker.collect()
        pid = server(tracker)
        tracker.uffd.stop()
        assert not is_running(pid)
        assert child.traces() == []
        assert child.rest() > 0
        assert child.protected().tolist() == []
        tracker.uffd.stop()
    assert set(os.listdir("/proc/self/fd")) == before


def test_writers_go_on_when_the_server_is_killed() -> None:
    for delay in (0.0, 0.002, 0.01, 0.05):
        with populated() as (child, tracker):
            child.hammer("add", 3)
            time.sleep(delay)
            os.kill(server(tracker), signal.SIGKILL)
            with pytest.raises(SourceError, match="nobody answers"):
                tracker.uffd.collect()
            assert child.rest() > 0  # and nobody waits
            assert child.traces() == []
            assert child.protected().tolist() == []
            with pytest.raises(SourceError):
                tracker.uffd.collect()


def test_a_server_that_hangs_is_ended() -> None:
    with tracked() as child:
        child.store(0, 2048)
        with tracking(child, partial(UffdSync, timeout_s=0.3)) as tracker:
            os.kill(server(tracker), signal.SIGSTOP)
            child.hammer("add", 2)
            with pytest.raises(SourceError, match="nobody answers"):
                tracker.uffd.collect()
            assert child.rest() > 0
            assert child.traces() == []


def test_nothing_is_left_when_the_tracker_is_killed() -> None:
    def track() -> None:
        while True:
            with tracking(child, UffdSync) as tracker:
                for _ in range(30):
                    tracker.collect()

    others, seconds = fault_servers(), random.Random()
    with tracked() as child:
        child.hammer("add", 2)
        for attempt in range(8):
            process = multiprocessing.get_context("fork").Process(target=track)
            process.start()
            if attempt % 2:  # while it tracks; else at any moment
                wait_until(lambda: len(child.protected()) > 0)
            time.sleep(seconds.uniform(0, 0.1))
            process.kill()
            process.join()
            wait_until(lambda: not injectors(child.pid))
            wait_until(lambda: not fault_servers() - others and not child.traces())
            assert child.protected().tolist() == []
            assert child.rest() > 0
            child.hammer("add", 2)
        with tracking(child, by_page) as another:
            child.rest()
            another.collect()
            child.store(3)
            assert written(another) == [3]
