"""CPU writes on kernels whose write-protection is not asynchronous: somebody answers each fault.

The first write to a protected page is a message on the userfaultfd, and its writer stands still
until the protection is lifted (Linux: ``handle_userfault`` in fs/userfaultfd.c; for shared memory
since commit b1f9e876862d, "mm/uffd: enable write protection for shmem & hugetlbfs", in v5.19). The
way to the answer and back is most of its cost, so a whole *chunk* is opened with it: all of its
pages count as written.

:mod:`tracker.answered.faultserver` answers, and holds the userfaultfd alone. When it ends, or we
do, nothing is protected any more, and nobody waits.

A page that is discarded while it is used may lose its protection without a message (mm/memory.c,
``unmap_mapping_folio`` with ZAP_FLAG_DROP_MARKER), and what is written there next has none either.
(In async mode such a page counts as written.) So once a file was modified by a system call, which
a discard is, the page tables are asked which pages are not protected.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import socket
import subprocess
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tracker import child
from tracker.abi import pagemap, userfaultfd
from tracker.answered.faultserver import main, words_of
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.bits.rescale import spread
from tracker.errors import NotTracking, RamError, SourceError
from tracker.inject.acquire import acquire_userfaultfd
from tracker.memory.ram import RamBlock, open_file
from tracker.sources.pagemap import entries
from tracker.syscalls import uffd_api, uffd_register, was_modified, watch_modifications

# Not WP_UNPOPULATED, which came later (v6.4): that is for private memory. In files, what no page
# table maps is always protected by a marker (mm/mprotect.c, userfaultfd_wp_use_markers).
FEATURES = (
    userfaultfd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | userfaultfd.UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | userfaultfd.UFFD_FEATURE_THREAD_ID
)

CHUNK = 64 << 10
"""Bytes that a fault opens, if nothing else is said."""

_BASE_PAGE = os.sysconf("SC_PAGE_SIZE")
_LOOK_PAGES = 1 << 18  # of page table entries at once: 2 MiB, of 1 GiB of memory
_PROTECTED = np.uint64(pagemap.PM_UFFD_WP)

_START_S = 120.0  # an interpreter, and the kernels if nobody has compiled them yet


class UffdSync:
    """Writes through the page tables of one process, chunk by chunk.

    Not seen: what :class:`tracker.sources.uffd.UffdAsync` does not see either. Writers are slowed
    down by each first write to a chunk, until its next collection.

    :cvar exact: whole chunks are reported, of which a page was written
    """

    name = "uffd-sync"
    exact = True

    def __init__(
        self, pid: int, blocks: Sequence[RamBlock], *, chunk: int = CHUNK, timeout_s: float = 30.0
    ) -> None:
        """Prepare; nothing is done to the process yet.

        :param chunk: bytes that are opened at once, a power of two; huge pages are never divided
        :param timeout_s: how long a collection may take
        """
        self._pid = pid
        self._blocks = tuple(blocks)
        self._timeout_s = timeout_s
        self._ranges = _ranges(self._blocks, chunk)
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._taken: NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._pagemap = self._watcher = -1

    def start(self) -> None:
        """Register all blocks and protect every page of theirs.

        From the return of this call on, every write is in some :meth:`collect`.

        :raise InjectionError: no userfaultfd could be had
        :raise NotTracking: only one that leaves out the kernel's writes could be had: they would
            fail with EFAULT
        :raise SourceError: the kernel lacks a feature, or a block cannot be registered (a file that
            is neither on tmpfs nor on hugetlbfs), or nobody answers
        """
        acquired = acquire_userfaultfd(self._pid)
        try:
            self._watch()
            if acquired.user_mode_only:
                raise NotTracking(
                    self.name, "the process may have no userfaultfd for writes of the kernel"
                )
            self._register(acquired.fd)
            self._serve(acquired.fd)
        except BaseException as error:
            self.stop()
            if isinstance(error, (OSError, RamError)):
                raise SourceError(self.name, str(error)) from error
            raise
        finally:
            os.close(acquired.fd)  # the server's is the only one from here on
        try:
            self._take(_START_S)
        except BaseException:
            self.stop()
            raise

    def _watch(self) -> None:
        self._pagemap = os.open(f"/proc/{self._pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.ExitStack() as files:
            fds = []
            for block in self._blocks:
                fds.append(open_file(self._pid, block))
                files.callback(os.close, fds[-1])
            self._watcher = watch_modifications(fds)

    def _register(self, uffd: int) -> None:
        try:
            uffd_api(uffd, FEATURES)
        except OSError as error:
            reason = "the kernel has no write-protection of shared memory"
            raise SourceError(self.name, reason) from error
        for block in self._blocks:
            try:
                uffd_register(uffd, block.hva, block.size, userfaultfd.UFFDIO_REGISTER_MODE_WP)
            except OSError as error:
                reason = (
                    "somebody else has a userfaultfd on it (a migration, or a background snapshot?)"
                    if error.errno == errno.EBUSY
                    else str(error)
                )
                raise SourceError(self.name, f"cannot register {block.name!r}: {reason}") from error

    def _serve(self, uffd: int) -> None:
        nwords = words_of(self._ranges)
        taken = os.memfd_create("taken", os.MFD_CLOEXEC)
        try:
            os.truncate(taken, nwords * 8)
            self._taken = np.frombuffer(mmap.mmap(taken, nwords * 8), np.uint64)
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ranges = json.dumps(self._ranges.tolist())
            with theirs:
                self._server = child.start(
                    partial(main, uffd, taken, ranges),
                    stdin=theirs.fileno(),
                    stderr=subprocess.PIPE,
                    fds=(uffd, taken),
                )
        finally:
            os.close(taken)

    def collect(self) -> PageSet:
        """Pages of chunks that were written since the last call, which are protected again.

        :raise SourceError: whoever answered faults has ended, or cannot tell: nothing is known of
            any page, and nothing is protected any more
        """
        if self._control is None:
            raise SourceError(self.name, "is not started, or has ended")
        try:
            self._add_unprotected()
        except OSError as error:
            raise SourceError(self.name, str(error)) from error
        self._take(self._timeout_s)
        rows = self._ranges.tolist()
        pairs = zip(self._blocks, rows, strict=True)
        return PageSet(
            self._blocks, {b.name: self._dirty(b, size, first) for b, (_, _, size, first) in pairs}
        )

    def _add_unprotected(self) -> None:
        """Have chunks taken that are not protected, of whatever page.

        Where nothing was discarded these are the open ones; then the first page is looked at, which
        tells memory that is gone from memory that nobody wrote.
        """
        self._taken[:] = 0
        everywhere = was_modified(self._watcher)
        for block, (_, _, size, first) in zip(self._blocks, self._ranges.tolist(), strict=True):
            end = block.size // _BASE_PAGE if everywhere else 1
            for page in range(0, end, _LOOK_PAGES):
                address, count = block.hva + page * _BASE_PAGE, min(_LOOK_PAGES, end - page)
                bits = entries(self._pagemap, address, count) & _PROTECTED
                chunks = (np.flatnonzero(bits == 0) + page) * _BASE_PAGE // size
                found = DirtyBitmap.from_pages(-(-block.size // size), chunks)
                self._taken[first : first + len(found.words)] |= found.words

    def slow(self, percent: int, longest_ms: float) -> None:
        """Have each writer wait for a part of its time; one that only reads never waits.

        It holds for writes that are noted, the first of each chunk after a collection. They are
        let go all at once when nobody answers faults any more.

        :param percent: 0 to 99; with 0 nobody waits any more
        :param longest_ms: of one wait. That of a device of QEMU's holds up the whole VM.
        :raise SourceError: nobody answers faults, or nobody any more
        """
        if not 0 <= percent < 100 or longest_ms < 0:
            raise ValueError(f"waits of {percent} % and {longest_ms} ms")
        if self._control is None:
            raise SourceError(self.name, "is not started, or has ended")
        self._ask(f"pace {percent} {round(longest_ms * 1e6)}", "paced", self._timeout_s)

    def _take(self, timeout_s: float) -> None:
        """Have everything protected that was written; its bits are in ``_taken`` then."""
        self._ask("take", "taken", timeout_s)

    def _ask(self, request: str, expected: str, timeout_s: float) -> None:
        assert self._control is not None
        self._control.settimeout(timeout_s)
        try:
            self._control.send(request.encode())
            reply = self._control.recv(64).decode()
        except (ConnectionError, TimeoutError) as error:
            complaint = self._end()  # if it hangs, so do the writers
            reason = f"nobody answers write faults: {complaint or error}"
            raise SourceError(self.name, reason) from error
        if reply != expected:
            complaint = self._end()
            if reply:
                complaint = os.strerror(int(reply))
            raise SourceError(self.name, f"nobody answers write faults any more: {complaint}")

    def _dirty(self, block: RamBlock, size: int, first: int) -> DirtyBitmap:
        dirty = DirtyBitmap.empty(block.npages)
        whole = block.size // size
        spread(self._taken, 64 * first, whole, size, dirty.words, block.page_size, 0)
        if whole * size < block.size and int(self._taken[first + whole // 64]) >> whole % 64 & 1:
            dirty.set_range(whole * size // block.page_size, block.npages)
        return dirty

    def stop(self) -> None:
        """Let go of the process: the kernel unprotects everything. May be called again."""
        self._end()

    def _end(self) -> str:
        """End whoever answers, wait for that, and return its last words."""
        complaint = ""
        if self._control is not None:
            self._control.close()
        if self._server is not None:
            self._server.kill()
            _, last = self._server.communicate()  # everything is unprotected when it returns
            complaint = last.decode(errors="replace").strip()
        for fd in (self._pagemap, self._watcher):
            if fd >= 0:
                os.close(fd)
        self._pagemap = self._watcher = -1
        self._control = self._server = None
        self._taken = np.zeros(0, np.uint64)  # its mapping holds a descriptor
        return complaint


def _ranges(blocks: Sequence[RamBlock], chunk: int) -> NDArray[np.int64]:
    """What :mod:`tracker.answered.faults` calls ranges."""
    rows, word = [], 0
    for block in blocks:
        size = max(chunk, block.page_size)
        rows.append((block.hva, block.size, size, word))
        word += (-(-block.size // size) + 63) // 64
    return np.array(rows, np.int64)
