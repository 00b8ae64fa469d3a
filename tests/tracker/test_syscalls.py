"""The calls of tracker.syscalls, made for real on this process; and what their errors say."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import require
from tracker import syscalls
from tracker.abi import ptrace, unistd, userfaultfd
from tracker.abi.pagemap import PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING
from tracker.inject.registers import machine_of

PAGE = mmap.PAGESIZE
NPAGES = 16
WANTED = (
    userfaultfd.UFFD_FEATURE_WP_ASYNC
    | userfaultfd.UFFD_FEATURE_WP_UNPOPULATED
    | userfaultfd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
)


@pytest.fixture
def uffd() -> Iterator[int]:
    """A new userfaultfd of this process, before UFFDIO_API."""
    number = machine_of(os.getpid()).numbers.userfaultfd
    flags = os.O_CLOEXEC | os.O_NONBLOCK | userfaultfd.UFFD_USER_MODE_ONLY
    fd = ctypes.CDLL(None, use_errno=True).syscall(number, flags)
    require(f"userfaultfd: {os.strerror(ctypes.get_errno())}" if fd == -1 else None)
    yield fd
    os.close(fd)


@pytest.fixture
def memory(tmp_path: Path) -> tuple[mmap.mmap, int]:
    """A shared file mapping of NPAGES, and its address."""
    with open(tmp_path / "memory", "w+b") as file:
        file.truncate(NPAGES * PAGE)
        mapping = mmap.mmap(file.fileno(), NPAGES * PAGE)
    return mapping, ctypes.addressof(ctypes.c_char.from_buffer(mapping))


@pytest.fixture
def pagemap_fd() -> Iterator[int]:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def scan(fd: int, start: int, **more: Any) -> tuple[list[tuple[int, int]], int]:
    """Report and protect again: runs of written pages, and the page where the walk ended."""
    regions = np.zeros((more.pop("rows", 8), 3), dtype=np.uint64)
    count, end = syscalls.pagemap_scan(
        fd,
        start,
        start + NPAGES * PAGE,
        regions,
        flags=PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        category_mask=PAGE_IS_WRITTEN,
        return_mask=PAGE_IS_WRITTEN,
        **more,
    )
    assert (regions[:count, 2] == PAGE_IS_WRITTEN).all()
    runs = (regions[:count, :2] - np.uint64(start)) // np.uint64(PAGE)
    return [(int(first), int(last)) for first, last in runs], (end - start) // PAGE


@pytest.mark.live
def test_written_pages_are_reported(
    uffd: int, memory: tuple[mmap.mmap, int], pagemap_fd: int
) -> None:
    mapping, start = memory
    assert syscalls.uffd_api(uffd, WANTED) & WANTED == WANTED
    mode = userfaultfd.UFFDIO_REGISTER_MODE_WP
    ioctls = syscalls.uffd_register(uffd, start, NPAGES * PAGE, mode)
    assert ioctls & 1 << (userfaultfd.UFFDIO_WRITEPROTECT & 0xFF)

    assert scan(pagemap_fd, start) == ([(0, NPAGES)], NPAGES)
    assert scan(pagemap_fd, start) == ([], NPAGES)
    for page in (3, 7, 8):
        mapping[page * PAGE] = 1
    assert scan(pagemap_fd, start) == ([(3, 4), (7, 9)], NPAGES)
    assert scan(pagemap_fd, start) == ([], NPAGES)

    for page in (1, 5, 9):
        mapping[page * PAGE] = 1
    assert scan(pagemap_fd, start, rows=2) == ([(1, 2), (5, 6)], 9)
    mapping[12 * PAGE] = 1
    found, end = scan(pagemap_fd, start, max_pages=1)
    assert found == [(9, 10)]
    assert 10 <= end <= 12
    assert scan(pagemap_fd, start) == ([(12, 13)], NPAGES)

    syscalls.uffd_unregister(uffd, start, NPAGES * PAGE)
    with pytest.raises(PermissionError) as caught:
        scan(pagemap_fd, start)
    assert caught.value.strerror == "PAGEMAP_SCAN: Operation not permitted"


@pytest.mark.live
def test_ioctls_that_fail_are_named(uffd: int) -> None:
    with pytest.raises(OSError, match="UFFDIO_API: Invalid argument") as caught:
        syscalls.uffd_api(uffd, 1 << 63)
    assert caught.value.errno == errno.EINVAL
    syscalls.uffd_api(uffd, 0)
    with pytest.raises(OSError, match="UFFDIO_REGISTER: Invalid argument"):
        syscalls.uffd_register(uffd, 1, PAGE, userfaultfd.UFFDIO_REGISTER_MODE_WP)
    with pytest.raises(OSError, match="UFFDIO_UNREGISTER: Invalid argument"):
        syscalls.uffd_unregister(uffd, 1, PAGE)


@pytest.mark.parametrize(
    ("regions", "complaint"),
    [
        (np.zeros((4, 3), dtype=np.int64), "native uint64"),
        (np.zeros((4, 3), dtype=np.dtype(np.uint64).newbyteorder()), "native uint64"),
        (np.zeros((3, 4), dtype=np.uint64), "shape"),
        (np.zeros(12, dtype=np.uint64), "shape"),
        (np.zeros((8, 3), dtype=np.uint64)[::2], "C-contiguous"),
        (np.broadcast_to(np.uint64(0), (4, 3)), "C-contiguous"),
    ],
    ids=["signed", "swapped", "transposed", "flat", "strided", "read-only"],
)
def test_regions_the_kernel_cannot_fill(regions: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        syscalls.pagemap_scan(-1, 0, PAGE, regions, flags=0, category_mask=0, return_mask=0)


def test_pidfd_getfd_copies_a_descriptor() -> None:
    reader, writer = os.pipe()
    pidfd = os.pidfd_open(os.getpid())
    copy = syscalls.pidfd_getfd(pidfd, writer)
    try:
        assert not os.get_inheritable(copy)
        os.close(writer)
        os.write(copy, b"through the copy")
        assert os.read(reader, 100) == b"through the copy"
        with pytest.raises(OSError, match="pidfd_getfd: Bad file descriptor"):
            syscalls.pidfd_getfd(pidfd, 1 << 20)
    finally:
        for fd in (copy, pidfd, reader):
            os.close(fd)


def test_pidfd_getfd_has_one_number() -> None:
    assert unistd.X86_64.pidfd_getfd == unistd.AARCH64.pidfd_getfd


def test_ptrace_error_is_named() -> None:
    with pytest.raises(ProcessLookupError) as caught:
        syscalls.ptrace_request(ptrace.Request.CONT, os.getpid())
    assert caught.value.strerror == "ptrace(PTRACE_CONT): No such process"
