"""Dirty bits of an IOMMU that has them: the kernel's self-test device, which is told what to set.

The sizes and edges are those of the kernel's tools/testing/selftests/iommu/iommufd.c.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import tracker.devices.iommufd
from tests.lab.inside.selftest.mock_iommu import (
    APERTURE_START,
    HUGE_IO_PAGE,
    HUGE_IOVA,
    IO_PAGE,
    NO_DIRTY,
    MockIommu,
)
from tracker.bits.pageset import PageSet
from tracker.devices.descriptors import Kind, vfio_descriptors
from tracker.devices.ioas import (
    address_spaces,
    devices,
    get_dirty_bitmap,
    page_tables,
    set_dirty_tracking,
)
from tracker.devices.iommufd import Iommufd
from tracker.errors import SourceError
from tracker.memory.ram import GuestRange, RamBlock

PAGE = 4096
KIB, MIB = 1 << 10, 1 << 20
HUGE_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
MFD_HUGETLB = 4

SIZES = [
    pytest.param(8 * KIB, id="half-a-byte-of-bits"),
    pytest.param(16 * KIB, id="one-byte"),
    pytest.param(64 * KIB, id="32-bits"),
    pytest.param(128 * KIB, id="one-word"),
    pytest.param(320 * KIB, id="two-words-and-a-half"),
    pytest.param(64 * MIB, id="a-page-of-bits"),
    pytest.param(128 * MIB, id="two-pages-of-bits"),
]


@pytest.fixture
def iommu() -> Iterator[MockIommu]:
    mock = MockIommu()
    yield mock
    mock.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@contextmanager
def memory(size: int, huge: bool = False) -> Iterator[int]:
    """Shared memory of this process; yields its address."""
    if huge:
        HUGE_POOL.write_text(str(-(-size // (2 * MIB))))
    fd = os.memfd_create("ram", MFD_HUGETLB if huge else 0)
    try:
        os.ftruncate(fd, max(size, 2 * MIB if huge else 0))
        with mmap.mmap(fd, 0) as ram:
            anchor = ctypes.c_char.from_buffer(ram)
            try:
                yield ctypes.addressof(anchor)
            finally:
                del anchor  # or the mapping could not be closed
    finally:
        os.close(fd)
        if huge:
            HUGE_POOL.write_text("0")


def block_of(size: int) -> RamBlock:
    return RamBlock("ram", size, PAGE, hva=0x7F0000000000, device=1, inode=2)


def source(
    iommu: MockIommu,
    stack: ExitStack,
    size: int,
    seen: list[GuestRange] | None = None,
    page_size: int = PAGE,
) -> Iommufd:
    """A source on a copy of the iommufd, not started."""
    seen = seen or [GuestRange(APERTURE_START, size, "ram", 0)]
    one = Iommufd(os.dup(iommu.fd), [block_of(size)], seen, page_size=page_size)
    stack.callback(one.stop)
    return one


def pages(report: PageSet) -> set[int]:
    assert report.keys() == {"ram"}
    return set_bits(report["ram"].words)


def set_bits(words: NDArray[np.uint64]) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def every(step: int, nbits: int) -> NDArray[np.uint64]:
    """Words in which one bit of ``step`` is set, which is a power of two up to 64 or more."""
    bits = np.zeros(-(-nbits // 64) * 64, bool)
    bits[:nbits:step] = True
    words: NDArray[np.uint64] = np.packbits(bits, bitorder="little").view(np.uint64)
    return words


def read(
    iommu: MockIommu, hwpt: int, size: int, at: int = 0, no_clear: bool = False
) -> NDArray[np.uint64]:
    """Read the bits of ``size`` bytes of IO pages into memory that begins ``at`` bytes late."""
    nbytes = -(-size // IO_PAGE // 64) * 8
    room = np.frombuffer(mmap.mmap(-1, nbytes + 2 * PAGE), np.uint8)
    bits = room[at : at + nbytes].view(np.uint64)
    get_dirty_bitmap(iommu.fd, hwpt, APERTURE_START, size, IO_PAGE, bits, no_clear)
    assert not room[:at].any(), "bits before the bitmap"
    read_bits: NDArray[np.uint64] = bits.copy()
    return read_bits


@pytest.mark.parametrize("page_size", [IO_PAGE, PAGE])
@pytest.mark.parametrize("size", SIZES)
def test_every_other_page(iommu: MockIommu, stack: ExitStack, size: int, page_size: int) -> None:
    with memory(size) as address:
        iommu.map(address, size, APERTURE_START)
        hwpt = iommu.attach()
        one = source(iommu, stack, size, page_size=page_size)
        one.start()
        assert pages(one.collect()) == set()
        marks = every(4, size // IO_PAGE)
        assert iommu.write(hwpt, APERTURE_START, size, marks) == -(-size // (2 * PAGE))
        assert pages(one.collect()) == set(range(0, size // PAGE, 2))
        assert pages(one.collect()) == set()
        assert one.exact


@pytest.mark.parametrize("size", [64 * MIB, 128 * MIB])
def test_huge_io_pages_are_dirty_as_a_whole(iommu: MockIommu, stack: ExitStack, size: int) -> None:
    with memory(size, huge=True) as address:
        iommu.map(address, size, APERTURE_START)
        hwpt = iommu.attach(flags=HUGE_IOVA)
        one = source(iommu, stack, size)
        one.start()
        step = 2 * HUGE_IO_PAGE // IO_PAGE
        iommu.write(hwpt, APERTURE_START, size, every(step, size // IO_PAGE))
        huge = HUGE_IO_PAGE // PAGE
        wanted = {page for page in range(size // PAGE) if page // huge % 2 == 0}
        assert pages(one.collect()) == wanted
        assert pages(one.collect()) == set()
        one.stop()


@pytest.mark.parametrize("page", [0, 31, 32, 63, 64, 8191, 16383, 16384, 32767])
def test_a_page_at_an_edge(iommu: MockIommu, stack: ExitStack, page: int) -> None:
    """Of a word of bits, and of a page of them: in the kernel's bitmap and in ours."""
    size = 128 * MIB
    with memory(size) as address:
        iommu.map(address, size, APERTURE_START)
        hwpt = iommu.attach()
        one = source(iommu, stack, size)
        one.start()
        iommu.write_pages(hwpt, APERTURE_START, {page})
        assert pages(one.collect()) == {page}


