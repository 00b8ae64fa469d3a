"""Kinds of memory, and the ways in which the kernel holds on to their pages.

A *pin* finds pages through the page tables once and then uses them without: for as long as it
lasts, it and the process must mean the same page (Linux:
Documentation/core-api/pin_user_pages.rst).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Protocol

from tracker.pins import heldfile as fuse
from tracker.pins import iouring
from tracker.probe.trial import shared_file
from tracker.syscalls import vmsplice

PART = os.sysconf("SC_PAGE_SIZE")
"""Bytes at the beginning of each page that are written and read, also of huge pages."""

_MFD_HUGE_SHIFT = 26


class Memory:
    """Some pages of this process.

    :ivar address: of the first byte
    :ivar page_size: bytes
    :ivar npages: how many
    :ivar size: bytes of all of them
    """

    def __init__(self, memory: mmap.mmap, page_size: int) -> None:
        self._map = memory
        self.page_size = page_size
        self.size = len(memory)
        self.npages = self.size // page_size
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if page_size == PART:
            # THP would make one page of many. It also keeps the mapping from being merged with
            # a neighbour, which would count as written all over (VM_SOFTDIRTY).
            memory.madvise(mmap.MADV_NOHUGEPAGE)

    def page_of(self, address: int) -> int:
        """Number of the page that an address is in."""
        return (address - self.address) // self.page_size

    def part(self, page: int) -> memoryview:
        """The beginning of a page, :data:`PART` bytes."""
        start = page * self.page_size
        return memoryview(self._map)[start : start + PART]

    def fill(self, page: int, value: int) -> None:
        """Write the beginning of a page, as a vCPU does: other threads run meanwhile."""
        ctypes.memset(self.address + page * self.page_size, value, PART)

    def holds(self, page: int, value: int) -> bool:
        """Whether the beginning of a page is this byte throughout."""
        return bytes(self.part(page)) == bytes([value]) * PART


def private_anonymous(npages: int) -> Memory:
    """Memory as malloc(3) gets it, and QEMU by default.

    :raise OSError: there is none
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return Memory(mmap.mmap(-1, npages * PART, flags=flags), PART)


def shared_memfd(npages: int) -> Memory:
    """A memfd, mapped shared.

    :raise OSError: there is none
    """
    return _shared(os.memfd_create("pins", os.MFD_CLOEXEC), npages, PART)


def shared_tmpfs(npages: int) -> Memory:
    """A file in /dev/shm, mapped shared, as a migration demands of guest RAM.

    :raise OSError: none can be made
    """
    return _shared(shared_file(), npages, PART)


def shared_hugetlb(npages: int) -> Memory:
    """Huge pages of the kernel's usual size, mapped shared.

    :raise OSError: not so many can be reserved
    """
    page_size = _huge_page_size()
    size_flag = (page_size.bit_length() - 1) << _MFD_HUGE_SHIFT
    fd = os.memfd_create("pins", os.MFD_CLOEXEC | os.MFD_HUGETLB | size_flag)
    try:
        return _shared(fd, npages, page_size)
    except OSError as error:
        wanted = f"{npages} huge pages of {page_size >> 10} kB cannot be reserved"
        raise OSError(error.errno, f"{wanted}: {error.strerror}") from error


def _shared(fd: int, npages: int, page_size: int) -> Memory:
    try:
        os.truncate(fd, npages * page_size)
        return Memory(mmap.mmap(fd, npages * page_size), page_size)
    finally:
        os.close(fd)


def _huge_page_size() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("Hugepagesize:"):
                return int(line.split()[1]) << 10
    raise OSError("this kernel has no huge pages")


MEMORIES: dict[str, Callable[[int], Memory]] = {
    "private anonymous": private_anonymous,
    "shared memfd": shared_memfd,
    "shared file": shared_tmpfs,
    "hugetlb": shared_hugetlb,
}
"""All kinds, by name; each makes a memory of so many pages."""


class Pin(Protocol):
    """Holds on to some pages of a memory.

    :cvar reads: whether what the pin sees can be looked at
    :cvar writes: whether the kernel can be made to write through it
    """

    reads: bool
    writes: bool

    def take(self) -> None:
        """Take the pages; they are held when this returns.

        :raise OSError: they cannot be
        """

    def read(self) -> list[bytes]:
        """The first :data:`PART` bytes of each page, as the pin sees them. May end the pin."""

    def write(self, value: int) -> None:
        """Fill the first :data:`PART` bytes of each page through the pin. May end it."""

    def release(self) -> None:
        """Let go of what is still held."""


