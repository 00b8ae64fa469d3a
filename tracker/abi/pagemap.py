"""Which pages were written: the PAGEMAP_SCAN ioctl of ``include/uapi/linux/fs.h``.

Issued on ``/proc/PID/pagemap``. Since Linux commit 52526ca7fdb9 ("fs/proc/task_mmu: implement
IOCTL to get and optionally clear info about PTEs", in v6.7).
"""

from __future__ import annotations

import ctypes

from tracker.abi.ioctl import iowr

# Categories of a page, in the masks of struct pm_scan_arg and in struct page_region.
PAGE_IS_WPALLOWED = 1 << 0
PAGE_IS_WRITTEN = 1 << 1
PAGE_IS_FILE = 1 << 2
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_PFNZERO = 1 << 5
PAGE_IS_HUGE = 1 << 6
PAGE_IS_SOFT_DIRTY = 1 << 7

PM_SCAN_WP_MATCHING = 1 << 0  # write-protect the pages that are reported
PM_SCAN_CHECK_WPASYNC = 1 << 1  # EPERM where a page is not registered for asynchronous tracking

# Bits of the 64-bit entries that read(2) returns, one a page (fs/proc/task_mmu.c; described in
# Documentation/admin-guide/mm/pagemap.rst).
PM_SOFT_DIRTY = 1 << 55  # in v3.11
PM_UFFD_WP = 1 << 57  # in v5.14
PM_SWAP = 1 << 62
PM_PRESENT = 1 << 63

CLEAR_REFS_SOFT_DIRTY = 4  # written to /proc/PID/clear_refs, as decimal digits


class page_region(ctypes.Structure):
    """One run of pages of the same categories: addresses in bytes, ``end`` exclusive."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("categories", ctypes.c_uint64),
    )


class pm_scan_arg(ctypes.Structure):
    """Argument of PAGEMAP_SCAN: addresses in bytes, ``vec_len`` in regions."""

    _fields_ = (
        ("size", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("walk_end", ctypes.c_uint64),
        ("vec", ctypes.c_uint64),
        ("vec_len", ctypes.c_uint64),
        ("max_pages", ctypes.c_uint64),
        ("category_inverted", ctypes.c_uint64),
        ("category_mask", ctypes.c_uint64),
        ("category_anyof_mask", ctypes.c_uint64),
        ("return_mask", ctypes.c_uint64),
    )


PAGEMAP_SCAN = iowr(ord("f"), 16, pm_scan_arg)
