"""Discarded pages on the real kernel: write-protection is silent about them, the file is not."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest

from migrator.transport.local import LocalCopy
from tests.live.tracked import (
    HUGE,
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MADV_REMOVE,
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
from tests.pagesets import page_set
from tracker.bits.bitmap import DirtyBitmap
from tracker.errors import SourceError
from tracker.memory.pages import punch_pages
from tracker.memory.ram import RamBlock, open_file
from tracker.sources.holes import Holes
from tracker.warm import warm_up

pytestmark = pytest.mark.live

FileSystem = Callable[[], AbstractContextManager[str]]

ALL = [(tmpfs, 2048, PAGE), (ext4, 2048, PAGE), (hugetlbfs, 12, HUGE)]
SMALL_PAGES = [tmpfs, ext4]

each_file_system = pytest.mark.parametrize(
    ("file_system", "npages", "page_size"),
    [pytest.param(*case, id=case[0].__name__) for case in ALL],
)


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    warm_up()


def asked(tracker: Tracker) -> tuple[list[int], list[int]]:
    """What write-protection says, and then what the holes say."""
    written = tracker.uffd.collect()
    holes = tracker.holes.collect(written)
    return pages(written[NAME]).tolist(), pages(holes[NAME]).tolist()


def synchronised(child: Tracked, tracker: Tracker) -> Mirror:
    mirror = Mirror(child)
    tracker.collect()
    mirror.take(DirtyBitmap.full(child.block.npages), tracker.data)
    assert mirror.differing() == []
    return mirror


def discard(child: Tracked, first: int, count: int = 1) -> None:
    """As QEMU does it (softmmu/physmem.c, ram_block_discard_range)."""
    child.punch(first, count)
    if child.block.page_size == PAGE:
        child.madvise(MADV_DONTNEED, first, count)


@each_file_system
def test_only_pages_with_data_are_data(
    file_system: FileSystem, npages: int, page_size: int
) -> None:
    with tracked(file_system, npages, page_size) as child:
        child.store(3)
        child.store(npages - 1)
        with tracking(child) as tracker:
            assert pages(tracker.data).tolist() == [3, npages - 1]
            assert asked(tracker) == ([], [])
            child.store(5)
            assert asked(tracker) == ([5], [])
            assert pages(tracker.data).tolist() == [3, 5, npages - 1]


@each_file_system
def test_a_discarded_page_is_reported_by_the_file_alone(
    file_system: FileSystem, npages: int, page_size: int
) -> None:
    with tracked(file_system, npages, page_size) as child:
        child.store(0, npages)
        with tracking(child) as tracker:
            mirror = synchronised(child, tracker)
            for first, count in ((7, 1), (0, 2), (npages - 1, 1)):
                discard(child, first, count)
                # this is what the source is for
                assert mirror.differing() == list(range(first, first + count))
                written, holes = asked(tracker)
                assert written == []
                assert holes == list(range(first, first + count))
                mirror.take(DirtyBitmap.from_pages(npages, holes), tracker.data)
                assert mirror.differing() == []
            assert asked(tracker) == ([], [])


@each_file_system
def test_a_page_that_was_written_and_then_discarded(
    file_system: FileSystem, npages: int, page_size: int
) -> None:
    with tracked(file_system, npages, page_size) as child:
        child.store(0, npages)
        with tracking(child) as tracker:
            mirror = synchronised(child, tracker)
            child.store(4)
            discard(child, 4)
            mirror.take(tracker.collect(), tracker.data)
            assert mirror.differing() == []
            assert 4 not in pages(tracker.data)


@each_file_system
def test_a_page_that_was_discarded_and_written_again_is_reported_as_written(
    file_system: FileSystem, npages: int, page_size: int
) -> None:
    with tracked(file_system, npages, page_size) as child:
        child.store(0, npages)
        with tracking(child) as tracker:
            mirror = synchronised(child, tracker)
            discard(child, 8)
            child.store(8)
            written, holes = asked(tracker)
            assert (written, holes) == ([8], [])
            mirror.take(DirtyBitmap.from_pages(npages, written), tracker.data)
            assert mirror.differing() == []


@each_file_system
def test_a_page_that_is_read_after_it_was_reported_as_discarded(
    file_system: FileSystem, npages: int, page_size: int
) -> None:
    with tracked(file_system, npages, page_size) as child:
        child.store(0, npages)
        with tracking(child) as tracker:
            mirror = synchronised(child, tracker)
            discard(child, 8)
            mirror.take(tracker.collect(), tracker.data)
            child.load(8)
            mirror.take(tracker.collect(), tracker.data)
            assert mirror.differing() == []
            child.store(8)
            mirror.take(tracker.collect(), tracker.data)
            assert mirror.differing() == []


@each_file_system
def test_a_page_that_was_discarded_and_read_between_two_looks(
    file_system: FileSystem, npages: int, page_size: int
) -> None:
    # The read fills the hole with zeros. (On ext4 the page cache has it then, and the file not.)
    with tracked(file_system, npages, page_size) as child:
        child.store(0, npages)
        with tracking(child) as tracker:
            mirror = synchronised(child, tracker)
            discard(child, 8)
            child.load(8)
            mirror.take(tracker.collect(), tracker.data)
            assert mirror.differing() == []


def test_it_stays_as_it_was_if_nobody_looks_for_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_: Holes, block: RamBlock, pages: DirtyBitmap) -> DirtyBitmap:
        return DirtyBitmap.empty(block.npages)

    monkeypatch.setattr(Holes, "_zeros", nothing)
    with tracked(tmpfs, 2048) as child:
        child.store(0, 2048)
        with tracking(child) as tracker:
            mirror = synchronised(child, tracker)
            discard(child, 8)
            child.load(8)
            mirror.take(tracker.collect(), tracker.data)
            assert mirror.differing() == [8]


@each_file_system
def test_a_discard_is_not_outweighed_by_a_hole_that_is_read(
    file_system: FileSystem, npages: int, page_size: int
) -> None:
    # Reading a hole fills it and is not reported: the file holds as many pages as before.
    with tracked(file_system, npages, page_size) as child:
        child.store(0, npages // 2)
        with tracking(child) as tracker:
            child.store(npages - 1)
            mirror = synchronised(child, tracker)
            discard(child, 3)
            child.load(npages - 2)
            mirror.take(tracker.collect(), tracker.data)
            assert mirror.differing() == []


@pytest.mark.parametrize("file_system", SMALL_PAGES)
def test_a_page_whose_mapping_alone_is_gone_is_no_hole(file_system: FileSystem) -> None:
    # hugetlbfs forgets that such a page was written; QEMU does not do it there
    with tracked(file_system) as child:
        child.store(0, 2048)
        with tracking(child) as tracker:
            mirror = synchronised(child, tracker)
            child.store(5)
            child.madvise(MADV_DONTNEED, 4, 2)
            assert asked(tracker) == ([5], [])
            mirror.take(DirtyBitmap.from_pages(2048, [5]), tracker.data)
            assert mirror.differing() == []


@pytest.mark.parametrize("file_system", SMALL_PAGES)
def test_the_other_way_to_discard(file_system: FileSystem) -> None:
    with tracked(file_system) as child:
        child.store(0, 2048)
        with tracking(child) as tracker:
            child.madvise(MADV_REMOVE, 100, 50)
            assert asked(tracker) == ([], list(range(100, 150)))


def test_a_page_out_of_a_transparent_huge_page() -> None:
    with tracked(huge_tmpfs) as child:
        child.madvise(MADV_HUGEPAGE, 0, 2048)
        child.store(0, 2048)
        assert child.smaps("ShmemPmdMapped") != "0 kB"
        with tracking(child) as tracker:
            mirror = synchronised(child, tracker)
            child.store(700)  # its huge page is taken apart by the discard of a neighbour
            discard(child, 701)
            dirty = tracker.collect()
            assert {700, 701} <= set(pages(dirty).tolist())
            mirror.take(dirty, tracker.data)
            assert mirror.differing() == []


@each_file_system
def test_discards_while_pages_are_written_and_copied(
    file_system: FileSystem, npages: int, page_size: int
) -> None:
    with tracked(file_system, npages, page_size) as child:
        child.store(0, npages)
        with tracking(child) as tracker:
            mirror = synchronised(child, tracker)
            for _ in range(4):
                child.hammer("punch", 1)
                child.hammer("add", 1)
                for _ in range(5):
                    mirror.take(tracker.collect(), tracker.data)
                child.rest()
                mirror.take(tracker.collect(), tracker.data)
                assert mirror.differing() == []


def test_without_holes_discards_are_lost() -> None:
    # what the test before this one rests on
    with tracked() as child:
        child.store(0, 2048)
        with tracking(child) as tracker:
            for _ in range(10):
                mirror = synchronised(child, tracker)
                child.hammer("punch", 1)
                child.hammer("add_slowly", 1)
                for _ in range(3):
                    mirror.take(tracker.uffd.collect()[NAME], tracker.data)
                child.rest()
                mirror.take(tracker.uffd.collect()[NAME], tracker.data)
                if mirror.differing():
                    return
                child.store(0, 2048)
    pytest.fail("nobody looked for holes, and no discard was lost: then nothing is tested here")


def test_a_file_that_shrinks_is_an_error_and_no_hole() -> None:
    with tracked() as child:
        child.store(0, 2048)
        with tracking(child) as tracker:
            child.call("ftruncate", child.fd, 2000 * PAGE)
            with pytest.raises(SourceError, match="shorter") as caught:
                asked(tracker)
            assert caught.value.source == tracker.holes.name


def test_pages_that_are_discarded_while_they_are_copied() -> None:
    """Half a page of old content and half a page of zeros must not stay at the destination."""
    npages = 2048
    with tracked(tmpfs, npages) as child, tracked(tmpfs, npages) as other, tracking(child) as both:
        copy = LocalCopy(child.pid, [child.block], other.pid, [other.block])
        fd = open_file(child.pid, child.block)

        def discard_some(seed: int) -> None:
            some = np.random.default_rng(seed).permutation(npages)[: npages // 2]
            for part in np.split(np.sort(some), 8):
                words = DirtyBitmap.from_pages(npages, part).words
                assert punch_pages(fd, PAGE, words) == 0

        async def trial(seed: int) -> int:
            child.store(0, npages)
            dirty = both.collect()
            await asyncio.gather(
                asyncio.to_thread(discard_some, seed),
                copy.send(page_set({NAME: dirty}), page_set({NAME: both.data})),
            )
            await copy.send(page_set({NAME: both.collect()}), page_set({NAME: both.data}))
            return (await copy.compare()).mismatched

        async def run() -> list[int]:
            await copy.open()
            try:
                return [await trial(seed) for seed in range(60)]
            finally:
                await copy.close()

        try:
            assert asyncio.run(run()) == [0] * 60
        finally:
            os.close(fd)
