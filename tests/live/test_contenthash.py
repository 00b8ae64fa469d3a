"""Changes found by reading the memory, on the real kernel: whoever made them, and no others."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest

from tests.conftest import require
from tests.live.copying import Copy, copying
from tests.live.tracked import (
    HUGE,
    NAME,
    PAGE,
    Tracked,
    ext4,
    huge_tmpfs,
    hugetlbfs,
    pages,
    tmpfs,
    tracked,
)
from tracker.bits.bitmap import DirtyBitmap
from tracker.errors import BitmapError, SourceError
from tracker.sources.contenthash import ContentHash
from tracker.warm import warm_up

pytestmark = pytest.mark.live

FileSystem = Callable[[], AbstractContextManager[str]]


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    warm_up()


def source_of(child: Tracked) -> ContentHash:
    return ContentHash(child.pid, [child.block])


@contextmanager
def synchronised(npages: int = 256, fds: Sequence[int] = ()) -> Iterator[tuple[Tracked, Copy]]:
    with tracked(npages=npages, fds=fds) as child:
        child.store(0, npages)
        with copying(child, source_of(child)) as copy:
            copy.take(copy.collect())
            yield child, copy


# --- nothing is lost ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file_system", "npages", "page_size"),
    [
        pytest.param(tmpfs, 8100, PAGE, id="tmpfs"),
        pytest.param(ext4, 4096, PAGE, id="ext4"),
        pytest.param(huge_tmpfs, 4096, PAGE, id="transparent huge pages"),
        pytest.param(hugetlbfs, 12, HUGE, id="hugetlbfs"),
    ],
)
def test_nothing_is_lost(file_system: FileSystem, npages: int, page_size: int) -> None:
    with tracked(file_system, npages, page_size) as child:
        child.store(0, npages // 2)
        with copying(child, source_of(child)) as copy:
            child.hammer("add", 2)
            child.hammer("copy", 1)
            child.hammer("punch", 1)
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                copy.take(copy.collect())
            child.rest()
            copy.take(copy.collect())
            assert copy.differing() == []
            assert not copy.collect().any()


def test_copying_before_collecting_loses_writes() -> None:
    with synchronised(4096) as (child, copy):
        for _ in range(10):
            child.hammer("add_slowly", 3)
            for _ in range(3):
                too_early = child.contents()
                time.sleep(0.01)
                dirty = copy.collect()
                digests = copy.digests(dirty, child.contents())  # a second look, not the copy
                copy.mirror.copy[pages(dirty)] = too_early[pages(dirty)]
                copy.source.copies.copied(NAME, dirty, digests)
            child.rest()
            copy.take(copy.collect())
            if copy.differing():
                return
    pytest.fail("copying before collecting lost nothing: then this could not be noticed either")


def write(child: Tracked, byte: int) -> None:
    assert child.tell("store", 9, 1, 1, byte) == 0


def test_a_page_that_is_another_for_as_long_as_it_is_copied() -> None:
    with synchronised() as (child, copy):
        write(child, 2)
        dirty = copy.collect()
        assert pages(dirty).tolist() == [9]
        write(child, 3)
        copy.take(dirty)
        write(child, 2)  # as it was when it was collected
        assert copy.differing() == [9]
        dirty = copy.collect()
        assert pages(dirty).tolist() == [9]
        copy.take(dirty)
        assert copy.differing() == []
        assert not copy.collect().any()


def test_it_is_lost_if_the_digests_are_not_of_the_copy() -> None:
    # why there is copied(): the same with the digests that the collection itself has taken
    with synchronised() as (child, copy):
        write(child, 2)
        dirty = copy.collect()
        digests = copy.digests(dirty, child.contents())
        write(child, 3)
        copy.take(dirty)
        copy.source.copies.copied(NAME, dirty, digests)
        write(child, 2)
        assert not copy.collect().any()
        assert copy.differing() == [9]


def test_a_page_that_is_as_before_while_its_copy_is_on_its_way() -> None:
    with synchronised() as (child, copy):
        write(child, 1)
        copy.take(copy.collect())
        write(child, 2)
        dirty = copy.collect()
        copy.mirror.take(dirty, copy.data())  # on its way: nobody has told of it
        write(child, 1)
        dirty = copy.collect()
        assert pages(dirty).tolist() == [9]
        copy.take(dirty)
        assert copy.differing() == []


def test_a_page_that_changes_back_is_not_sent_again() -> None:
    with synchronised() as (child, copy):
        write(child, 2)
        copy.take(copy.collect())
        write(child, 3)
        write(child, 2)
        assert not copy.collect().any()
        assert copy.differing() == []


# --- what is reported -----------------------------------------------------------------------------


def test_every_page_until_its_copy_is_told_of() -> None:
    with tracked(npages=100) as child, copying(child, source_of(child)) as copy:
        child.store(0, 50)
        assert copy.collect().count() == 100
        assert copy.collect().count() == 100  # nobody has copied it
        copy.take(DirtyBitmap.from_pages(100, [*range(0, 100, 2)]))
        assert pages(copy.collect()).tolist() == [*range(1, 100, 2)]
        child.store(4)
        assert pages(copy.collect()).tolist() == sorted([4, *range(1, 100, 2)])


def test_holes_are_not_read() -> None:
    with tracked(npages=4096) as child, copying(child, source_of(child)) as copy:
        child.store(4000)
        copy.take(copy.collect())
        assert not copy.collect().any()
        assert os.fstat(child.fd).st_blocks * 512 == PAGE


def test_what_nobody_else_reports() -> None:
    with open(sys.executable, "rb") as file, synchronised(fds=[file.fileno()]) as (child, copy):
        os.pwrite(child.fd, b"x" * PAGE, 5 * PAGE)
        child.punch(7)
        assert pages(copy.collect()).tolist() == [5, 7]
        copy.take(copy.collect())
        assert copy.differing() == []
        pinned = child.tell("pin", 100, 16)
        require(None if pinned == 0 else f"no io_uring buffers: {os.strerror(-pinned)}")
        assert child.tell("dma", file.fileno(), 104) == PAGE
        assert pages(copy.collect()).tolist() == [104]


# --- errors ---------------------------------------------------------------------------------------


def test_what_cannot_be_told() -> None:
    with synchronised() as (child, copy):
        copies = copy.source.copies
        with pytest.raises(BitmapError, match="2 digests of 1 pages"):
            copies.copied(NAME, DirtyBitmap.from_pages(256, [3]), np.zeros(2, np.uint64))
        with pytest.raises(BitmapError, match="a bitmap of 255 pages, of 256"):
            copies.copied(NAME, DirtyBitmap.from_pages(255, [3]), np.zeros(1, np.uint64))
        child.call("ftruncate", child.fd, 200 * PAGE)
        with pytest.raises(SourceError, match="shorter") as caught:
            copy.collect()
        assert caught.value.source == "content-hash"


def test_nothing_is_left_when_it_has_stopped() -> None:
    with tracked() as child:
        before = set(os.listdir("/proc/self/fd"))
        source = ContentHash(child.pid, [child.block])
        source.stop()
        source.start()
        source.collect()
        source.stop()
        source.stop()
        assert set(os.listdir("/proc/self/fd")) == before
        with pytest.raises(SourceError, match="not started"):
            source.collect()
        child.kill()
        child.reap()
        with pytest.raises(SourceError):
            source.start()


# --- where nobody copies --------------------------------------------------------------------------


def test_what_was_seen_last_stands_for_the_copy() -> None:
    with tracked() as child:
        child.store(0, 64)
        source = ContentHash(child.pid, [child.block], copied=False)
        source.start()
        try:
            assert not source.collect()[NAME].any()
            for first, count, step in ((5, 1, 1), (63, 2, 100), (5, 1, 1)):
                child.store(first, count, step)
                found = pages(source.collect()[NAME]).tolist()
                assert found == list(range(first, first + count * step, step))
                assert not source.collect()[NAME].any()
        finally:
            source.stop()


def test_a_copy_that_is_awaited_is_not_what_was_seen_last() -> None:
    """Else a page would be clean without having been copied."""
    with synchronised() as (child, copy):
        child.store(5)
        assert pages(copy.collect()).tolist() == [5]
        assert pages(copy.collect()).tolist() == [5]
