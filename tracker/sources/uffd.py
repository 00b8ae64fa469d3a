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
from collections.abc import Iterator, Sequence

import numpy as np

from tracker.abi import pagemap, userfaultfd
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.history import find_spans
from tracker.bits.pageset import PageSet
from tracker.errors import SourceError
from tracker.inject.acquire import acquire_userfaultfd
from tracker.memory.ram import RamBlock
from tracker.syscalls import pagemap_scan, uffd_api, uffd_register, uffd_unregister

FEATURES = (
    userfaultfd.UFFD_FEATURE_WP_ASYNC
    | userfaultfd.UFFD_FEATURE_WP_UNPOPULATED
    | userfaultfd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | userfaultfd.UFFD_FEATURE_PAGEFAULT_FLAG_WP
)
_REGIONS = 65536  # 1.5 MiB of vector; the kernel itself works in batches of 512
_SPANS = 1024  # a call each, of some microseconds


class UffdAsync:
    """Writes through the page tables of one process: vCPUs, device emulation, vhost.

    Not seen: writes through pinned pages (VFIO, io_uring buffers), through other mappings of the
    same file, and pages that are discarded (see :mod:`tracker.sources.holes`).
    """

    name = "uffd"
    exact = True

    def __init__(self, pid: int, blocks: Sequence[RamBlock]) -> None:
        self._pid = pid
        self._blocks = tuple(blocks)
        self._uffd = -1
        self._pagemap = -1
        self._regions = np.zeros((_REGIONS, 3), dtype=np.uint64)
        self._given_up = PageSet.empty(blocks)

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
                self._register(block, block.hva, block.size)
            self.collect()  # everything counts as written before it was protected once
        except BaseException:
            self.stop()
            raise

    def _register(self, block: RamBlock, start: int, nbytes: int) -> None:
        try:
            uffd_register(self._uffd, start, nbytes, userfaultfd.UFFDIO_REGISTER_MODE_WP)
        except OSError as error:
            reason = (
                "somebody else has a userfaultfd on it (a migration, or a background snapshot?)"
                if error.errno == errno.EBUSY
                else str(error)
            )
            raise SourceError(self.name, f"cannot register {block.name!r}: {reason}") from error

    def give_up(self, spans: PageSet) -> None:
        """Let go of some pages: another userfaultfd may have them.

        Nothing is told of what is written to them from the last :meth:`collect` on. Whoever tracks
        them next has to count all of them as written, *after* it has protected them.

        :param spans: each run of pages costs the process a mapping or two
        :raise SourceError: the memory is gone: nothing is known of any page
        """
        for block, start, nbytes in self._runs(spans):
            try:
                uffd_unregister(self._uffd, start, nbytes)
            except OSError as error:
                raise SourceError(self.name, f"letting go of {block.name!r}: {error}") from error
        self._given_up |= spans

    def take_back(self, spans: PageSet) -> None:
        """Track pages again that were given up, and nobody else tracks any more.

        From the return of this call on, every write is in some :meth:`collect`. What was written
        before is not: count all of them as written.

        :raise SourceError: they cannot be registered: nothing is known of any page
        """
        for block, start, nbytes in self._runs(spans):
            self._register(block, start, nbytes)
            first = (start - block.hva) // block.page_size
            written = DirtyBitmap.empty(block.npages)  # as everything that is not protected
            self._scan_into(written, block, first, first + nbytes // block.page_size)
        self._given_up -= spans

    def _runs(self, spans: PageSet) -> Iterator[tuple[RamBlock, int, int]]:
        """Address and bytes of each run of pages."""
        for block in self._blocks:
            for first, npages in zip(*spans[block.name].runs(), strict=True):
                address = block.hva + int(first) * block.page_size
                yield block, address, int(npages) * block.page_size

    def collect(self) -> PageSet:
        """Pages written since the last call, which are protected again; none that was given up.

        :raise SourceError: the scan failed or stood still: nothing is known of any page
        """
        return PageSet(self._blocks, {block.name: self._scan(block) for block in self._blocks})

    def scan(self) -> PageSet:
        """Pages written since the last collection, to be given to :meth:`protect` at once.

        They are not protected yet: the time until then is part of this collection.

        :raise SourceError: see :meth:`collect`
        """
        return PageSet(
            self._blocks, {block.name: self._scan(block, protect=False) for block in self._blocks}
        )

    def protect(self, written: PageSet, left: PageSet) -> None:
        """End the collection that :meth:`scan` began: protect the pages, but some.

        The writers of those that are left pay no more faults, and nothing is learned about them:
        they are in each collection until they are protected. It is an offer: where they alternate
        with many others, all are protected. The caller owes them until it has sent them after a
        collection that did not leave them.

        :param written: what :meth:`scan` returned; added to it is what was written since
        :param left: of these, pages to leave unprotected
        :raise SourceError: see :meth:`collect`
        """
        for block in self._blocks:
            self._protect(block, written[block.name], left[block.name])

    def _protect(self, block: RamBlock, written: DirtyBitmap, left: DirtyBitmap) -> None:
        """Protect what was written but is not left; add what is found to be written by then."""
        starts, stops = np.empty((2, _SPANS), np.int64)
        barred = left | self._given_up[block.name]
        n = find_spans((written - barred).words, barred.words, starts, stops)
        spans = zip(starts[:n].tolist(), stops[:n].tolist(), strict=True)
        for start, stop in spans if n <= _SPANS else self._kept(block):
            self._scan_into(written, block, start, stop)

    def _scan(self, block: RamBlock, *, protect: bool = True) -> DirtyBitmap:
        """Written pages."""
        dirty = DirtyBitmap.empty(block.npages)
        for start, stop in self._kept(block):
            self._scan_into(dirty, block, start, stop, protect=protect)
        return dirty

    def _kept(self, block: RamBlock) -> list[tuple[int, int]]:
        """Ranges of pages that are not given up."""
        starts, lengths = self._given_up[block.name].runs()
        edges = np.stack([starts, starts + lengths], axis=1).ravel()
        ranges = np.concatenate([[0], edges, [block.npages]]).reshape(-1, 2)
        return [(start, stop) for start, stop in ranges.tolist() if start < stop]

    def _scan_into(
        self, dirty: DirtyBitmap, block: RamBlock, first: int, last: int, *, protect: bool = True
    ) -> None:
        """Add written pages of ``first <= page < last``."""
        flags = pagemap.PM_SCAN_CHECK_WPASYNC
        if protect:
            flags |= pagemap.PM_SCAN_WP_MATCHING
        at, end = block.hva + first * block.page_size, block.hva + last * block.page_size
        while at < end:
            try:
                count, walked = pagemap_scan(
                    self._pagemap,
                    at,
                    end,
                    self._regions,
                    flags=flags,
                    category_mask=pagemap.PAGE_IS_WRITTEN,
                    return_mask=pagemap.PAGE_IS_WRITTEN,
                )
            except OSError as error:
                raise SourceError(self.name, f"scanning {block.name!r}: {error}") from error
            if walked <= at:
                raise SourceError(self.name, f"the scan of {block.name!r} stands at {at:#x}")
            dirty.set_regions(self._regions, count, block.hva, block.page_size)
            at = walked

    def stop(self) -> None:
        """Let go of the process: the kernel unprotects everything. May be called again."""
        for fd in (self._pagemap, self._uffd):
            if fd >= 0:
                os.close(fd)
        self._uffd = self._pagemap = -1
