"""A real device writes memory through a real IOMMU: who reports it, and who cannot."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest

from tests.lab.inside.devices import Device
from tests.lab.inside.owned import NPAGES, PAGE, Owned, owned
from tests.tracker import naive
from tracker.abi import vfio as abi
from tracker.bits.merge import merge
from tracker.bits.pageset import PageSet
from tracker.devices.descriptors import Kind, vfio_descriptors
from tracker.devices.devicelog import DeviceLog, can_log
from tracker.devices.dma import dma_sources
from tracker.devices.vfio import VfioType1, dirty_bitmap, dirty_tracking, iommu_info
from tracker.errors import SourceError
from tracker.inject import acquire as inject
from tracker.memory.ram import GuestRange
from tracker.sources.uffd import UffdAsync

A, B = 0x100000, 0x800000  # IOVA of two mappings, which edu reaches
SEEN = [GuestRange(A, 48 * PAGE, "ram", 0), GuestRange(B, 64 * PAGE, "ram", 48 * PAGE)]
SOME = PAGE // 2  # bytes of DMA: QEMU aborts where edu is asked for all of its buffer
REACHED = set(range(112))  # the last 16 pages of the block are mapped for nobody


@pytest.fixture
def process(edu: Device) -> Iterator[Owned]:
    with owned(edu) as one:
        for seen in SEEN:
            one.do("map", seen.gpa, seen.size, seen.offset)
        yield one


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def type1(process: Owned, stack: ExitStack, seen: Sequence[GuestRange] = SEEN) -> VfioType1:
    """Start a source on a copy of the process's container."""
    source = VfioType1(process.copy_of(Kind.CONTAINER), [process.block], seen)
    stack.callback(source.stop)
    source.start()
    return source


def pages(report: PageSet) -> set[int]:
    assert report.keys() == {"ram"}
    assert report["ram"].npages == NPAGES
    return naive.pages_of(report["ram"].words)


def differing(before: Sequence[bytes], after: Sequence[bytes]) -> set[int]:
    return {page for page in range(NPAGES) if before[page] != after[page]}


def test_only_type1_reports_what_the_device_wrote(
    process: Owned, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inject, "_GRACE_S", 300.0)  # starting the injector takes seconds here
    uffd = UffdAsync(process.pid, [process.block])
    stack.callback(uffd.stop)
    uffd.start()
    (type1,) = dma_sources(process.pid, [process.block], SEEN)
    assert isinstance(type1, VfioType1)
    stack.callback(type1.stop)
    type1.start()
    assert not type1.exact, "edu writes what it likes: everything has to be dirty"
    sent = process.pages()
    assert pages(uffd.collect()) == set()
    type1.collect()

    # a DMA write, in either mapping
    process.do("device-reads", A + 7 * PAGE, SOME)
    process.do("device-writes", A + 20 * PAGE, SOME)
    process.do("device-writes", B + 2 * PAGE + 100, 50)
    now = process.pages()
    assert differing(sent, now) == {20, 50}
    assert now[20] == sent[7][:SOME] + sent[20][SOME:]
    by_cpu, by_device = uffd.collect(), type1.collect()
    assert pages(by_cpu) == set()
    assert pages(by_device) == REACHED

    # what a migration would send: the union, of which only what differs. With uffd alone, two
    # pages would be lost.
    union = merge(by_cpu.blocks, {"uffd": by_cpu, "vfio": by_device}).dirty
    assert differing(sent, now) <= pages(union)
    assert not differing(sent, now) <= pages(by_cpu)
    sent = now

    # a DMA read: claimed, as everything is, but nothing that a comparison would send
    process.do("device-reads", A + 5 * PAGE, SOME)
    assert pages(uffd.collect()) == set()
    assert pages(type1.collect()) == REACHED
    assert differing(sent, process.pages()) == set()

    # the CPU writes a page that is pinned, one that the device wrote, and one that is neither
    for page in (3, 20, 120):
        process.do("cpu-writes", page * PAGE, 0)
    assert pages(uffd.collect()) == {3, 20, 120}
    assert differing(sent, process.pages()) == {3, 20, 120}
    assert 120 not in pages(type1.collect())


def test_the_container_tells_what_it_can(process: Owned) -> None:
    container = process.copy_of(Kind.CONTAINER)
    try:
        info = iommu_info(container)
        assert info.page_sizes & PAGE
        assert info.dirty_page_sizes == PAGE
        assert info.max_bitmap_bytes == 256 << 20
        assert any(first <= A < last for first, last in info.usable)
        assert info.dma_avail > 0
    finally:
        os.close(container)