@pytest.mark.parametrize("at", [0, PAGE, 0xFF1], ids=["aligned", "next-page", "no-word"])
@pytest.mark.parametrize("size", SIZES)
def test_bits_at_any_address(iommu: MockIommu, size: int, at: int) -> None:
    """The call itself; NO_CLEAR leaves what is dirty dirty, and the call without it does not."""
    with memory(size) as address:
        iommu.map(address, size, APERTURE_START)
        hwpt = iommu.attach()
        set_dirty_tracking(iommu.fd, hwpt, True)
        marks = every(2, size // IO_PAGE)
        iommu.write(hwpt, APERTURE_START, size, marks)
        for _ in range(2):
            assert (read(iommu, hwpt, size, at, no_clear=True) == marks).all()
        assert (read(iommu, hwpt, size, at) == marks).all()
        assert not read(iommu, hwpt, size, at).any()


def test_bits_are_added_to_what_is_there(iommu: MockIommu) -> None:
    """Why the source reads into zeroed memory."""
    with memory(64 * KIB) as address:
        iommu.map(address, 64 * KIB, APERTURE_START)
        hwpt = iommu.attach()
        set_dirty_tracking(iommu.fd, hwpt, True)
        bits = np.frombuffer(mmap.mmap(-1, PAGE), np.uint64)
        bits[0] = 0b1010
        get_dirty_bitmap(iommu.fd, hwpt, APERTURE_START, 64 * KIB, IO_PAGE, bits)
        assert bits[0] == 0b1010


@pytest.mark.parametrize("hole", [(1, 2), (30, 40), (63, 65), (5, 100)])
def test_a_hole_in_the_mapping_hides_nothing(
    iommu: MockIommu, stack: ExitStack, hole: tuple[int, int]
) -> None:
    npages = 200
    size = npages * PAGE
    behind = hole[1]
    with memory(size) as address:
        iommu.map(address, hole[0] * PAGE, APERTURE_START)
        start = behind * PAGE
        iommu.map(address + start, size - start, APERTURE_START + start)
        hwpt = iommu.attach()
        one = source(iommu, stack, size)
        one.start()
        dirty = {0, hole[0] - 1, behind, npages - 1}
        iommu.write_pages(hwpt, APERTURE_START, dirty)
        # the kernel says nothing of what lies behind a hole, and calls that success
        once = set_bits(read(iommu, hwpt, size, no_clear=True))
        assert {bit // 2 for bit in once} == {0, hole[0] - 1}
        assert pages(one.collect()) == dirty
        assert pages(one.collect()) == set()


def test_pieces_of_the_guests_map(iommu: MockIommu, stack: ExitStack) -> None:
    """A hole as a PC has one, a part that is mapped for nobody, and neighbours in one mapping."""
    size = 100 * PAGE
    high = APERTURE_START + 64 * MIB
    seen = [
        GuestRange(0, 10 * PAGE, "ram", 0),  # below the aperture: cannot be mapped
        GuestRange(APERTURE_START, 20 * PAGE, "ram", 10 * PAGE),
        GuestRange(APERTURE_START + 20 * PAGE, 20 * PAGE + 1, "ram", 30 * PAGE),
        GuestRange(high, 40 * PAGE, "ram", 60 * PAGE),
    ]
    with memory(size) as address:
        iommu.map(address + 10 * PAGE, 40 * PAGE, APERTURE_START)
        iommu.map(address + 60 * PAGE, 40 * PAGE, high)
        hwpt = iommu.attach()
        one = source(iommu, stack, size, seen)
        one.start()
        iommu.write_pages(hwpt, APERTURE_START, {0, 19, 20, 39})
        iommu.write_pages(hwpt, high, {0, 39})
        assert pages(one.collect()) == {10, 29, 30, 49, 60, 99}


def test_all_devices_and_all_address_spaces(iommu: MockIommu, stack: ExitStack) -> None:
    size = 64 * PAGE
    other = iommu.make_ioas()
    with memory(size) as address:
        iommu.map(address, 32 * PAGE, APERTURE_START)
        iommu.map(address + 8 * PAGE, 56 * PAGE, APERTURE_START + 8 * PAGE, ioas=other)
        tables = [iommu.attach(), iommu.attach(), iommu.attach(ioas=other)]
        assert address_spaces(iommu.fd) == [iommu.ioas, other]
        assert len(devices(iommu.fd)) == 3
        one = source(iommu, stack, size)
        one.start()
        iommu.write_pages(tables[0], APERTURE_START, {0, 31})
        iommu.write_pages(tables[1], APERTURE_START, {1})
        iommu.write_pages(tables[2], APERTURE_START, {8, 32, 63})
        assert pages(one.collect()) == {0, 31, 1, 8, 32, 63}
        assert pages(one.collect()) == set()


def test_what_is_in_an_iommufd(iommu: MockIommu) -> None:
    with memory(PAGE) as address:
        iommu.map(address, PAGE, APERTURE_START)
        tracking = iommu.attach()
        blind = iommu.attach(dirty_bits=False, flags=NO_DIRTY)
        assert sorted(devices(iommu.fd).values()) == [False, True]
        assert address_spaces(iommu.fd) == [iommu.ioas]
        assert page_tables(iommu.fd, APERTURE_START) == {tracking: True, blind: False}
    (found,) = [one for one in vfio_descriptors(os.getpid()) if one.number == iommu.fd]
    assert found.kind is Kind.IOMMUFD


def test_the_last_of_a_source_turns_tracking_off(iommu: MockIommu, stack: ExitStack) -> None:
    with memory(PAGE) as address:
        iommu.map(address, PAGE, APERTURE_START)
        hwpt = iommu.attach()
        one = source(iommu, stack, PAGE)
        one.start()
        one.stop()
        one.stop()
        with pytest.raises(OSError, match="IOMMU_TEST_CMD"):  # nothing is marked without tracking
            iommu.write_pages(hwpt, APERTURE_START, {0})
        assert address_spaces(iommu.fd) == [iommu.ioas], "something was left behind"


# -- failures --------------------------------------------------------------------------------------


def attach_blind(iommu: MockIommu) -> None:
    iommu.attach()
    iommu.attach(dirty_bits=False, flags=NO_DIRTY)


@pytest.mark.parametrize(
    ("attach", "reason"),
    [
        (lambda iommu: None, "no page table"),
        (attach_blind, "has no dirty bits"),
    ],
)
def test_a_device_that_cannot_be_tracked(
    iommu: MockIommu, stack: ExitStack, attach: Callable[[MockIommu], None], reason: str
) -> None:
    with memory(PAGE) as address:
        iommu.map(address, PAGE, APERTURE_START)
        attach(iommu)
        one = source(iommu, stack, PAGE)
        with pytest.raises(SourceError, match=reason):
            one.start()
        with pytest.raises(SourceError, match="was not started"):
            one.collect()


def test_memory_that_is_unmapped_meanwhile_is_an_error(iommu: MockIommu, stack: ExitStack) -> None:
    size = 64 * PAGE
    with memory(size) as address:
        iommu.map(address, 32 * PAGE, APERTURE_START)
        iommu.map(address + 32 * PAGE, 32 * PAGE, APERTURE_START + 32 * PAGE)
        hwpt = iommu.attach()
        one = source(iommu, stack, size)
        one.start()
        one.collect()
        iommu.write_pages(hwpt, APERTURE_START, {40})
        iommu.unmap(APERTURE_START, 32 * PAGE)
        with pytest.raises(SourceError, match="mapped for devices changed"):
            one.collect()


def test_memory_that_is_mapped_meanwhile_is_an_error(iommu: MockIommu, stack: ExitStack) -> None:
    """It was not reached before, and nobody has looked there."""
    size = 64 * PAGE
    with memory(size) as address:
        iommu.map(address, 32 * PAGE, APERTURE_START)
        hwpt = iommu.attach()
        one = source(iommu, stack, size)
        one.start()
        one.collect()
        iommu.map(address + 40 * PAGE, 8 * PAGE, APERTURE_START + 40 * PAGE)
        iommu.write_pages(hwpt, APERTURE_START, {40})
        with pytest.raises(SourceError, match="mapped for devices changed"):
            one.collect()


def test_a_start_that_fails_half_way_is_undone(
    iommu: MockIommu, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two page tables the second fails, which no real one can be made to."""
    enabled: list[int] = []

    def fails_second(fd: int, hwpt: int, enable: bool) -> None:
        if enable and enabled:
            raise OSError(errno.ENOMEM, "IOMMU_HWPT_SET_DIRTY_TRACKING: no memory")
        if enable:
            enabled.append(hwpt)
        set_dirty_tracking(fd, hwpt, enable)

    monkeypatch.setattr(tracker.devices.iommufd, "set_dirty_tracking", fails_second)
    with memory(PAGE) as address:
        iommu.map(address, PAGE, APERTURE_START)
        tables = {iommu.attach(), iommu.attach()}
        one = source(iommu, stack, PAGE)
        with pytest.raises(SourceError, match="no memory"):
            one.start()
        assert enabled
        assert tables.issuperset(enabled)
        with pytest.raises(OSError, match="IOMMU_TEST_CMD"):  # nothing is marked without tracking
            iommu.write_pages(enabled[0], APERTURE_START, {0})


def test_a_device_that_is_plugged_meanwhile_is_an_error(iommu: MockIommu, stack: ExitStack) -> None:
    with memory(PAGE) as address:
        iommu.map(address, PAGE, APERTURE_START)
        iommu.attach()
        one = source(iommu, stack, PAGE)
        one.start()
        one.collect()
        iommu.attach()
        with pytest.raises(SourceError, match="page tables changed"):
            one.collect()


def test_a_descriptor_that_is_another_by_now_is_an_error(
    iommu: MockIommu, stack: ExitStack
) -> None:
    with memory(PAGE) as address:
        iommu.map(address, PAGE, APERTURE_START)
        iommu.attach()
        fd = os.dup(iommu.fd)
        one = Iommufd(fd, [block_of(PAGE)], [GuestRange(APERTURE_START, PAGE, "ram", 0)])
        stack.callback(one.stop)
        one.start()
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, fd)
        os.close(null)
        with pytest.raises(SourceError, match="Inappropriate ioctl"):
            one.collect()


def test_the_kernel_does_not_tell_that_tracking_ended(iommu: MockIommu, stack: ExitStack) -> None:
    """Why QEMU's own migration must not run meanwhile. Where a kernel tells, so does the source."""
    with memory(PAGE) as address:
        iommu.map(address, PAGE, APERTURE_START)
        hwpt = iommu.attach()
        one = source(iommu, stack, PAGE)
        one.start()
        iommu.write_pages(hwpt, APERTURE_START, {0})
        set_dirty_tracking(iommu.fd, hwpt, False)
        assert pages(one.collect()) == set()
