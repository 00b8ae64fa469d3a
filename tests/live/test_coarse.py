"""Coarse sources whose reports are compared with what was copied: nothing is lost, or too much."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pytest

from tests.live.copying import Copy, copying
from tests.live.tracked import (
    MADV_HUGEPAGE,
    NAME,
    PAGE,
    Source,
    Tracked,
    huge_tmpfs,
    pages,
    tmpfs,
    tracked,
)
from tests.tracker.targets import wait_until
from tracker.answered.uffdsync import UffdSync
from tracker.bits.bitmap import DirtyBitmap
from tracker.errors import SourceError
from tracker.sources.coarse import Compared
from tracker.sources.uffd import UffdAsync
from tracker.warm import warm_up

pytestmark = pytest.mark.live

FileSystem = Callable[[], AbstractContextManager[str]]

NPAGES = 4096
COARSE = [
    pytest.param(huge_tmpfs, UffdAsync, id="async, transparent huge pages"),
    pytest.param(tmpfs, partial(UffdSync, chunk=64 << 10), id="sync, 64 KiB"),
    pytest.param(tmpfs, partial(UffdSync, chunk=2 << 20), id="sync, 2 MiB"),
]


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    warm_up()


@contextmanager
def memory(file_system: FileSystem) -> Iterator[Tracked]:
    with tracked(file_system, NPAGES) as child:
        if file_system is huge_tmpfs:
            child.madvise(MADV_HUGEPAGE, 0, NPAGES)
        child.store(0, NPAGES)
        if file_system is huge_tmpfs:
            wait_until(lambda: child.smaps("ShmemPmdMapped") != "0 kB")
        yield child


def compared(child: Tracked, source: Source) -> Compared:
    return Compared(source(child.pid, [child.block]), child.pid, [child.block])


def synchronise(copy: Copy) -> None:
    copy.take(DirtyBitmap.full(NPAGES))
    copy.take(copy.collect())


@pytest.mark.parametrize(("file_system", "source"), COARSE)
def test_the_source_is_coarse_and_the_report_is_not(
    file_system: FileSystem, source: Source
) -> None:
    with memory(file_system) as child:
        alone = source(child.pid, [child.block])
        alone.start()
        child.store(700)
        assert alone.collect()[NAME].count() >= 16
        alone.stop()
        with copying(child, compared(child, source)) as copy:
            synchronise(copy)
            for first, count, step in ((700, 1, 1), (0, 2, NPAGES - 1), (3, 400, 9), (0, 0, 1)):
                child.store(first, count, step)
                dirty = copy.collect()
                assert pages(dirty).tolist() == [*range(NPAGES)][first::step][:count]
                copy.take(dirty)
                assert copy.differing() == []


@pytest.mark.parametrize(("file_system", "source"), COARSE)
def test_nothing_is_lost(file_system: FileSystem, source: Source) -> None:
    with memory(file_system) as child:
        child.hammer("add", 2)
        with copying(child, compared(child, source)) as copy:
            copy.take(DirtyBitmap.full(NPAGES))
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                copy.take(copy.collect())
            child.rest()
            copy.take(copy.collect())
            assert copy.differing() == []
            assert not copy.collect().any()


def test_with_digests_that_are_not_of_the_copies_it_loses_writes() -> None:
    with memory(tmpfs) as child, copying(child, compared(child, UffdSync)) as copy:
        for _ in range(20):
            synchronise(copy)
            child.hammer("flip", 2)
            for _ in range(3):
                dirty = copy.collect()
                digests = copy.digests(dirty, child.contents())
                copy.mirror.take(dirty, copy.data())
                copy.source.copies.copied(NAME, dirty, digests)
            child.rest()
            copy.take(copy.collect())
            if copy.differing():
                return
    pytest.fail("nothing was lost: then this could not be noticed either")


def test_pages_that_change_between_two_contents_are_not_lost() -> None:
    with memory(tmpfs) as child, copying(child, compared(child, UffdSync)) as copy:
        synchronise(copy)
        for _ in range(20):
            child.hammer("flip", 2)
            for _ in range(3):
                copy.take(copy.collect())
            child.rest()
            copy.take(copy.collect())
            assert copy.differing() == []


def test_a_write_of_what_was_there_is_not_sent() -> None:
    with memory(tmpfs) as child, copying(child, compared(child, UffdSync)) as copy:
        synchronise(copy)
        byte = int(child.contents()[9][9])
        assert child.tell("store", 9, 1, 1, byte) == 0
        assert not copy.collect().any()


def test_a_page_that_was_reported_is_reported_again_until_its_copy_is_told_of() -> None:
    with memory(tmpfs) as child, copying(child, compared(child, UffdSync)) as copy:
        synchronise(copy)
        before = int(child.contents()[9][9])
        child.store(9)
        assert pages(copy.collect()).tolist() == [9]
        assert child.tell("store", 9, 1, 1, before) == 0  # as its last known copy, while one is due
        assert pages(copy.collect()).tolist() == [9]


def test_holes_in_a_chunk_are_not_filled() -> None:
    with tracked(npages=512) as child:
        child.store(17)
        with copying(child, compared(child, UffdSync)) as copy:
            copy.take(DirtyBitmap.full(512))
            child.store(18)
            assert pages(copy.collect()).tolist() == [18]
            assert os.fstat(child.fd).st_blocks * 512 == 2 * PAGE


def test_where_nobody_copies_what_was_reported_last_stands_for_the_copy() -> None:
    with memory(tmpfs) as child:
        uffd = UffdSync(child.pid, [child.block])
        source = Compared(uffd, child.pid, [child.block], copied=False)
        source.start()
        try:
            assert not source.collect()[NAME].any()
            for page in (700, 701, 700):
                child.store(page)
                assert pages(source.collect()[NAME]).tolist() == [page]
                assert not source.collect()[NAME].any()
        finally:
            source.stop()


def test_errors_and_ends() -> None:
    with tracked() as child:
        before = set(os.listdir("/proc/self/fd"))
        source = compared(child, UffdSync)
        assert source.name == "uffd-sync, compared"
        source.stop()
        source.start()
        rival = compared(child, UffdSync)
        with pytest.raises(SourceError, match="somebody else has a userfaultfd"):
            rival.start()
        source.collect()
        source.stop()
        assert set(os.listdir("/proc/self/fd")) == before
        assert child.traces() == []
        with pytest.raises(SourceError):
            source.collect()