@pytest.mark.parametrize(
    "seen",
    [
        # pieces of one mapping, which cannot be read one by one
        [
            GuestRange(A, 16 * PAGE, "ram", 0),
            GuestRange(A + 16 * PAGE, 32 * PAGE, "ram", 16 * PAGE),
            SEEN[1],
        ],
        # ends that are inside of mappings, and are no ends of pages
        [
            GuestRange(A + 4 * PAGE + 1, 44 * PAGE - 1, "ram", 4 * PAGE + 1),
            GuestRange(B, 9 * PAGE + 5, "ram", 48 * PAGE),
        ],
        # the same, of which the guest sees something that is mapped nowhere
        [*SEEN, GuestRange(B + 64 * PAGE, 16 * PAGE, "ram", 112 * PAGE)],
    ],
)
def test_the_guests_map_need_not_be_the_mappings(
    process: Owned, stack: ExitStack, seen: list[GuestRange]
) -> None:
    source = type1(process, stack, seen)
    for one in seen:
        process.do("device-writes", one.gpa + one.size // 2, 16)
    wanted = {
        page
        for one in seen
        for page in range(-(-one.offset // PAGE), (one.offset + one.size) // PAGE)
    }
    assert pages(source.collect()) == wanted & REACHED


def test_a_mapping_is_not_cut_and_a_bitmap_not_longer_than_allowed(process: Owned) -> None:
    """What the source has to find its way around."""
    container = process.copy_of(Kind.CONTAINER)
    try:
        dirty_tracking(container, abi.VFIO_IOMMU_DIRTY_PAGES_FLAG_START)
        dirty_bitmap(container, A, 48 * PAGE, PAGE)
        too_much = (256 << 20) * 8 * PAGE + 64 * PAGE
        for iova, size in ((A + PAGE, 47 * PAGE), (A, 47 * PAGE), (0, A + PAGE), (0, too_much)):
            with pytest.raises(OSError, match="GET_BITMAP") as caught:
                dirty_bitmap(container, iova, size, PAGE)
            assert caught.value.errno == errno.EINVAL
    finally:
        dirty_tracking(container, abi.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP)
        os.close(container)


def test_a_hole_in_the_mappings_is_not_reached(process: Owned, stack: ExitStack) -> None:
    process.do("unmap", A, 48 * PAGE)
    process.do("map", A, 8 * PAGE, 0)
    process.do("map", A + 40 * PAGE, 8 * PAGE, 40 * PAGE)
    source = type1(process, stack)
    assert pages(source.collect()) == REACHED - set(range(8, 40))


def test_tracking_that_somebody_else_ended_is_an_error(process: Owned, stack: ExitStack) -> None:
    source = type1(process, stack)
    source.collect()
    other = process.copy_of(Kind.CONTAINER)
    dirty_tracking(other, abi.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP)
    os.close(other)
    process.do("device-writes", A, SOME)
    with pytest.raises(SourceError, match="ended by somebody else"):
        source.collect()


def test_a_mapping_that_grew_over_the_edge_is_an_error(process: Owned, stack: ExitStack) -> None:
    source = type1(process, stack)
    source.collect()
    process.do("unmap", B, 64 * PAGE)
    process.do("map", B, 80 * PAGE, 48 * PAGE)
    with pytest.raises(SourceError, match="mapped anew"):
        source.collect()


def test_a_descriptor_that_is_another_by_now_is_an_error(process: Owned, stack: ExitStack) -> None:
    container = process.copy_of(Kind.CONTAINER)
    source = VfioType1(container, [process.block], SEEN)
    stack.callback(source.stop)
    source.start()
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, container)
    os.close(null)
    with pytest.raises(SourceError, match="Inappropriate ioctl"):
        source.collect()


def test_stop_leaves_the_container_as_it_was(process: Owned, stack: ExitStack) -> None:
    source = type1(process, stack)
    source.stop()
    source.stop()
    other = process.copy_of(Kind.CONTAINER)
    try:
        with pytest.raises(OSError, match="GET_BITMAP"):
            dirty_bitmap(other, A, 48 * PAGE, PAGE)
    finally:
        os.close(other)
    process.do("device-writes", A, SOME)


def test_descriptors_are_found_once_each(process: Owned) -> None:
    process.do("duplicate")
    kinds = [one.kind for one in vfio_descriptors(process.pid)]
    assert sorted(kinds, key=lambda kind: kind.name) == [Kind.CONTAINER, Kind.LEGACY_DEVICE]


def test_a_device_without_a_log(process: Owned) -> None:
    device = process.copy_of(Kind.LEGACY_DEVICE)
    assert not can_log(device)
    log = DeviceLog({"edu": device}, [process.block], SEEN)
    with pytest.raises(SourceError, match=r"edu: .*Inappropriate ioctl"):
        log.start()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(device)


def test_a_guest_that_sees_other_blocks_is_refused(process: Owned, stack: ExitStack) -> None:
    seen = [GuestRange(A, 48 * PAGE, "another", 0)]
    (source,) = dma_sources(process.pid, [process.block], seen)
    stack.callback(source.stop)
    with pytest.raises(SourceError, match="the guest sees nothing of it"):
        source.start()
