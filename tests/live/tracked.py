"""A process to be tracked, on the real kernel: its file, its commands, and a mirror of its memory.

The process is ``tracked.c``. Nothing but its size sets it apart from a QEMU, as far as a tracker
can see: one shared mapping of one nameless file.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.conftest import require
from tests.hugepages import huge_pages
from tests.tracker.targets import descriptors
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.merge import merge
from tracker.memory.ram import RamBlock, find_block
from tracker.sources.holes import Holes
from tracker.sources.source import DirtySource
from tracker.sources.uffd import UffdAsync

PAGE = 4096
HUGE = 2 << 20
NAME = "ram0"

PUNCH_HOLE = 2 | 1  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, include/uapi/linux/falloc.h
MADV_DONTNEED, MADV_REMOVE, MADV_HUGEPAGE, MADV_PAGEOUT = 4, 9, 14, 21


# --- file systems ---------------------------------------------------------------------------------


@contextlib.contextmanager
def tmpfs() -> Iterator[str]:
    yield "/dev/shm"


@contextlib.contextmanager
def ext4() -> Iterator[str]:
    """A directory on the disk, which is where libvirt puts RAM files."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        arguments = ["stat", "--file-system", "--format=%T", directory]
        kind = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.strip()
        require(None if kind == "ext2/ext3" else f"/var/tmp is {kind}, not ext4")
        yield directory


@contextlib.contextmanager
def mounted(kind: str, options: str) -> Iterator[str]:
    require(None if os.geteuid() == 0 else "only root can mount")
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["mount", "-t", kind, "-o", options, kind, directory], check=True)
        try:
            yield directory
        finally:
            subprocess.run(["umount", directory], check=True)


@contextlib.contextmanager
def hugetlbfs(pages: int = 16) -> Iterator[str]:
    """Huge pages of 2 MiB out of a pool that is made larger for as long as they are used."""
    with huge_pages(pages), mounted("hugetlbfs", f"pagesize={HUGE}") as directory:
        yield directory


@contextlib.contextmanager
def huge_tmpfs() -> Iterator[str]:
    """A tmpfs that gives transparent huge pages to whoever asks for them with madvise(2)."""
    with mounted("tmpfs", "huge=advise") as directory:
        yield directory


# --- the process ----------------------------------------------------------------------------------


@cache
def _built() -> tempfile.TemporaryDirectory[str]:
    directory = tempfile.TemporaryDirectory()
    source = Path(__file__).with_name("tracked.c")
    warnings = ("-Wall", "-Wextra", "-Werror")
    program = f"{directory.name}/tracked"
    subprocess.run(["gcc", "-O2", *warnings, "-o", program, source, "-lpthread"], check=True)
    return directory


