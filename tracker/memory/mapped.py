"""A block of another process's RAM, its file opened and mapped here."""

from __future__ import annotations

import contextlib
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from tracker.bits.bitmap import DirtyBitmap
from tracker.memory.extents import data_pages
from tracker.memory.ram import RamBlock, open_file
from tracker.syscalls import fault_in

NOWHERE: NDArray[np.uint8] = np.empty(0, np.uint8)


class Mapped:
    """One block of a process.

    To read a page through the mapping fills a hole. Pages are written through the file, so that a
    file system that is full is an error and no SIGBUS; but hugetlbfs takes no write(2): there they
    are written through the mapping.

    :ivar pid: the process
    :ivar block: the block
    :ivar fd: its file
    :ivar memory: all of it, ``uint8``, shape ``(block.size,)``; not to be written
    :ivar write_to: the same where it is written through the mapping, or nothing
    :ivar write_fd: the file to be written, or -1
    """

    def __init__(self, pid: int, block: RamBlock, *, writable: bool = False) -> None:
        """Open and map it.

        :param writable: pages will be written
        :raise OSError: its file cannot be opened or mapped
        :raise RamError: its file is not what it was
        """
        self.pid, self.block = pid, block
        self.fd = open_file(pid, block)
        through_mapping = writable and block.is_hugetlb
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if through_mapping else 0)
        try:
            self._map = mmap.mmap(self.fd, block.size, mmap.MAP_SHARED, protection)
        except BaseException:
            os.close(self.fd)
            raise
        self.memory: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self.write_to = self.memory if through_mapping else NOWHERE
        self.write_fd = self.fd if writable and not through_mapping else -1

    def data(self) -> DirtyBitmap:
        """Pages that hold data; see :func:`tracker.memory.extents.data_pages`.

        :raise OSError: the file cannot be asked
        :raise RamError: it became shorter
        """
        return data_pages(self.pid, self.block, self.fd)

    def fault_in(self, pages: DirtyBitmap) -> None:
        """Let the process map pages that were filled: its page tables tell data from holes.

        :raise OSError: the process is gone
        """
        addresses = self.block.hva + pages.pages() * self.block.page_size
        fault_in(self.pid, addresses.astype(np.uint64))

    def close(self) -> None:
        """Unmap it. No thread may use it any more. May be called again."""
        self.memory = self.write_to = NOWHERE
        # a view that an error's frames keep lives a little longer, and the mapping with it
        with contextlib.suppress(BufferError):
            self._map.close()
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = self.write_fd = -1
