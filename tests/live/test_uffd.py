"""Asynchronous write-protection on the real kernel: every write is reported, and nothing else is.

The cases are those of the kernel's own tests of PAGEMAP_SCAN and userfaultfd
(``tools/testing/selftests/mm/pagemap_ioctl.c``, ``uffd-unit-tests.c``).
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import pytest

from tests.conftest import require
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
from tests.tracker.targets import injectors, wait_until
from tracker.abi import userfaultfd
from tracker.abi.uio import iovec
from tracker.bits.bitmap import DirtyBitmap
from tracker.errors import MapChanged, SourceError
from tracker.inject.acquire import acquire_userfaultfd
from tracker.memory.ram import check_unmoved, other_mappers
from tracker.sources import uffd
from tracker.syscalls import uffd_api, uffd_register
from tracker.warm import warm_up

pytestmark = pytest.mark.live

FileSystem = Callable[[], AbstractContextManager[str]]

SMALL_PAGES = [tmpfs, ext4]

each_file_system = pytest.mark.parametrize(
    ("file_system", "npages", "page_size"),
    [
        pytest.param(tmpfs, 2048, PAGE, id="tmpfs"),
        pytest.param(ext4, 2048, PAGE, id="ext4"),
        pytest.param(hugetlbfs, 12, HUGE, id="hugetlbfs"),
    ],
)


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    warm_up()


def written(child: Tracked, tracker: Tracker) -> list[int]:
    """What write-protection reports, without the holes."""
    check_unmoved(child.pid, [child.block])
    return list(pages(tracker.uffd.collect()[NAME]).tolist())


@contextlib.contextmanager
def populated(
    file_system: FileSystem = tmpfs, npages: int = 2048, page_size: int = PAGE
) -> Iterator[tuple[Tracked, Tracker]]:
    """A process that has all its pages, and a tracker to which they are all clean."""
    with tracked(file_system, npages, page_size) as child:
        child.store(0, npages)
        with tracking(child) as tracker:
            yield child, tracker


# --- nothing is lost ------------------------------------------------------------------------------


def hammered(tracker: Tracker, mirror: Mirror, seconds: float) -> int:
    """Copy what is dirty, round after round; return how many rounds there was something."""
    deadline = time.monotonic() + seconds
    rounds = 0
    while rounds < 3 or time.monotonic() < deadline:
        dirty = tracker.collect()
        mirror.take(dirty, tracker.data)
        rounds += dirty.any()
    return rounds


@pytest.mark.parametrize(
    ("file_system", "npages", "page_size", "regions", "seconds"),
    [
        pytest.param(tmpfs, 8192, PAGE, None, 3.0, id="tmpfs"),
        pytest.param(tmpfs, 8192, PAGE, 3, 0.7, id="tmpfs, 3 regions a call"),
        pytest.param(ext4, 4096, PAGE, None, 0.7, id="ext4"),
        pytest.param(hugetlbfs, 12, HUGE, None, 0.7, id="hugetlbfs"),
        pytest.param(huge_tmpfs, 8192, PAGE, None, 0.7, id="transparent huge pages"),
    ],
)
def test_no_increment_is_lost(
    file_system: FileSystem,
    npages: int,
    page_size: int,
    regions: int | None,
    seconds: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if regions is not None:
        monkeypatch.setattr(uffd, "_REGIONS", regions)
    with tracked(file_system, npages, page_size) as child:
        if file_system is huge_tmpfs:
            child.madvise(MADV_HUGEPAGE, 0, npages)
        child.hammer("add", 3)  # from before the first page is protected
        if file_system is huge_tmpfs:
            wait_until(lambda: child.smaps("ShmemPmdMapped") != "0 kB")
        with tracking(child) as tracker:
            mirror = Mirror(child)
            mirror.take(DirtyBitmap.full(npages), tracker.data)
            hammered(tracker, mirror, seconds)
            total = child.rest()
            mirror.take(tracker.collect(), tracker.data)
            assert mirror.differing() == []
            assert not tracker.collect().any()
    assert total > 0
    assert int(mirror.copy.view(np.uint64).sum()) == total


def test_no_write_of_the_kernel_is_lost() -> None:
    with tracked(tmpfs, 4096) as child:
        child.hammer("copy", 2)
        child.hammer("add", 1)
        with tracking(child) as tracker:
            mirror = Mirror(child)
            mirror.take(DirtyBitmap.full(4096), tracker.data)
            hammered(tracker, mirror, 0.7)
            child.rest()
            mirror.take(tracker.collect(), tracker.data)
            assert mirror.differing() == []


def test_copying_before_collecting_loses_writes() -> None:
    # What the tests above rest on: the same rounds in the wrong order do end in differences.
    with populated(npages=8192) as (child, tracker):
        for _ in range(10):
            mirror = Mirror(child)
            mirror.take(DirtyBitmap.full(8192), tracker.data)
            tracker.collect()
            child.hammer("add_slowly", 3)
            for _ in range(3):
                too_early = child.contents()
                rows = pages(tracker.collect())
                mirror.copy[rows] = too_early[rows]
            child.rest()
            mirror.take(tracker.collect(), tracker.data)
            if mirror.differing():
                return
    pytest.fail("copying before collecting lost nothing: then this could not be noticed either")


def test_forgetting_one_report_loses_writes() -> None:
    with populated(npages=8192) as (child, tracker):
        for _ in range(10):
            mirror = Mirror(child)
            mirror.take(DirtyBitmap.full(8192), tracker.data)
            tracker.collect()
            child.hammer("add_slowly", 3)
            hammered(tracker, mirror, 0.1)
            time.sleep(0.1)
            assert tracker.collect().any()  # and not kept
            child.rest()
            mirror.take(tracker.collect(), tracker.data)
            if mirror.differing():
                return
    pytest.fail("a report was thrown away, and nothing was lost: then nothing is tested here")


# --- what was written, and nothing else -----------------------------------------------------------


@each_file_system
def test_exactly_the_written_pages_are_reported(
    file_system: FileSystem, npages: int, page_size: int
) -> None:
    last = npages - 1
    patterns = [
        [(0, 1, 1)],
        [(last, 1, 1)],
        [(0, 1, 1), (last, 1, 1)],
        [(0, npages // 2, 2)],
        [(1, npages // 2, 2)],
        [(0, npages // 3, 3)],
        [(2, 5, 1), (8, 2, 1)],
        [(npages // 2 - 1, 2, 1)],  # across a page table, where pages are small
        [(0, npages, 1)],
    ]
    with populated(file_system, npages, page_size) as (child, tracker):
        assert written(child, tracker) == []
        for pattern in patterns:
            for first, count, step in pattern:
                child.store(first, count, step)
            expected = {
                page for first, n, step in pattern for page in range(npages)[first::step][:n]
            }
            assert written(child, tracker) == sorted(expected)
            assert written(child, tracker) == []  # none twice
        child.load(0, npages)
        assert written(child, tracker) == []


@pytest.mark.parametrize("regions", [1, 2, 5])
def test_a_small_vector_loses_nothing(regions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uffd, "_REGIONS", regions)
    npages = 6000
    with populated(npages=npages) as (child, tracker):
        for first, step in ((0, 2), (1, 3), (5, 511)):
            expected = list(range(first, npages, step))
            child.store(first, len(expected), step)
            assert written(child, tracker) == expected
            assert written(child, tracker) == []


# --- pages that are not there ---------------------------------------------------------------------


@each_file_system
def test_pages_that_nobody_had_touched(
    file_system: FileSystem, npages: int, page_size: int
) -> None:
    with tracked(file_system, npages, page_size) as child, tracking(child) as tracker:
        assert written(child, tracker) == []
        child.store(npages - 1)
        assert written(child, tracker) == [npages - 1]
        child.load(0, npages)
        # A page that a read has brought in may be reported (hugetlbfs), which costs a page of
        # zeros; one that is written afterwards has to be, and none twice.
        written(child, tracker)
        assert written(child, tracker) == []
        child.store(0, npages // 2, 2)
        assert written(child, tracker) == list(range(0, npages, 2))


def test_the_far_end_of_a_large_sparse_block() -> None:
    npages = (64 << 30) // PAGE
    with tracked(tmpfs, npages) as child:
        began = time.monotonic()
        with tracking(child) as tracker:
            armed = time.monotonic()
            assert written(child, tracker) == []
            idle = time.monotonic()
            child.store(npages - 1)
            child.store(npages // 2, 3)
            touched = [npages // 2, npages // 2 + 1, npages // 2 + 2, npages - 1]
            assert pages(tracker.collect()).tolist() == touched
            assert pages(tracker.data).tolist() == touched
            assert not tracker.collect().any()
        print(f"64 GiB: armed in {armed - began:.3f} s, an idle look {idle - armed:.3f} s")


# --- kinds of writers -----------------------------------------------------------------------------


def test_what_another_process_writes_into_its_memory_is_reported() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with populated() as (child, tracker):
        text = ctypes.create_string_buffer(b"x" * PAGE)
        ours = iovec(iov_base=ctypes.addressof(text), iov_len=PAGE)
        theirs = iovec(iov_base=child.address(9) + 100, iov_len=PAGE)  # pages 9 and 10
        done = libc.process_vm_writev(child.pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
        assert done == PAGE
        assert written(child, tracker) == [9, 10]
        with open(f"/proc/{child.pid}/mem", "r+b", buffering=0) as memory:  # a debugger's way
            memory.seek(child.address(20))
            memory.write(b"y")
        assert written(child, tracker) == [20]


def test_what_the_kernel_copies_to_it_is_reported() -> None:
    with open(sys.executable, "rb") as file, tracked(fds=[file.fileno()]) as child:
        child.store(0, 2048)
        with tracking(child) as tracker:
            at = child.address(30) + PAGE - 1
            assert child.call("pread", file.fileno(), at, PAGE + 2, 0) == PAGE + 2
            assert written(child, tracker) == [30, 31, 32]


def test_direct_io_into_it_is_reported() -> None:
    # Marked when the page is pinned, before the data arrive: see the next test for what that means.
    with ext4() as directory, tempfile.NamedTemporaryFile(dir=directory) as file:
        file.write(os.urandom(4 * PAGE))
        file.flush()
        os.fsync(file.fileno())
        fd = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        try:
            with tracked(fds=[fd]) as child:
                child.store(0, 2048)
                with tracking(child) as tracker:
                    mirror = Mirror(child)
                    mirror.take(DirtyBitmap.full(2048), tracker.data)
                    assert child.call("pread", fd, child.address(40), 4 * PAGE, 0) == 4 * PAGE
                    mirror.take(DirtyBitmap.from_pages(2048, written(child, tracker)), tracker.data)
                    assert mirror.differing() == []
                    assert mirror.copy[40:44].tobytes() == os.pread(file.fileno(), 4 * PAGE, 0)
        finally:
            os.close(fd)


def test_what_is_written_through_a_pin_is_not_reported() -> None:
    # What a device does by DMA: the reason why this source cannot be the only one.
    with open(sys.executable, "rb") as file, tracked(fds=[file.fileno()]) as child:
        child.store(0, 2048)
        pinned = child.tell("pin", 100, 16)
        require(None if pinned == 0 else f"no io_uring buffers: {os.strerror(-pinned)}")
        with tracking(child) as tracker:
            mirror = Mirror(child)
            mirror.take(DirtyBitmap.full(2048), tracker.data)
            assert child.tell("dma", file.fileno(), 104) == PAGE
            assert written(child, tracker) == []
            assert mirror.differing() == [104]
            # The pin stays the same page as the mapping: what the processor writes there is seen,
            child.store(104)
            assert written(child, tracker) == [104]
            # also after a fork, which makes private pinned pages differ, and does not share ours.
            child.tell("fork")
            child.store(105)
            assert child.tell("dma", file.fileno(), 106) == PAGE
            assert written(child, tracker) == [105]
            mirror.take(DirtyBitmap.from_pages(2048, [104, 105]), tracker.data)
            assert mirror.differing() == [106]


def test_what_is_written_past_its_page_tables_is_not_reported() -> None:
    with open(sys.executable, "rb") as file, tracked(fds=[file.fileno()]) as child:
        child.store(0, 2048)
        with tracking(child) as tracker:
            os.pwrite(child.fd, b"x", 5 * PAGE)
            assert written(child, tracker) == []
            read_write, shared = 3, 1
            second = child.call("mmap", 0, child.block.size, read_write, shared, child.fd, 0)
            child.call("pread", file.fileno(), second + 6 * PAGE, PAGE, 0)
            assert pages(tracker.uffd.collect()[NAME]).tolist() == []
            with pytest.raises(MapChanged, match="second time") as caught:
                check_unmoved(child.pid, [child.block])
            assert caught.value.block == NAME


def test_a_fork_is_another_writer() -> None:
    with populated() as (child, tracker):
        assert other_mappers(child.pid, [child.block]) == []
        forked = child.tell("fork")
        # its page tables are its own, and without a userfaultfd
        assert child.tell("child", "store", 7, 1, 1, 99) == 0
        assert child.contents()[7][7] == 99
        assert written(child, tracker) == []
        assert other_mappers(child.pid, [child.block]) == [(forked, NAME)]
        # what the process itself writes is reported as before
        child.store(7)
        child.store(8)
        assert written(child, tracker) == [7, 8]


# --- what else happens to pages -------------------------------------------------------------------


@pytest.mark.parametrize("file_system", [*SMALL_PAGES, huge_tmpfs])
def test_pages_that_are_unmapped_behind_its_back(file_system: FileSystem) -> None:
    # MADV_DONTNEED empties the page tables, and frees those that are empty; the file keeps it all.
    with tracked(file_system) as child:
        if file_system is huge_tmpfs:
            child.madvise(MADV_HUGEPAGE, 0, 2048)
        child.store(0, 2048)
        if file_system is huge_tmpfs:
            assert child.smaps("ShmemPmdMapped") != "0 kB"
        with tracking(child) as tracker:
            mirror = Mirror(child)
            mirror.take(DirtyBitmap.full(2048), tracker.data)
            for first, count in ((700, 1), (512, 512), (690, 20), (0, 2048)):
                child.store(700)
                child.madvise(MADV_DONTNEED, first, count)
                dirty = tracker.collect()
                assert 700 in pages(dirty)
                mirror.take(dirty, tracker.data)
                assert mirror.differing() == []
            child.store(1500)  # a neighbour in the same huge page loses its mapping
            child.punch(1501)
            dirty = tracker.collect()
            assert {1500, 1501} <= set(pages(dirty).tolist())
            mirror.take(dirty, tracker.data)
            assert mirror.differing() == []


@pytest.mark.parametrize("file_system", SMALL_PAGES)
def test_pages_that_are_unmapped_while_clean_stay_clean(file_system: FileSystem) -> None:
    with populated(file_system) as (child, tracker):
        child.madvise(MADV_DONTNEED, 0, 2048)
        assert written(child, tracker) == []
        child.load(0, 2048)
        assert written(child, tracker) == []
        child.store(3)
        assert written(child, tracker) == [3]


def test_a_change_of_protection_changes_nothing() -> None:
    read, read_write = 1, 3
    with populated() as (child, tracker):
        child.store(5)
        child.call("mprotect", child.address(0), 64 * PAGE, read)
        with pytest.raises(MapChanged, match="r--s"):
            check_unmoved(child.pid, [child.block])
        child.call("mprotect", child.address(0), 64 * PAGE, read_write)
        child.store(6)
        assert written(child, tracker) == [5, 6]


def page_out(child: Tracked) -> None:
    """Have every page reclaimed; one that is looked at in that moment takes more than one try."""

    def reclaimed() -> bool:
        child.madvise(MADV_PAGEOUT, 0, child.block.npages)
        return child.smaps("Rss") == "0 kB"

    wait_until(reclaimed)


def test_pages_that_are_written_back_to_the_disk_and_reclaimed() -> None:
    with populated(ext4) as (child, tracker):
        child.store(100, 10)
        os.fsync(child.fd)
        page_out(child)
        assert written(child, tracker) == list(range(100, 110))
        child.load(0, 2048)
        assert written(child, tracker) == []
        child.store(200, 3)
        assert written(child, tracker) == [200, 201, 202]


@contextlib.contextmanager
def swap() -> Iterator[None]:
    """Some swap space, for a moment."""
    require(None if os.geteuid() == 0 else "only root can have swap space")
    with ext4() as directory:
        file = f"{directory}/swap"
        with open(file, "wb") as opened:
            os.posix_fallocate(opened.fileno(), 0, 64 << 20)
        os.chmod(file, 0o600)
        subprocess.run(["mkswap", file], check=True, capture_output=True)
        subprocess.run(["swapon", "--priority", "32767", file], check=True)
        try:
            yield
        finally:
            subprocess.run(["swapoff", file], check=True)


def test_pages_that_are_swapped_out() -> None:
    with swap(), populated() as (child, tracker):
        before = child.contents()
        child.store(100, 10)
        page_out(child)
        # neither clean, where written, nor a hole
        assert pages(tracker.uffd.collect()[NAME]).tolist() == list(range(100, 110))
        assert pages(tracker.holes.collect()[NAME]).tolist() == []
        assert tracker.data.count() == 2048
        child.load(0, 2048)
        assert written(child, tracker) == []
        page_out(child)
        child.store(200, 3)
        assert written(child, tracker) == [200, 201, 202]
        after = child.contents()
        changed = np.flatnonzero((before != after).any(axis=1)).tolist()
        assert changed == [*range(100, 110), 200, 201, 202]


# --- the map changes ------------------------------------------------------------------------------


def test_a_block_that_is_unmapped() -> None:
    with populated() as (child, tracker):
        child.call("munmap", child.hva, child.block.size)
        assert written_or_clean(tracker) == []  # the kernel has nothing to say about no memory
        with pytest.raises(MapChanged, match="no longer mapped") as caught:
            check_unmoved(child.pid, [child.block])
        assert caught.value.block == NAME


def test_a_block_with_a_piece_unmapped() -> None:
    with populated() as (child, tracker):
        child.store(10)
        child.call("munmap", child.address(8), 4 * PAGE)
        assert written_or_clean(tracker) == []  # page 10 is gone, and is not missed
        with pytest.raises(MapChanged, match=NAME):
            check_unmoved(child.pid, [child.block])


def test_a_block_that_shrinks() -> None:
    with populated() as (child, tracker):
        child.call("munmap", child.address(2000), 48 * PAGE)
        assert written_or_clean(tracker) == []
        with pytest.raises(MapChanged, match="only"):
            check_unmoved(child.pid, [child.block])


def test_a_block_that_moves() -> None:
    may_move_fixed = 1 | 2
    with populated() as (child, tracker):
        child.store(3)
        size, nowhere, anonymous = child.block.size, 0, 2 | 0x20
        place = child.call("mmap", 0, size, nowhere, anonymous, -1, 0)
        assert child.call("mremap", child.hva, size, size, may_move_fixed, place) == place
        assert written_or_clean(tracker) == []
        with pytest.raises(MapChanged, match="moved from"):
            check_unmoved(child.pid, [child.block])


def test_a_block_that_is_mapped_anew_at_the_same_place() -> None:
    read_write, shared_fixed = 3, 1 | 0x10
    with populated() as (child, tracker):
        child.store(3)
        again = child.call(
            "mmap", child.hva, child.block.size, read_write, shared_fixed, child.fd, 0
        )
        assert again == child.hva
        check_unmoved(child.pid, [child.block])  # it looks the same,
        with pytest.raises(SourceError, match="PAGEMAP_SCAN"):  # but nobody tracks it
            tracker.uffd.collect()


def test_a_file_that_shrinks() -> None:
    with populated() as (child, tracker):
        child.call("ftruncate", child.fd, 2000 * PAGE)
        with pytest.raises(SourceError, match="shorter"):
            tracker.collect()


def test_the_page_tables_of_a_dead_process_look_clean() -> None:
    """Or cannot be looked at: which of the two is a matter of when its memory goes."""
    with populated() as (child, tracker):
        child.store(3)
        child.kill()
        with contextlib.suppress(SourceError):
            assert written_or_clean(tracker) == []  # page 3 was written, and nobody knows
        with pytest.raises((MapChanged, OSError)):
            check_unmoved(child.pid, [child.block])
        child.reap()
        with contextlib.suppress(SourceError):
            assert written_or_clean(tracker) == []
        with pytest.raises(OSError, match="No such"):
            check_unmoved(child.pid, [child.block])


def written_or_clean(tracker: Tracker) -> list[int]:
    """What write-protection reports where nobody checks that there is anything to protect."""
    return list(pages(tracker.uffd.collect()[NAME]).tolist())


# --- somebody else's userfaultfd ------------------------------------------------------------------


def test_a_block_on_which_somebody_has_a_userfaultfd() -> None:
    with tracked() as child:
        theirs = acquire_userfaultfd(child.pid).fd
        try:
            uffd_api(theirs, userfaultfd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM)
            mode = userfaultfd.UFFDIO_REGISTER_MODE_WP
            uffd_register(theirs, child.address(100), 10 * PAGE, mode)
            tracker = Tracker(child)
            with pytest.raises(SourceError, match="somebody else has a userfaultfd") as caught:
                tracker.uffd.start()
            assert caught.value.source == tracker.uffd.name
            assert NAME in caught.value.reason
        finally:
            os.close(theirs)
        assert child.traces() == []
        with tracking(child) as tracker:
            child.store(3)
            assert written(child, tracker) == [3]
            rival = Tracker(child)
            with pytest.raises(SourceError, match="somebody else has a userfaultfd"):
                rival.uffd.start()
            child.store(4)
            assert written(child, tracker) == [4]  # the first goes on


# --- afterwards -----------------------------------------------------------------------------------


@each_file_system
def test_nothing_is_left_when_it_has_stopped(
    file_system: FileSystem, npages: int, page_size: int
) -> None:
    with populated(file_system, npages, page_size) as (child, tracker):
        assert "uw" in child.traces()
        assert len(child.protected()) == child.block.size // PAGE
        child.hammer("add", 2)
        tracker.collect()
        tracker.uffd.stop()
        assert child.traces() == []
        assert child.rest() > 0
        assert child.protected().tolist() == []
        child.store(0, npages)
        assert child.contents().any(axis=1).all()
        tracker.uffd.stop()


def test_nothing_is_left_when_the_tracker_is_killed() -> None:
    def track() -> None:
        while True:
            with tracking(child) as tracker:
                for _ in range(3):
                    tracker.collect()

    seconds = random.Random()
    with tracked() as child:
        child.hammer("add", 2)
        for attempt in range(12):
            tracker_process = multiprocessing.get_context("fork").Process(target=track)
            tracker_process.start()
            if attempt % 2:  # while it tracks; else at any moment, injection included
                wait_until(lambda: bool(child.traces()))
            time.sleep(seconds.uniform(0, 0.1))
            tracker_process.kill()
            tracker_process.join()
            wait_until(lambda: not injectors(child.pid))
            assert child.traces() == []
            assert child.protected().tolist() == []
            assert child.rest() > 0
            with tracking(child) as another:
                child.store(3)
                assert written(child, another) == [3]
            child.hammer("add", 2)
        child.rest()
