"""What ``/proc/PID/pagemap`` says page by page, and what ``/proc/PID/clear_refs`` forgets.

The bit that matters here is *soft-dirty*: a write sets it in the page table, ``clear_refs`` takes
it away from all of a process (Linux: ``Documentation/admin-guide/mm/soft-dirty.rst``, commit
0f8975ec4db2, in v3.11, with CONFIG_MEM_SOFT_DIRTY). A kernel without it takes both and reports
nothing, ever: hence :func:`soft_dirty_missing`.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from tracker.abi import pagemap

_ENTRY_BYTES = 8
_CHUNK_BYTES = 1 << 20
_BASE_PAGE = os.sysconf("SC_PAGE_SIZE")


def entries(fd: int, address: int, npages: int) -> NDArray[np.uint64]:
    """The page table entries of an address range, as ``PM_*`` bits.

    :param fd: an open ``/proc/PID/pagemap``
    :param address: of the first page, in that process
    :param npages: base pages, also where the memory has huge ones
    :return: shape ``(npages,)``
    :raise OSError: the process is gone, or its address space ends before
    """
    found = np.empty(npages, np.uint64)
    into = found.view(np.uint8).data
    at, offset = 0, address // _BASE_PAGE * _ENTRY_BYTES
    while at < len(into):
        count = os.preadv(fd, [into[at : at + _CHUNK_BYTES]], offset + at)
        if not count:
            raise OSError(f"pagemap ends {(len(into) - at) // _ENTRY_BYTES} pages too early")
        at += count
    return found


def clear_soft_dirty(fd: int) -> None:
    """Take the soft-dirty bit from every page of a process.

    :param fd: an open ``/proc/PID/clear_refs``
    :raise OSError: it cannot be
    """
    os.write(fd, b"%d" % pagemap.CLEAR_REFS_SOFT_DIRTY)


def soft_dirty_missing() -> str:
    """Try soft-dirty on a page of our own; as a side effect all of our process is clean after it.

    :return: what is wrong with it in this kernel, or nothing
    """
    try:
        with (
            open("/proc/self/pagemap", "rb", buffering=0) as table,
            open("/proc/self/clear_refs", "wb", buffering=0) as clear,
        ):
            page = mmap.mmap(-1, _BASE_PAGE)
            address = ctypes.addressof(ctypes.c_char.from_buffer(page))
            page[0] = 1
            clear_soft_dirty(clear.fileno())
            clean = int(entries(table.fileno(), address, 1)[0])
            page[0] = 2
            written = int(entries(table.fileno(), address, 1)[0])
    except OSError as error:
        return f"not in this kernel: {error.strerror or error}"
    if not written & pagemap.PM_SOFT_DIRTY:
        return "not in this kernel: a page that was written is not soft-dirty"
    if clean & pagemap.PM_SOFT_DIRTY:
        return "not in this kernel: clear_refs leaves a page soft-dirty"
    return ""
