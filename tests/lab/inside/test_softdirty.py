"""Soft-dirty bits as a source, on a kernel that has them: nothing is lost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from tests.live.tracked import MADV_DONTNEED, NAME, Mirror, Tracked, pages, tmpfs, tracked
from tracker.bits.bitmap import DirtyBitmap
from tracker.sources import softdirty
from tracker.sources.holes import Holes
from tracker.sources.pagemap import clear_soft_dirty
from tracker.sources.softdirty import SoftDirty

NPAGES = 1024


@contextlib.contextmanager
def watched(npages: int = NPAGES, *, populate: bool = True) -> Iterator[tuple[Tracked, SoftDirty]]:
    with tracked(tmpfs, npages) as child:
        if populate:
            child.store(0, npages)
        source = SoftDirty(child.pid, [child.block])
        source.start()
        try:
            yield child, source
        finally:
            source.stop()


def reported(source: SoftDirty) -> list[int]:
    return list(pages(source.collect()[NAME]).tolist())


def test_each_written_page_once_and_no_other() -> None:
    with watched() as (child, source):
        assert reported(source) == []
        for page in (0, 1, 63, 64, 511, 512, NPAGES - 1):
            child.store(page)
        assert reported(source) == [0, 1, 63, 64, 511, 512, NPAGES - 1]
        assert reported(source) == []
        child.load(0, NPAGES)
        assert reported(source) == []
        child.store(64)
        assert reported(source) == [64]


def test_writes_to_holes() -> None:
    with watched(populate=False) as (child, source):
        assert reported(source) == []
        child.store(3, 2)
        child.load(9, 2)
        child.store(10)
        found = reported(source)
        # a hole that was read may be reported
        assert {3, 4, 10} <= set(found) <= {3, 4, 9, 10}
        assert reported(source) == []


def test_pages_that_are_not_mapped_are_reported() -> None:
    """Nothing is known of them: their entries are gone, and the bits with them."""
    with watched() as (child, source):
        child.store(7)
        child.madvise(MADV_DONTNEED, 6, 3)
        assert reported(source) == [6, 7, 8]
        assert reported(source) == [6, 7, 8]
        child.load(6, 3)
        assert not {6, 7, 8}.intersection(reported(source))


@pytest.mark.parametrize("stopped", [True, False])
def test_a_write_between_reading_and_clearing(
    stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the next report because the process stands still; without that it is lost."""
    writer: list[threading.Thread] = []

    def write_and_clear(fd: int) -> None:
        writer.append(threading.Thread(target=child.store, args=(5,)))
        writer[0].start()
        writer[0].join(0.5 if stopped else 60)
        assert writer[0].is_alive() == stopped
        clear_soft_dirty(fd)

    with watched() as (child, source):
        if not stopped:
            monkeypatch.setattr(
                softdirty, "frozen", lambda pid, timeout_s: contextlib.nullcontext()
            )
        before = child.contents()
        monkeypatch.setattr(softdirty, "clear_soft_dirty", write_and_clear)
        assert reported(source) == []
        monkeypatch.setattr(softdirty, "clear_soft_dirty", clear_soft_dirty)
        writer[0].join(60)
        assert (child.contents() != before).any(axis=1).nonzero()[0].tolist() == [5]
        assert reported(source) == ([5] if stopped else [])


@pytest.mark.parametrize("kind", ["add", "copy"])
def test_no_write_is_lost(kind: str) -> None:
    with tracked(tmpfs, NPAGES) as child:
        child.hammer(kind, 1)  # on both processors it would leave none for who stops it
        source = SoftDirty(child.pid, [child.block], timeout_s=60)
        holes = Holes(child.pid, [child.block])
        source.start()
        holes.start()
        mirror = Mirror(child)
        mirror.take(DirtyBitmap.full(NPAGES), holes.data[NAME])
        rounds, deadline = 0, time.monotonic() + 3
        while rounds < 3 or time.monotonic() < deadline:
            dirty = source.collect()[NAME]
            dirty |= holes.collect()[NAME]
            mirror.take(dirty, holes.data[NAME])
            rounds += dirty.any()
        total = child.rest()
        dirty = source.collect()[NAME]
        dirty |= holes.collect()[NAME]
        mirror.take(dirty, holes.data[NAME])
        assert mirror.differing() == []
        source.stop()
        holes.stop()
    if kind == "add":
        assert int(mirror.copy.view(np.uint64).sum()) == total > 0
