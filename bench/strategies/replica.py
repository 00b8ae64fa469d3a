"""A copy of a guest's RAM that takes no more memory than the guest uses: holes stay holes."""

from __future__ import annotations

import mmap
import os

import numpy as np
from numpy.typing import NDArray

from tracker.bits.bitmap import DirtyBitmap
from tracker.memory.extents import data_pages
from tracker.memory.pagehash import Digests, selected_digests
from tracker.memory.pages import compare_pages, copy_pages, punch_pages
from tracker.memory.ram import RamBlock, open_file

_NOWHERE = np.empty(0, np.uint8)


class Replica:
    """The copy of one block; all of it is a hole at first.

    :raise OSError: the block's file, or memory, cannot be had
    :raise RamError: the process holds no descriptor of the file
    """

    def __init__(self, pid: int, block: RamBlock) -> None:
        self._pid, self._block = pid, block
        self._theirs = open_file(pid, block)
        self._ours = os.memfd_create("replica", os.MFD_CLOEXEC)
        os.truncate(self._ours, block.size)
        self._guest = self._mapped(self._theirs)
        self._copy = self._mapped(self._ours)
        self._present = DirtyBitmap.empty(block.npages)

    def _mapped(self, fd: int) -> NDArray[np.uint8]:
        return np.frombuffer(mmap.mmap(fd, self._block.size, prot=mmap.PROT_READ), np.uint8)

    def data(self) -> DirtyBitmap:
        """Pages of the guest that hold data."""
        return data_pages(self._pid, self._block, self._theirs)

    def bring(self, pages: DirtyBitmap) -> None:
        """Copy pages as they are now.

        :raise OSError: there is no memory left, or the guest's file cannot be asked
        """
        cleared = DirtyBitmap.empty(pages.npages)
        _, _, error = copy_pages(
            self._guest,
            _NOWHERE,
            self._ours,
            self._block.page_size,
            pages.words,
            self.data().words,
            self._present.words,
            cleared.words,
            0,
            len(pages.words),
        )
        error = error or punch_pages(self._ours, self._block.page_size, cleared.words)
        if error:
            raise OSError(error, f"copying RAM: {os.strerror(error)}")
        self._present = self._present - cleared

    def differing(self) -> DirtyBitmap:
        """Pages that the guest has otherwise by now; all are compared, byte by byte.

        :raise OSError: the guest's file cannot be asked
        """
        found = DirtyBitmap.empty(self._block.npages)
        compare_pages(
            self._guest,
            self._copy,
            self._block.page_size,
            self.data().words,
            self._present.words,
            found.words,
            0,
            len(found.words),
        )
        return found

    def digests(self, pages: DirtyBitmap, seed: int) -> Digests:
        """Digests of these pages of the copy, in their order (:mod:`tracker.memory.pagehash`)."""
        found: Digests = np.zeros(pages.count(), np.uint64)
        nwords = len(pages.words)
        present, size = self._present.words, self._block.page_size
        selected_digests(self._copy, size, pages.words, present, seed, found, 0, nwords)
        return found

    def close(self) -> None:
        """Let go of the memory. May be called again."""
        self._guest = self._copy = _NOWHERE  # nobody else has their mappings
        for fd in (self._theirs, self._ours):
            if fd >= 0:
                os.close(fd)
        self._theirs = self._ours = -1
