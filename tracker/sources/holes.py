"""Pages that were discarded: what no write-protection reports.

A balloon, free page reporting and virtio-mem give pages back with ``fallocate(PUNCH_HOLE)`` on the
backing file. The page then reads as zeros and the page tables call it clean, so a copy of its old
content elsewhere would go stale unseen. The file itself knows: there is a hole now.

That somebody discarded something is told by inotify: fallocate(2) is a modification, and a store
through a mapping is none. Without one, there is no new hole to look for.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import numpy as np

from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.errors import RamError, SourceError
from tracker.memory.extents import data_pages
from tracker.memory.pages import zero_pages
from tracker.memory.ram import RamBlock, open_file
from tracker.syscalls import was_modified, watch_modifications


class Holes:
    """Pages that held data at one look and are holes at the next.

    :ivar data: the pages that held data at the last look. Whoever reads the blocks
        has to leave the others alone: reading a hole through a mapping fills it.
    """

    name = "holes"
    exact = True

    def __init__(self, pid: int, blocks: Sequence[RamBlock], *, reads: bool = True) -> None:
        """Prepare; nothing is done yet.

        :param reads: look into pages as well, at memory speed, for those that were discarded and
            read since. Who copies pages needs it; who counts them would count all that hold zeros.
        """
        self._pid = pid
        self._blocks = tuple(blocks)
        self._reads = reads
        self._fds: dict[str, int] = {}
        self._watcher = -1
        self.data = PageSet.empty(blocks)

    def start(self) -> None:
        """Look for the first time.

        :raise SourceError: a file cannot be opened, or does not tell its holes
        """
        try:
            for block in self._blocks:
                self._fds[block.name] = open_file(self._pid, block)
            self._watcher = watch_modifications(list(self._fds.values()))
            self.data = self._look()
        except (OSError, RamError) as error:
            self.stop()
            raise SourceError(self.name, str(error)) from error

    def collect(self, written: PageSet | None = None) -> PageSet:
        """Pages that were discarded since the last call.

        These are the pages that became holes. If any page was discarded at all, they are also those
        that are full of zeros and were not written: a page that is discarded and then *read* is no
        hole any more, and its reading is no write that anybody reports. (Whoever copies the block
        through a mapping may be that reader, and have half of the old content by then.)

        Looking takes 13 ms for each GiB that holds data, too long for a guest that stands still. It
        is not needed where no file was modified: what holds data now held it before, or was written
        since. (Or was read, and is zeros as it was before.)

        :param written: all pages written since the last call, reported *before* this
            call; a look is then taken only if a file was modified
        :raise SourceError: a file could not be asked
        """
        modified = self._modified()
        before = self.data
        if written is not None and not modified:
            self.data = before | written
            return PageSet.empty(self._blocks)
        try:
            self.data = self._look()
        except (OSError, RamError) as error:
            raise SourceError(self.name, str(error)) from error
        discarded = before - self.data
        if modified and self._reads:
            kept = before & self.data
            if written is not None:
                kept -= written
            for block in self._blocks:
                discarded[block.name].add(self._zeros(block, kept[block.name]))
        return discarded

    def _look(self) -> PageSet:
        return PageSet(
            self._blocks,
            {b.name: data_pages(self._pid, b, self._fds[b.name]) for b in self._blocks},
        )

    def data_without_process(self) -> PageSet:
        """Pages that hold data now, where the process has ended; all of those of hugetlbfs.

        :raise SourceError: a file does not tell its holes
        """
        try:
            self.data = PageSet(
                self._blocks,
                {
                    block.name: DirtyBitmap.full(block.npages)
                    if block.is_hugetlb
                    else data_pages(self._pid, block, self._fds[block.name])
                    for block in self._blocks
                },
            )
        except (OSError, RamError) as error:
            raise SourceError(self.name, str(error)) from error
        return self.data

    def _zeros(self, block: RamBlock, pages: DirtyBitmap) -> DirtyBitmap:
        # If a page is discarded just now, looking at it fills it: then it is zeros, and reported.
        zeros = DirtyBitmap.empty(block.npages)
        with mmap.mmap(self._fds[block.name], block.size, mmap.MAP_SHARED, mmap.PROT_READ) as ram:
            memory = np.frombuffer(ram, np.uint8)
            zero_pages(memory, block.page_size, pages.words, zeros.words)
            del memory
        return zeros

    def _modified(self) -> bool:
        """Tell whether any of the files was modified by a system call since the last call."""
        try:
            return was_modified(self._watcher)
        except OSError as error:
            raise SourceError(self.name, f"inotify: {error}") from error

    def stop(self) -> None:
        """Close the files. May be called again."""
        while self._fds:
            os.close(self._fds.popitem()[1])
        if self._watcher >= 0:
            os.close(self._watcher)
        self._watcher = -1
