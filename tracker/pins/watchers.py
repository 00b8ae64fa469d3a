"""The three CPU trackers of Linux, as plain as can be, on memory of this very process.

For experiments (:mod:`tracker.pins.pins`): nobody else runs, so nothing is lost between two calls.
Migrations use :mod:`tracker.sources.uffd` and :mod:`tracker.sources.softdirty`.
"""

from __future__ import annotations

import ctypes
import os
import select
import threading
from typing import Protocol

import numpy as np

from tracker.abi import pagemap, unistd, userfaultfd
from tracker.errors import NotTracking
from tracker.pins.pinned import Memory
from tracker.probe.subject import make_userfaultfd
from tracker.sources.pagemap import clear_soft_dirty, entries, soft_dirty_missing
from tracker.syscalls import pagemap_scan, uffd_api, uffd_register, uffd_writeprotect

_REGIONS = 64


class Watcher(Protocol):
    """Says which pages of a memory the process wrote."""

    name: str

    def start(self) -> None:
        """Begin, with no page counting as written.

        :raise NotTracking: this kernel, or this kind of memory, cannot be watched so
        :raise OSError: the same, in the words of the call that failed
        """

    def collect(self) -> set[int]:
        """Pages written since the last call, or the start; a write from now on is in the next.

        :raise TrackerError: it cannot tell
        :raise OSError: it cannot tell
        """

    def stop(self) -> None:
        """Let go of the memory. May be called again."""


def _userfaultfd(memory: Memory, features: int) -> int:
    numbers = unistd.AARCH64 if os.uname().machine == "aarch64" else unistd.X86_64
    fd = make_userfaultfd(numbers.userfaultfd)
    try:
        uffd_api(fd, features)
        uffd_register(fd, memory.address, memory.size, userfaultfd.UFFDIO_REGISTER_MODE_WP)
    except BaseException:
        os.close(fd)
        raise
    return fd


class UffdAsyncWatcher:
    """Write-protection that the kernel lifts by itself, read with PAGEMAP_SCAN."""

    name = "uffd async"

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._uffd = self._pagemap = -1
        self._regions = np.zeros((_REGIONS, 3), np.uint64)

    def start(self) -> None:
        """See :meth:`Watcher.start`."""
        self._uffd = _userfaultfd(
            self._memory,
            userfaultfd.UFFD_FEATURE_WP_ASYNC
            | userfaultfd.UFFD_FEATURE_WP_UNPOPULATED
            | userfaultfd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
            | userfaultfd.UFFD_FEATURE_PAGEFAULT_FLAG_WP,
        )
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self.collect()

    def collect(self) -> set[int]:
        """See :meth:`Watcher.collect`."""
        pages: set[int] = set()
        at, end = self._memory.address, self._memory.address + self._memory.size
        while at < end:
            count, walked = pagemap_scan(
                self._pagemap,
                at,
                end,
                self._regions,
                flags=pagemap.PM_SCAN_WP_MATCHING | pagemap.PM_SCAN_CHECK_WPASYNC,
                category_mask=pagemap.PAGE_IS_WRITTEN,
                return_mask=pagemap.PAGE_IS_WRITTEN,
            )
            for start, stop, _ in self._regions[:count].tolist():
                pages.update(range(self._memory.page_of(start), self._memory.page_of(stop - 1) + 1))
            if walked <= at:
                raise NotTracking(self.name, "a scan stands still")
            at = walked
        return pages

    def stop(self) -> None:
        """See :meth:`Watcher.stop`."""
        for fd in (self._uffd, self._pagemap):
            if fd >= 0:
                os.close(fd)
        self._uffd = self._pagemap = -1


class UffdSyncWatcher:
    """Write-protection whose faults are messages: a thread notes the page, and lifts it."""

    name = "uffd sync"

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._uffd = -1
        self._thread: threading.Thread | None = None
        self._written: set[int] = set()
        self._error = ""

    def start(self) -> None:
        """See :meth:`Watcher.start`."""
        self._uffd = _userfaultfd(
            self._memory,
            userfaultfd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
            | userfaultfd.UFFD_FEATURE_PAGEFAULT_FLAG_WP,
        )
        self._end = os.pipe()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self.collect()

    def _serve(self) -> None:
        size = ctypes.sizeof(userfaultfd.uffd_msg)
        while True:
            ready, _, _ = select.select([self._uffd, self._end[0]], [], [])
            if self._end[0] in ready:
                return
            try:
                message = userfaultfd.uffd_msg.from_buffer_copy(os.read(self._uffd, size))
                if message.event != userfaultfd.UFFD_EVENT_PAGEFAULT:
                    self._error = f"message {message.event:#x} where a fault was expected"
                    continue
                page = self._memory.page_of(message.pagefault.address)
                self._written.add(page)  # before the writer goes on
                self._protect(page, 1, 0)
            except BlockingIOError:
                continue
            except OSError as error:  # the writer waits for ever: whoever watches us ends it
                self._error = str(error)
                return

    def _protect(self, page: int, npages: int, mode: int) -> None:
        size = self._memory.page_size
        uffd_writeprotect(self._uffd, self._memory.address + page * size, npages * size, mode)

    def collect(self) -> set[int]:
        """See :meth:`Watcher.collect`."""
        if self._error:
            raise NotTracking(self.name, self._error)
        written, self._written = self._written, set()
        self._protect(0, self._memory.npages, userfaultfd.UFFDIO_WRITEPROTECT_MODE_WP)
        return written

    def stop(self) -> None:
        """See :meth:`Watcher.stop`."""
        if self._thread is not None:
            os.close(self._end[1])
            self._thread.join()
            os.close(self._end[0])
            self._thread = None
        if self._uffd >= 0:
            os.close(self._uffd)
        self._uffd = -1


class SoftDirtyWatcher:
    """The soft-dirty bits of our page tables."""

    name = "soft-dirty"

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._pagemap = self._clear = -1

    def start(self) -> None:
        """See :meth:`Watcher.start`."""
        if missing := soft_dirty_missing():
            raise NotTracking(self.name, missing)
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._clear = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        self.collect()

    def collect(self) -> set[int]:
        """See :meth:`Watcher.collect`."""
        memory = self._memory
        base_page = os.sysconf("SC_PAGE_SIZE")
        found = entries(self._pagemap, memory.address, memory.size // base_page)
        clear_soft_dirty(self._clear)
        dirty = found.reshape(memory.npages, -1) & np.uint64(pagemap.PM_SOFT_DIRTY)
        return {int(page) for page in np.flatnonzero(dirty.any(axis=1))}

    def stop(self) -> None:
        """See :meth:`Watcher.stop`."""
        for fd in (self._pagemap, self._clear):
            if fd >= 0:
                os.close(fd)
        self._pagemap = self._clear = -1


WATCHERS: tuple[type[UffdAsyncWatcher | UffdSyncWatcher | SoftDirtyWatcher], ...] = (
    UffdAsyncWatcher,
    UffdSyncWatcher,
    SoftDirtyWatcher,
)
