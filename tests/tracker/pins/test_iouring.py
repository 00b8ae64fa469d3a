"""An io_uring of our own: registered buffers are read and written, and failures are said."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from tests.conftest import require
from tracker.pins.iouring import Ring

pytestmark = pytest.mark.live

PAGE = mmap.PAGESIZE


@pytest.fixture
def ring() -> Iterator[Ring]:
    try:
        ring = Ring()
    except OSError as error:
        require(error.strerror)
        raise
    with ring:
        yield ring


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("test")
    yield fd
    os.close(fd)


def memory(npages: int) -> tuple[mmap.mmap, int]:
    pages = mmap.mmap(-1, npages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return pages, ctypes.addressof(ctypes.c_char.from_buffer(pages))


def test_more_transfers_than_the_ring_has_entries(ring: Ring, file: int) -> None:
    pages, address = memory(3)
    ring.register([(address, PAGE), (address + 2 * PAGE, 100)])
    for value in range(1, 20):
        pages[:PAGE] = bytes([value]) * PAGE
        ring.write(0, file)
        assert os.pread(file, 2 * PAGE, 0) == bytes([value]) * PAGE
        os.pwrite(file, bytes([value + 100]) * PAGE, 0)
        ring.read(1, file)
        assert pages[:PAGE] == bytes([value]) * PAGE
        assert pages[PAGE:] == bytes(PAGE) + bytes([value + 100]) * 100 + bytes(PAGE - 100)


def test_a_short_read_is_an_error(ring: Ring, file: int) -> None:
    pages, address = memory(1)
    ring.register([(address, PAGE)])
    os.pwrite(file, b"x" * 100, 0)
    with pytest.raises(OSError, match=f"IORING_OP_READ_FIXED: 100 of {PAGE} bytes"):
        ring.read(0, file)
    assert pages[:101] == b"x" * 100 + b"\0"


def test_a_failure_names_the_operation_and_the_ring_goes_on(ring: Ring, file: int) -> None:
    pages, address = memory(1)
    ring.register([(address, PAGE)])
    with pytest.raises(OSError, match="IORING_OP_WRITE_FIXED: Bad file descriptor") as caught:
        ring.write(0, -1)
    assert caught.value.errno == errno.EBADF
    pages[:1] = b"x"
    ring.write(0, file)
    assert os.pread(file, 1, 0) == b"x"


def test_memory_that_is_not_there_cannot_be_registered(ring: Ring) -> None:
    with pytest.raises(OSError, match="io_uring_register: Bad address"):
        ring.register([(1 << 46, PAGE)])


def test_the_pin_is_of_pages_and_not_of_addresses(ring: Ring, file: int) -> None:
    pages, address = memory(1)
    pages[:1] = b"a"
    ring.register([(address, PAGE)])
    pages.madvise(mmap.MADV_DONTNEED)
    pages[:1] = b"b"
    ring.write(0, file)
    assert os.pread(file, 1, 0) == b"a"


def test_closing_lets_go_of_everything() -> None:
    before = set(os.listdir("/proc/self/fd"))
    ring = Ring()
    assert set(os.listdir("/proc/self/fd")) != before
    ring.close()
    ring.close()
    assert set(os.listdir("/proc/self/fd")) == before
