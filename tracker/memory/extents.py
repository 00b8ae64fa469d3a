"""Which pages of a RAM block's file hold data, and which are holes.

A hole reads as zeros, but reading it through a mapping allocates it. On tmpfs and on disk file
systems ``SEEK_DATA`` tells; hugetlbfs calls everything data (Linux: ``fs/hugetlbfs/inode.c`` uses
``default_llseek``), so there the page tables of QEMU are asked, which map every page that QEMU has
ever touched, and the file is asked whether these are all.
"""

from __future__ import annotations

import os
import time

import numpy as np

from tracker.abi import pagemap
from tracker.bits.bitmap import DirtyBitmap
from tracker.errors import RamError
from tracker.memory.pages import seek_data
from tracker.memory.ram import RamBlock
from tracker.syscalls import pagemap_scan

_REGIONS = 4096
_LOOKS = 10


def data_pages(pid: int, block: RamBlock, fd: int) -> DirtyBitmap:
    """Pages that hold data now; a page that is not in the result is a hole.

    :param fd: a descriptor of the block's file whose file position is ours to move
    :raise RamError: the file became shorter than the block, or holds huge pages that QEMU does not
        map
    :raise OSError: the file or the process cannot be asked
    """
    return _mapped(pid, block, fd) if block.is_hugetlb else _sought(block, fd)


def _sought(block: RamBlock, fd: int) -> DirtyBitmap:
    data = DirtyBitmap.empty(block.npages)
    error = seek_data(fd, block.npages, block.page_size, data.words)
    if error:
        if os.fstat(fd).st_size < block.size:
            raise RamError(block.name, "its file became shorter than the block")
        raise OSError(error, f"lseek(SEEK_DATA): {os.strerror(error)}")
    return data


def _mapped(pid: int, block: RamBlock, fd: int) -> DirtyBitmap:
    """Pages that QEMU maps, once these are all that the file holds.

    Only pages that are *present*: a page that is being migrated is "swapped" for a moment, but so
    is, for ever, a write-protected page that was discarded (Linux: PTE_MARKER_UFFD_WP), and
    PAGEMAP_SCAN does not tell one from the other. The number of pages in the file does.
    """
    for _ in range(_LOOKS):
        held = os.fstat(fd).st_blocks * 512 // block.page_size
        data = _present(pid, block)
        mapped = data.count()
        if held <= mapped:
            return data
        # pages are being touched, or migrated: only a lasting difference counts
        time.sleep(0.01)
    raise RamError(
        block.name,
        f"its file holds {held - mapped} huge pages that QEMU does not map: "
        "start QEMU on a new file",
    )


def _present(pid: int, block: RamBlock) -> DirtyBitmap:
    data = DirtyBitmap.empty(block.npages)
    regions = np.zeros((_REGIONS, 3), dtype=np.uint64)
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        at, end = block.hva, block.hva + block.size
        while at < end:
            count, walked = pagemap_scan(
                fd,
                at,
                end,
                regions,
                flags=0,
                category_mask=pagemap.PAGE_IS_PRESENT,
                return_mask=pagemap.PAGE_IS_PRESENT,
            )
            if walked <= at:
                raise RamError(block.name, f"the scan of its page tables stands at {at:#x}")
            data.set_regions(regions, count, block.hva, block.page_size)
            at = walked
    finally:
        os.close(fd)
    return data
