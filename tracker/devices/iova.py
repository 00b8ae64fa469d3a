"""RAM blocks as a device sees them: pieces of IO address space (IOVA), and their dirty bits.

Without an IOMMU in the guest, QEMU maps every piece of RAM for its devices at the address where the
CPU sees it: IOVA = GPA. What holds for the one map holds for the other: the PC's hole below 4 GiB
cuts a block in two, ROM and video memory lie in between, and a page can be seen at two places.

A page of a block that no range covers cannot be reached by DMA: nothing is ever said about it, and
nothing needs to be. Dirty bits that lie in no range are of ROM, video memory or another device, and
are ignored on purpose: QEMU's own stream carries those.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracker.bits import rescale
from tracker.bits.pageset import PageSet
from tracker.errors import BitmapError, RamError
from tracker.memory.ram import GuestRange, RamBlock

Words = NDArray[np.uint64]

PAGE_SIZE = 4096
"""Bytes: no IOMMU on the supported machines maps less, whatever larger sizes it has."""


@dataclass(frozen=True)
class IovaRange:
    """A piece of a block as a device sees it.

    :ivar iova: of the first byte, a multiple of the IOMMU's page size
    :ivar size: bytes, as well
    :ivar block: name of the RAM block
    :ivar offset: block offset of the first byte
    """

    iova: int
    size: int
    block: str
    offset: int

    @property
    def end(self) -> int:
        """IOVA of the first byte after it."""
        return self.iova + self.size

    def part(self, start: int, end: int) -> IovaRange:
        """Make the range of the IOVAs ``start <= iova < end`` of this one."""
        return IovaRange(start, end - start, self.block, self.offset + start - self.iova)


def iova_ranges(
    blocks: Iterable[RamBlock], guest_ranges: Iterable[GuestRange], page_size: int = PAGE_SIZE
) -> list[IovaRange]:
    """Where devices reach the blocks, in order of IOVA.

    As QEMU does (``hw/vfio/common.c``, ``vfio_get_section_iova_range``), ends that are not aligned
    to the IOMMU's page are cut off: part of a page cannot be mapped.

    :param guest_ranges: what the guest sees, with or without ROM and the like
    :param page_size: the IOMMU's smallest page, in bytes, a power of two
    :raise RamError: a range leaves its block, two of them have an IOVA in common, or the guest sees
        nothing of a block: its devices' writes would be looked for nowhere
    """
    blocks = tuple(blocks)
    sizes = {block.name: block.size for block in blocks}
    found: list[IovaRange] = []
    for seen in sorted(guest_ranges, key=lambda seen: seen.gpa):
        if seen.block not in sizes:
            continue
        whole = IovaRange(seen.gpa, seen.size, seen.block, seen.offset)
        if whole.offset < 0 or whole.offset + whole.size > sizes[whole.block]:
            raise RamError(whole.block, f"the guest sees more of it than there is: {seen}")
        start, end = -(-whole.iova // page_size) * page_size, whole.end // page_size * page_size
        if start >= end:
            continue
        if found and found[-1].end > start:
            raise RamError(whole.block, f"two ranges are at IOVA {start:#x}: {found[-1]}, {seen}")
        found.append(whole.part(start, end))
    for block in blocks:
        if not any(one.block == block.name for one in found):
            raise RamError(block.name, "the guest sees nothing of it, so no device reaches it")
    return found


def spans(ranges: Iterable[IovaRange]) -> list[tuple[int, int]]:
    """IOVA and size in bytes of what the ranges cover, neighbours joined.

    :param ranges: in order of IOVA
    """
    found: list[tuple[int, int]] = []
    for one in ranges:
        if found and sum(found[-1]) == one.iova:
            found[-1] = (found[-1][0], one.end - found[-1][0])
        else:
            found.append((one.iova, one.size))
    return found


def bitmap_memory(nbits: int) -> Words:
    """Zeroed words for ``nbits`` bits, that the kernel may write to.

    Whole pages of their own: an IO page that is larger than what is asked about is reported to its
    end (Linux: ``iova_bitmap_set``, drivers/iommu/iommufd/iova_bitmap.c), past the last bit.
    """
    nbytes = max(1, -(-nbits // (8 * mmap.PAGESIZE))) * mmap.PAGESIZE
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint64)


class Reach:
    """The pages of all blocks that a device reaches, and bitmaps of them.

    :ivar ranges: in order of IOVA
    """

    def __init__(self, blocks: Sequence[RamBlock], ranges: Sequence[IovaRange]) -> None:
        self._blocks = {block.name: block for block in blocks}
        self.ranges = tuple(ranges)

    def nothing(self) -> PageSet:
        """Make an empty set of pages."""
        return PageSet.empty(self._blocks.values())

    def everything(self) -> PageSet:
        """Make the set of all pages that are reached, in whole or in part."""
        pages = self.nothing()
        for one in self.ranges:
            self.add_all(pages, one)
        return pages

    def add_all(self, pages: PageSet, one: IovaRange) -> None:
        """Set all pages of a range."""
        size = self._blocks[one.block].page_size
        last = one.offset + one.size - 1
        pages[one.block].set_range(one.offset // size, last // size + 1)

    def add(self, pages: PageSet, bits: Words, iova: int, nbits: int, bit_size: int) -> None:
        """Set the pages of all blocks that a bitmap of IO address space says are dirty.

        :param bits: bit i is the ``bit_size`` bytes at ``iova + i * bit_size``
        :param nbits: how many bits count
        :raise BitmapError: a range of a block lies across the edge of a bit
        """
        end = iova + nbits * bit_size
        for one in self.ranges:
            start, stop = max(one.iova, iova), min(one.end, end)
            if start >= stop:
                continue
            first, remainder = divmod(start - iova, bit_size)
            if remainder or (stop - start) % bit_size:
                raise BitmapError(f"bits of {bit_size} bytes from {iova:#x} do not fit {one}")
            rescale.spread(
                bits,
                first,
                (stop - start) // bit_size,
                bit_size,
                pages[one.block].words,
                self._blocks[one.block].page_size,
                one.offset + start - one.iova,
            )
