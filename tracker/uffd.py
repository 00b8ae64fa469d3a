"""CPU writes, page by page: userfaultfd write-protection in async mode, read with PAGEMAP_SCAN.

In async mode (Linux: ``UFFD_FEATURE_WP_ASYNC``, commit d61ea1cb0095) nobody hears of a write
fault: the kernel lifts the protection of the page, lets the writer go on, and the page counts as
*written* until it is protected again. ``PAGEMAP_SCAN`` (commit 52526ca7fdb9, in
``fs/proc/task_mmu.c``) lists the written pages of an address range and protects them again in the
same walk, so that no write falls between the two.

The userfaultfd belongs to QEMU's address space and is held by this process alone: when we end,
however we end, the kernel drops the registration and QEMU runs on unprotected.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import numpy as np

from tracker.abi import pagemap, userfaultfd
from tracker.bitmap import DirtyBitmap
from tracker.errors import SourceError
from tracker.inject import acquire_userfaultfd
from tracker.ram import RamBlock
from tracker.syscalls import pagemap_scan, uffd_api, uffd_register

FEATURES = (
    userfaultfd.UFFD_FEATURE_WP_ASYNC
    | userfaultfd.UFFD_FEATURE_WP_UNPOPULATED
    | userfaultfd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | userfaultfd.UFFD_FEATURE_PAGEFAULT_FLAG_WP
)
_REGIONS = 65536  # 1.5 MiB of vector; the kernel itself works in batches of 512


class UffdAsync:
    """Writes through the page tables of one process: vCPUs, device emulation, vhost.

    Not seen: writes through pinned pages (VFIO, io_uring buffers), through other mappings of the
    same file, and pages that are discarded (see :mod:`tracker.holes`).
    """

    name = "uffd"
    exact = True

    def __init__(self, pid: int, blocks: Sequence[RamBlock]) -> None:
        self._pid = pid
        self._blocks = tuple(blocks)
        self._uffd = -1
        self._pagemap = -1
        self._regions = np.zeros((_REGIONS, 3), dtype=np.uint64)

    def start(self) -> None:
        """Register all blocks and protect every page of theirs.

        From the return of this call on, every write is in some :meth:`collect`.

        :raise InjectionError: no userfaultfd could be had
        :raise SourceError: the kernel lacks a feature, or a block cannot be registered
        """
        self._uffd = acquire_userfaultfd(self._pid).fd
        try:
            self._pagemap = os.open(f"/proc/{self._pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            try:
                uffd_api(self._uffd, FEATURES)
            except OSError as error:
                raise SourceError(
                    self.name, "the kernel has no async write-protection of shared memory"
                ) from error
            for block in self._blocks:
                self._register(block)
            self.collect()  # everything counts as written before it was protected once
        except BaseException:
            self.stop()
            raise

    def _register(self, block: RamBlock) -> None:
        try:
            uffd_register(self._uffd, block.hva, block.size, userfaultfd.UFFDIO_REGISTER_MODE_WP)
        except OSError as error:
            reason = (
                "somebody else has a userfaultfd on it (a background snapshot?)"
                if error.errno == errno.EBUSY
                else str(error)
            )
            raise SourceError(self.name, f"cannot register {block.name!r}: {reason}") from error

    def collect(self) -> dict[str, DirtyBitmap]:
        """Pages written since the last call, which are protected again.

        :raise SourceError: the scan failed or stood still: nothing is known of any page
        """
        return {block.name: self._scan(block) for block in self._blocks}

    def _scan(self, block: RamBlock) -> DirtyBitmap:
        dirty = DirtyBitmap.empty(block.npages)
        at, end = block.hva, block.hva + block.size
        while at < end:
            try:
                count, walked = pagemap_scan(
                    self._pagemap,
                    at,
                    end,
                    self._regions,
                    flags=pagemap.PM_SCAN_WP_MATCHING | pagemap.PM_SCAN_CHECK_WPASYNC,
                    category_mask=pagemap.PAGE_IS_WRITTEN,
                    return_mask=pagemap.PAGE_IS_WRITTEN,
                )
            except OSError as error:
                raise SourceError(self.name, f"scanning {block.name!r}: {error}") from error
            if walked <= at:
                raise SourceError(self.name, f"the scan of {block.name!r} stands at {at:#x}")
            dirty.set_regions(self._regions, count, block.hva, block.page_size)
            at = walked
        return dirty

    def stop(self) -> None:
        """Let go of the process: the kernel unprotects everything. May be called again."""
        for fd in (self._pagemap, self._uffd):
            if fd >= 0:
                os.close(fd)
        self._uffd = self._pagemap = -1