class NoPin:
    """Nobody holds on to the pages."""

    reads = writes = False

    def __init__(self, memory: Memory, pages: Sequence[int]) -> None:
        pass

    def take(self) -> None:
        """See :meth:`Pin.take`."""

    def read(self) -> list[bytes]:
        """See :meth:`Pin.read`."""
        raise NotImplementedError

    def write(self, value: int) -> None:
        """See :meth:`Pin.write`."""
        raise NotImplementedError

    def release(self) -> None:
        """See :meth:`Pin.release`."""


class RegisteredBuffers:
    """io_uring's registered buffers: FOLL_PIN | FOLL_WRITE | FOLL_LONGTERM, as VFIO's."""

    reads = writes = True

    def __init__(self, memory: Memory, pages: Sequence[int]) -> None:
        self._buffers = [(memory.address + page * memory.page_size, PART) for page in pages]
        self._ring: iouring.Ring | None = None

    def take(self) -> None:
        """See :meth:`Pin.take`."""
        self._file = os.memfd_create("pins", os.MFD_CLOEXEC)
        self._ring = iouring.Ring()
        self._ring.register(self._buffers)

    def read(self) -> list[bytes]:
        """See :meth:`Pin.read`."""
        assert self._ring is not None
        seen = []
        for index in range(len(self._buffers)):
            self._ring.write(index, self._file)
            seen.append(os.pread(self._file, PART, 0))
        return seen

    def write(self, value: int) -> None:
        """See :meth:`Pin.write`."""
        assert self._ring is not None
        os.pwrite(self._file, bytes([value]) * PART, 0)
        for index in range(len(self._buffers)):
            self._ring.read(index, self._file)

    def release(self) -> None:
        """See :meth:`Pin.release`."""
        if self._ring is not None:
            self._ring.close()
            os.close(self._file)
        self._ring = None


class _InFlight:
    """Direct I/O on a file that does not answer yet."""

    def __init__(self, memory: Memory, pages: Sequence[int]) -> None:
        self._parts = [memory.part(page) for page in pages]
        self._held: fuse.HeldFile | None = None

    def release(self) -> None:
        """See :meth:`Pin.release`."""
        if self._held is not None:
            self._held.close()
        self._held = None


class WriteInFlight(_InFlight):
    """An O_DIRECT write, which reads the pages: FOLL_PIN, without FOLL_WRITE."""

    reads, writes = True, False

    def take(self) -> None:
        """See :meth:`Pin.take`."""
        self._held = fuse.HeldFile()
        self._held.begin_write(self._parts)

    def read(self) -> list[bytes]:
        """See :meth:`Pin.read`."""
        assert self._held is not None
        data = self._held.finish_write()
        return [data[at : at + PART] for at in range(0, len(data), PART)]

    def write(self, value: int) -> None:
        """See :meth:`Pin.write`."""
        raise NotImplementedError


class ReadInFlight(_InFlight):
    """An O_DIRECT read, which writes the pages when it is answered: FOLL_PIN | FOLL_WRITE."""

    reads, writes = False, True

    def take(self) -> None:
        """See :meth:`Pin.take`."""
        self._held = fuse.HeldFile()
        self._held.begin_read(self._parts)

    def read(self) -> list[bytes]:
        """See :meth:`Pin.read`."""
        raise NotImplementedError

    def write(self, value: int) -> None:
        """See :meth:`Pin.write`."""
        assert self._held is not None
        self._held.finish_read(bytes([value]) * PART * len(self._parts))


class Spliced:
    """vmsplice(2): a reference to each page (FOLL_GET), which promises less than a pin."""

    reads, writes = True, False

    def __init__(self, memory: Memory, pages: Sequence[int]) -> None:
        self._buffers = [(memory.address + page * memory.page_size, PART) for page in pages]
        self._pipe: tuple[int, int] | None = None

    def take(self) -> None:
        """See :meth:`Pin.take`."""
        self._pipe = os.pipe()
        for address, length in self._buffers:
            if vmsplice(self._pipe[1], address, length) != length:
                raise OSError("vmsplice: not all of a page")

    def read(self) -> list[bytes]:
        """See :meth:`Pin.read`."""
        assert self._pipe is not None
        return [os.read(self._pipe[0], PART) for _ in self._buffers]

    def write(self, value: int) -> None:
        """See :meth:`Pin.write`."""
        raise NotImplementedError

    def release(self) -> None:
        """See :meth:`Pin.release`."""
        for fd in self._pipe or ():
            os.close(fd)
        self._pipe = None