class Tracked:
    """The running process.

    :ivar fd: a descriptor of the file, of our own
    :ivar block: its memory as the tracker sees it
    """

    def __init__(self, directory: str, size: int, page_size: int, fds: Sequence[int]) -> None:
        # as QEMU does it (softmmu/physmem.c, file_ram_open)
        path = f"{directory}/qemu_back_mem.{NAME}.{secrets.token_hex(3)}"  # as QEMU names it
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.unlink(path)
        os.ftruncate(self.fd, size)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [f"{_built().name}/tracked", str(self.fd), str(size), str(page_size)],
            stdin=pipe,
            stdout=pipe,
            pass_fds=[self.fd, *fds],
            text=True,
            bufsize=1,
        )
        self.pid = self._process.pid
        self.hva = self._answer()
        self._directory, self._byte = directory, 0
        self.block = self.find()

    def find(self) -> RamBlock:
        return find_block(self.pid, NAME, os.fstat(self.fd).st_size, self._directory)

    def _answer(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the process ended: {self._process.wait()}"
        return int(line)

    def tell(self, *words: object) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(str(word) for word in words) + "\n")
        return self._answer()

    def store(self, first: int, count: int = 1, step: int = 1) -> None:
        """Write one byte, of a value not used before it, into every ``step``-th page."""
        self._byte = self._byte % 255 + 1
        assert self.tell("store", first, count, step, self._byte) == 0

    def load(self, first: int, count: int = 1, step: int = 1) -> None:
        assert self.tell("load", first, count, step) == 0

    def hammer(self, kind: str, threads: int) -> None:
        assert self.tell("hammer", kind, threads) == 0

    def rest(self) -> int:
        """End the hammering; return what its increments add up to."""
        return self.tell("rest")

    def looked(self) -> int:
        """How often threads that look have done so by now."""
        return self.tell("looked")

    def call(self, name: str, *arguments: int) -> int:
        result = self.tell("call", name, *arguments)
        if result < 0:
            raise OSError(-result, f"{name}: {os.strerror(-result)}")
        return result

    def address(self, page: int) -> int:
        return self.hva + page * self.block.page_size

    def punch(self, first: int, count: int = 1) -> None:
        page_size = self.block.page_size
        self.call("fallocate", self.fd, PUNCH_HOLE, first * page_size, count * page_size)

    def madvise(self, advice: int, first: int, count: int = 1) -> None:
        self.call("madvise", self.address(first), count * self.block.page_size, advice)

    def kill(self) -> None:
        """Kill it, but leave it there as a zombie."""
        os.kill(self.pid, 9)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def reap(self) -> None:
        self._process.wait()

    def end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        os.close(self.fd)

    def contents(self) -> NDArray[np.uint8]:
        """Every byte of the file, read so that holes stay holes; shape (npages, page_size)."""
        everything = np.empty((self.block.npages, self.block.page_size), np.uint8)
        view, at = everything.data.cast("B"), 0
        while at < len(view):
            n = os.preadv(self.fd, [view[at:]], at)
            assert n > 0
            at += n
        return everything

    def smaps(self, field: str) -> str:
        """What smaps says about the mapping of the block."""
        inside = False
        for line in Path(f"/proc/{self.pid}/smaps").read_text().splitlines():
            if line.startswith(f"{self.hva:x}-"):
                inside = True
            elif inside and line.startswith(f"{field}:"):
                return line.partition(":")[2].strip()
        raise KeyError(field)

    def protected(self) -> NDArray[np.int64]:
        """Pages that are write-protected by a userfaultfd in its page tables.

        Bit 57 of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
        """
        with open(f"/proc/{self.pid}/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(self.hva // PAGE * 8)
            size = self.block.size // PAGE * 8
            entries = np.frombuffer(pagemap.read(size), np.uint64)
        assert len(entries) * 8 == size
        return np.flatnonzero(entries >> np.uint64(57) & np.uint64(1))

    def traces(self) -> list[str]:
        """What of a tracker is in the process."""
        found = [fd for fd in descriptors(self.pid).values() if "userfaultfd" in fd]
        flags = self.smaps("VmFlags").split()
        return found + [flag for flag in flags if flag in ("uw", "um", "ui")]


@contextlib.contextmanager
def tracked(
    file_system: Callable[[], contextlib.AbstractContextManager[str]] = tmpfs,
    npages: int = 2048,
    page_size: int = PAGE,
    *,
    fds: Sequence[int] = (),
) -> Iterator[Tracked]:
    """Start a process with so many pages of memory; end it afterwards.

    :param fds: descriptors that it inherits, under the same numbers
    """
    with file_system() as directory:
        child = Tracked(directory, npages * page_size, page_size, fds)
        try:
            yield child
        finally:
            child.end()


# --- the tracker's side ---------------------------------------------------------------------------

Source = Callable[[int, Sequence[RamBlock]], DirtySource]


class Tracker:
    """Both sources, asked in the order in which a migration asks them.

    :ivar uffd: the source that knows what the processor wrote
    """

    def __init__(self, child: Tracked, source: Source = UffdAsync) -> None:
        self.block = child.block
        self.uffd = source(child.pid, [child.block])
        self.holes = Holes(child.pid, [child.block])

    def collect(self) -> DirtyBitmap:
        written = self.uffd.collect()
        reports = {self.uffd.name: written, self.holes.name: self.holes.collect(written)}
        return merge([self.block], reports).dirty[NAME]

    @property
    def data(self) -> DirtyBitmap:
        return self.holes.data[NAME]


@contextlib.contextmanager
def tracking(child: Tracked, source: Source = UffdAsync) -> Iterator[Tracker]:
    tracker = Tracker(child, source)
    try:
        tracker.uffd.start()
        tracker.holes.start()
        yield tracker
    finally:
        tracker.holes.stop()
        tracker.uffd.stop()


class Mirror:
    """A copy of the memory, kept equal by copying what the tracker reports."""

    def __init__(self, child: Tracked) -> None:
        self.child = child
        self.copy = np.zeros((child.block.npages, child.block.page_size), np.uint8)

    def take(self, dirty: DirtyBitmap, data: DirtyBitmap) -> None:
        """Copy the dirty pages; those that are holes are zeros."""
        rows = pages(dirty)
        filled = np.isin(rows, pages(data), assume_unique=True)
        self.copy[rows[~filled]] = 0
        for row in rows[filled].tolist():
            # not through a mapping, which would fill the page if it has been discarded meanwhile
            at = row * self.child.block.page_size
            assert os.preadv(self.child.fd, [self.copy[row]], at) == self.child.block.page_size

    def differing(self) -> list[int]:
        """Pages that are not, byte by byte, what the file holds."""
        different = (self.copy != self.child.contents()).any(axis=1)
        return list(np.flatnonzero(different).tolist())


def pages(bitmap: DirtyBitmap) -> NDArray[np.int64]:
    """Numbers of the pages, ascending; by way of bytes, not of the code that is tested."""
    bits = np.unpackbits(bitmap.words.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits[: bitmap.npages])
