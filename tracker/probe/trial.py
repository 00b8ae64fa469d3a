"""Memory of another process to try tracking on, and the plainest tracker that reads it.

The path is that of :class:`tracker.sources.uffd.UffdAsync`: shared memory of another process, a
userfaultfd that belongs to its address space and is held here alone, its ``/proc/PID/pagemap``.
Only ptrace is left out, so as to tell apart a kernel that tracks well and one that lets us trace.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Iterable
from functools import partial
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from tracker import child
from tracker.abi import pagemap, unistd, userfaultfd
from tracker.errors import NotTracking
from tracker.probe.subject import main
from tracker.syscalls import pagemap_scan, uffd_api, uffd_register

SOURCE = "uffd"
"""Name of the dirty source that all of this is about."""

FEATURES = {
    "WP_ASYNC": userfaultfd.UFFD_FEATURE_WP_ASYNC,
    "WP_UNPOPULATED": userfaultfd.UFFD_FEATURE_WP_UNPOPULATED,
    "WP_HUGETLBFS_SHMEM": userfaultfd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
    "PAGEFAULT_FLAG_WP": userfaultfd.UFFD_FEATURE_PAGEFAULT_FLAG_WP,
}
"""What :mod:`tracker.sources.uffd` asks the kernel for, by name."""

ANSWER_S = 3.0
"""How long a subject may take for what takes microseconds."""

SHARED_PAGES = 1536
HUGE_PAGES = 4

_NUMBERS = {"aarch64": unistd.AARCH64}
_INT_BYTES = 4
_MFD_HUGE_SHIFT = 26


def shared_file(directory: str = "/dev/shm") -> int:
    """Make a nameless file for the pages of a :class:`Subject`.

    :param directory: on tmpfs, or wherever guest RAM is to be
    :raise OSError: no file can be made there
    """
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.truncate(fd, (SHARED_PAGES + 1) * os.sysconf("SC_PAGE_SIZE"))
    return fd


def huge_file(page_size: int) -> int:
    """Make a file of huge pages, which are reserved when it is mapped.

    :param page_size: bytes, one that the kernel has
    :raise OSError: it has no such pages
    """
    size_flag = (page_size.bit_length() - 1) << _MFD_HUGE_SHIFT
    fd = os.memfd_create("probe", os.MFD_CLOEXEC | os.MFD_HUGETLB | size_flag)
    os.truncate(fd, (HUGE_PAGES + 1) * page_size)
    return fd


class Subject:
    """A process with shared memory that does to it what it is told.

    The memory has ``npages`` pages to be tracked, and one more that is left alone.

    :ivar npages: of memory to be tracked
    :ivar page_size: bytes
    :ivar pid: the process
    :ivar hva: address of the memory in it
    :ivar uffd: its userfaultfd, held here alone; -1 if it may have none
    :ivar uffd_errno: why it may not, or 0
    """

    def __init__(self, fd: int, page_size: int | None = None, *, npages: int | None = None) -> None:
        """Start the process.

        :param fd: a file of :func:`shared_file` or :func:`huge_file`, ours from now on
        :param page_size: bytes, if the pages are huge
        :raise NotTracking: it does not come up
        :raise OSError: it cannot be started
        """
        self.fd = fd
        self.page_size = page_size or os.sysconf("SC_PAGE_SIZE")
        self.npages = npages or (HUGE_PAGES if page_size else SHARED_PAGES)
        self.uffd = -1
        numbers = _NUMBERS.get(os.uname().machine, unistd.X86_64)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._process = child.start(
                    partial(main, fd, self.npages + 1, self.page_size, numbers.userfaultfd),
                    site=False,
                    session=False,
                    stdin=theirs.fileno(),
                    fds=(fd,),
                )
        except BaseException:
            self._socket.close()
            os.close(fd)
            raise
        self.pid = self._process.pid
        try:
            self._meet()
        except BaseException:
            self.close()
            raise

    def _meet(self) -> None:
        self._await_answer(ANSWER_S + 10)  # an interpreter has to start, maybe on a busy machine
        message, ancillary, _, _ = self._socket.recvmsg(
            256, socket.CMSG_LEN(_INT_BYTES), socket.MSG_CMSG_CLOEXEC
        )
        for _, _, data in ancillary:
            self.uffd = int.from_bytes(data, sys.byteorder)
        if not message:
            raise self._gone()
        address, errno = message.decode().split()
        self.hva, self.uffd_errno = int(address), int(errno)

    def write(self, pages: Iterable[int], value: int = 1) -> None:
        """Write 8 bytes, ``value``, to each page."""
        self.begin("write", pages, value)
        self.finish()

    def read(self, pages: Iterable[int]) -> None:
        """Read a byte of each page."""
        self.begin("read", pages)
        self.finish()

    def receive(self, pages: Iterable[int], value: int = 1) -> None:
        """Have the kernel write to each page, by read(2)."""
        self.begin("receive", pages, value)
        self.finish()

    def discard(self, pages: Iterable[int]) -> None:
        """Make each page a hole."""
        self.begin("discard", pages)
        self.finish()

    def begin(self, command: str, pages: Iterable[int], value: int = 0) -> None:
        """Have something done without waiting for it; see :mod:`tracker.probe.subject`."""
        self._command = command
        with contextlib.suppress(BrokenPipeError):  # finish() says so
            self._socket.send(" ".join([command, str(value), *map(str, pages)]).encode())

    def done(self) -> bool:
        """Whether :meth:`finish` would return at once."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def finish(self) -> None:
        """Wait for what was begun.

        :raise NotTracking: it does not return, or the process ended
        """
        self._await_answer(ANSWER_S)
        try:
            answer = self._socket.recv(4096).decode()
        except ConnectionResetError:
            answer = ""
        if not answer:
            raise self._gone()
        if answer != "done":
            raise NotTracking(SOURCE, answer)

    def content(self, page: int) -> int:
        """The 8 bytes at the beginning of a page, as the file has them."""
        return int.from_bytes(os.pread(self.fd, 8, page * self.page_size), "little")

    def _await_answer(self, timeout_s: float) -> None:
        if not select.select([self._socket], [], [], timeout_s)[0]:
            what = getattr(self, "_command", "starting")
            raise NotTracking(SOURCE, f"a process that tracks itself hangs: {what} does not return")

    def _gone(self) -> NotTracking:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code = self._process.returncode
        how = signal.Signals(-code).name if code is not None and code < 0 else str(code)
        return NotTracking(SOURCE, f"the process whose memory was probed ended: {how}")

    def close(self) -> None:
        """End the process; wait for it, but not for ever: it could be stuck in the kernel."""
        self._socket.close()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        for fd in (self.uffd, self.fd):
            if fd >= 0:
                os.close(fd)
        self.uffd = self.fd = -1

    def __enter__(self) -> Subject:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Tracker:
    """Asynchronous write-protection of a subject's memory, as plain as can be."""

    flags = pagemap.PM_SCAN_WP_MATCHING | pagemap.PM_SCAN_CHECK_WPASYNC

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._pagemap = -1
        self._regions = np.zeros((2 * SHARED_PAGES, 3), dtype=np.uint64)

    def start(self) -> None:
        """Register the memory and protect it.

        :raise NotTracking: the subject may have no userfaultfd
        :raise OSError: the kernel refuses
        """
        subject = self.subject
        if subject.uffd < 0:
            reason = os.strerror(subject.uffd_errno)
            raise NotTracking(SOURCE, f"a process of ours may have no userfaultfd: {reason}")
        self._pagemap = os.open(f"/proc/{subject.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        uffd_api(subject.uffd, sum(FEATURES.values()))
        self.register()
        self.arm()

    def register(self) -> None:
        """UFFDIO_REGISTER all pages but the last."""
        subject = self.subject
        length = subject.npages * subject.page_size
        uffd_register(subject.uffd, subject.hva, length, userfaultfd.UFFDIO_REGISTER_MODE_WP)

    def arm(self) -> None:
        """Protect every page, whatever was written."""
        self.collect()

    def collect(self, nregions: int | None = None) -> Collection[int]:
        """Pages written since the last call.

        :param nregions: size of the output vector
        """
        return self.scan(0, self.subject.npages, nregions)

    def scan(self, first: int, last: int, nregions: int | None = None) -> set[int]:
        """Pages from ``first`` to before ``last`` that were written; they are protected again.

        :raise NotTracking: the scan does not get on
        :raise OSError: the kernel refuses
        """
        subject = self.subject
        pages: set[int] = set()
        regions = self._regions[:nregions]
        at = subject.hva + first * subject.page_size
        end = subject.hva + last * subject.page_size
        while at < end:
            count, walked = self.scan_once(at, end, regions)
            for start, stop, _ in regions[:count].tolist():
                pages.update(range(self._page(start), self._page(stop)))
            if walked <= at:
                raise NotTracking(SOURCE, f"a scan stands still at page {self._page(at)}")
            at = walked
        return pages

    def _page(self, address: int) -> int:
        return (address - self.subject.hva) // self.subject.page_size

    def scan_once(self, at: int, end: int, regions: NDArray[np.uint64]) -> tuple[int, int]:
        """PAGEMAP_SCAN: see :func:`tracker.syscalls.pagemap_scan`."""
        return pagemap_scan(
            self._pagemap,
            at,
            end,
            regions,
            flags=self.flags,
            category_mask=pagemap.PAGE_IS_WRITTEN,
            return_mask=pagemap.PAGE_IS_WRITTEN,
        )

    def stop(self) -> None:
        """Let go of the pagemap; the userfaultfd is the subject's to close."""
        if self._pagemap >= 0:
            os.close(self._pagemap)
        self._pagemap = -1

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
