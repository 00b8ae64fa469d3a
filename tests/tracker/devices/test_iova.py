"""IO address space and block offsets, and dirty bits brought from the one to the other."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from tests.tracker import naive
from tracker.devices.iova import IovaRange, Reach, bitmap_memory, iova_ranges, spans
from tracker.errors import BitmapError, RamError
from tracker.memory.ram import GuestRange, RamBlock

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def block(name: str, size: int, page_size: int = 4096) -> RamBlock:
    return RamBlock(name, size, page_size, hva=0x7F0000000000, device=1, inode=2)


PC = [  # what `info mtree -f` says of a pc with 4 GiB
    GuestRange(0, 0xC0000, "ram", 0),
    GuestRange(0xC0000, 0x20000, "pc.rom", 0),
    GuestRange(0xE0000, 0x20000, "pc.bios", 0x20000),
    GuestRange(0x100000, 3 * GIB - 0x100000, "ram", 0x100000),
    GuestRange(0xFD000000, 16 * MIB, "vga.vram", 0),
    GuestRange(4 * GIB, GIB, "ram", 3 * GIB),
]


def test_a_pc_has_a_hole_and_what_is_not_ram() -> None:
    assert iova_ranges([block("ram", 4 * GIB)], PC[::-1]) == [
        IovaRange(0, 0xC0000, "ram", 0),
        IovaRange(0x100000, 3 * GIB - 0x100000, "ram", 0x100000),
        IovaRange(4 * GIB, GIB, "ram", 3 * GIB),
    ]


def test_ends_that_are_no_page_are_cut_off() -> None:
    seen = [
        GuestRange(0x0, 0x1800, "ram", 0),
        GuestRange(0x1800, 0x800, "ram", 0x1800),  # no whole page at all
        GuestRange(0x2800, 0x2000, "ram", 0x2800),
    ]
    ram = [block("ram", 64 * KIB)]
    assert iova_ranges(ram, seen) == [
        IovaRange(0, 0x1000, "ram", 0),
        IovaRange(0x3000, 0x1000, "ram", 0x3000),
    ]
    with pytest.raises(RamError, match="the guest sees nothing of it"):
        iova_ranges(ram, seen, 65536)


def test_a_page_that_is_seen_twice_is_reached_twice() -> None:
    seen = [GuestRange(0, 0x4000, "ram", 0), GuestRange(GIB, 0x2000, "ram", 0x1000)]
    reach = Reach([block("ram", 0x4000)], iova_ranges([block("ram", 0x4000)], seen))
    assert [one.offset for one in reach.ranges] == [0, 0x1000]
    pages = reach.nothing()
    reach.add(pages, np.array([0b10], np.uint64), GIB, 2, 4096)
    assert naive.pages_of(pages["ram"].words) == {2}


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        ([GuestRange(0, 0x5000, "ram", 0)], "more of it than there is"),
        ([GuestRange(0, 0x1000, "ram", 0x4000)], "more of it than there is"),
        ([GuestRange(0, 0x2000, "ram", 0), GuestRange(0x1000, 0x1000, "ram", 0)], "two ranges"),
        ([GuestRange(0, 0x2000, "other", 0)], "sees nothing of it"),
        ([], "sees nothing of it"),
    ],
)
def test_what_cannot_be(seen: list[GuestRange], reason: str) -> None:
    with pytest.raises(RamError, match=reason) as caught:
        iova_ranges([block("ram", 0x4000)], seen)
    assert caught.value.block == "ram"


def test_spans_join_neighbours_of_any_block() -> None:
    ranges = [
        IovaRange(0, 0x1000, "a", 0),
        IovaRange(0x1000, 0x2000, "b", 0x5000),
        IovaRange(0x4000, 0x1000, "b", 0),
    ]
    assert spans(ranges) == [(0, 0x3000), (0x4000, 0x1000)]


@pytest.mark.parametrize("nbits", [0, 1, 64, 8 * 4096, 8 * 4096 + 1])
def test_bitmap_memory_is_whole_pages_of_zeros(nbits: int) -> None:
    words = bitmap_memory(nbits)
    assert words.ctypes.data % mmap.PAGESIZE == 0
    assert words.nbytes % mmap.PAGESIZE == 0
    assert words.nbytes * 8 >= max(nbits, 1)
    assert words.flags.writeable
    assert not words.any()


@st.composite
def layouts(draw: st.DrawFn, iommu_page: int) -> tuple[list[RamBlock], list[GuestRange]]:
    """Blocks of their own page sizes, in pieces, at any place, with other things in between."""
    blocks, seen = [], []
    gpa = draw(st.integers(0, 3)) * iommu_page
    for name in draw(st.sampled_from([["a"], ["a", "b"]])):
        page_size = draw(st.sampled_from([4096, 16384]))
        npages = draw(st.integers(1, 80))
        blocks.append(block(name, npages * page_size, page_size))
        offset = 0
        while offset < npages * page_size:
            size = min(draw(st.integers(1, 300)) * 2048, npages * page_size - offset)
            seen.append(GuestRange(gpa, size, name, offset))
            offset += size
            gap = draw(st.sampled_from([0, 0, 2048, iommu_page, 70 * iommu_page]))
            if gap and draw(st.booleans()):
                seen.append(GuestRange(gpa + size, gap, "vga.vram", 0))
            gpa += size + gap
    return blocks, seen


@given(st.data(), st.sampled_from([2048, 4096, 8192]))
def test_dirty_iova_is_dirty_block(data: st.DataObject, iommu_page: int) -> None:
    blocks, seen = data.draw(layouts(iommu_page))
    try:
        ranges = iova_ranges(blocks, seen, iommu_page)
    except RamError as error:
        if "sees nothing of it" not in error.reason:  # else a block too small to be mapped
            raise
        reject()
    base = data.draw(st.integers(0, 5)) * iommu_page
    nbits = (max(one.gpa + one.size for one in seen) + 5 * iommu_page - base) // iommu_page
    bits = data.draw(st.sets(st.integers(0, nbits - 1), max_size=20))
    if data.draw(st.booleans()):
        bits = set(range(nbits)) - bits
    reach = Reach(blocks, ranges)
    pages = reach.nothing()
    reach.add(pages, naive.words_of(bits, nbits), base, nbits, iommu_page)

    wanted: dict[str, set[int]] = {one.name: set() for one in blocks}
    reached: dict[str, set[int]] = {one.name: set() for one in blocks}
    for one in seen:
        if one.block not in wanted:
            continue
        page_size = next(b.page_size for b in blocks if b.name == one.block)
        first = -(-one.gpa // iommu_page)
        for io_page in range(first, (one.gpa + one.size) // iommu_page):
            start = one.offset + io_page * iommu_page - one.gpa
            touched = naive.touched(start, start + iommu_page, page_size)
            reached[one.block] |= touched
            if io_page - base // iommu_page in bits:
                wanted[one.block] |= touched
    assert {name: naive.pages_of(found.words) for name, found in pages.items()} == wanted
    everything = {name: naive.pages_of(found.words) for name, found in reach.everything().items()}
    assert everything == reached


def test_bits_that_do_not_fit_the_ranges_are_refused() -> None:
    reach = Reach([block("ram", 0x4000)], [IovaRange(0x1000, 0x3000, "ram", 0x1000)])
    with pytest.raises(BitmapError, match="do not fit"):
        reach.add(reach.nothing(), np.zeros(1, np.uint64), 0, 2, 8192)
