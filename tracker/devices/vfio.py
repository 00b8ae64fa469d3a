"""What VFIO's legacy IOMMU (type 1) says that devices wrote.

The kernel keeps a bitmap for each mapping while dirty tracking is on; GET_BITMAP hands out those of
a range and clears them (Linux: ``vfio_iova_dirty_bitmap``, drivers/vfio/vfio_iommu_type1.c). While
any device of the container may write what is mapped without a word to the driver, which is so for
all but some mediated ones, *every mapped page is dirty at every reading*: true, and no news.
:attr:`VfioType1.exact` tells which it is.

There is one tracking for all who hold the container: a STOP of QEMU's (its own migration ends with
one) ends ours, and the next reading fails. QEMU's own migration must not run between :meth:`start`
and the last :meth:`collect`.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tracker.abi import vfio
from tracker.bits.pageset import PageSet
from tracker.devices.iova import IovaRange, Reach, Words, bitmap_memory, iova_ranges
from tracker.errors import RamError, SourceError
from tracker.memory.ram import GuestRange, RamBlock
from tracker.syscalls import ioctl

_log = logging.getLogger(__name__)

Span = tuple[int, int]  # IOVA and size in bytes


@dataclass(frozen=True)
class Type1Info:
    """What VFIO_IOMMU_GET_INFO says of a container.

    :ivar page_sizes: bytes, one bit each
    :ivar dirty_page_sizes: bytes, one bit each, that a dirty bit may stand for; 0 if there is no
        dirty tracking
    :ivar max_bitmap_bytes: the largest bitmap of one reading
    :ivar usable: IOVAs that may be mapped, as (first, last) pairs; empty if not told
    :ivar dma_avail: how many more mappings there may be; -1 if not told
    """

    page_sizes: int
    dirty_page_sizes: int
    max_bitmap_bytes: int
    usable: tuple[tuple[int, int], ...]
    dma_avail: int


def iommu_info(container: int) -> Type1Info:
    """VFIO_IOMMU_GET_INFO with its capabilities.

    :raise OSError: EINVAL where the container has no IOMMU, ENOTTY where it is none
    :raise ValueError: the chain of capabilities is broken
    """
    size = ctypes.sizeof(vfio.vfio_iommu_type1_info)
    while True:
        info = bytearray(size)
        head = vfio.vfio_iommu_type1_info.from_buffer(info)
        head.argsz = size
        ioctl("VFIO_IOMMU_GET_INFO", container, vfio.VFIO_IOMMU_GET_INFO, info)
        if head.argsz <= size:
            break
        size = head.argsz
    return parse_info(bytes(info))


def parse_info(info: bytes) -> Type1Info:
    """Parse the answer of VFIO_IOMMU_GET_INFO.

    :raise ValueError: a capability lies outside of it, or the chain does not end
    """
    head = vfio.vfio_iommu_type1_info.from_buffer_copy(info)
    dirty_page_sizes = max_bitmap_bytes = 0
    dma_avail = -1
    usable: tuple[tuple[int, int], ...] = ()
    for offset, kind in _capabilities(info, head):
        if kind == vfio.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION:
            migration = vfio.vfio_iommu_type1_info_cap_migration.from_buffer_copy(info, offset)
            dirty_page_sizes = migration.pgsize_bitmap
            max_bitmap_bytes = migration.max_dirty_bitmap_size
        elif kind == vfio.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
            listed = vfio.vfio_iommu_type1_info_cap_iova_range.from_buffer_copy(info, offset)
            array = vfio.vfio_iova_range * listed.nr_iovas
            ranges = array.from_buffer_copy(info, offset + ctypes.sizeof(listed))
            usable = tuple((one.start, one.end) for one in ranges)
        elif kind == vfio.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL:
            avail = vfio.vfio_iommu_type1_info_dma_avail.from_buffer_copy(info, offset)
            dma_avail = avail.avail
    return Type1Info(head.iova_pgsizes, dirty_page_sizes, max_bitmap_bytes, usable, dma_avail)


def _capabilities(info: bytes, head: vfio.vfio_iommu_type1_info) -> Iterator[tuple[int, int]]:
    offset = head.cap_offset if head.flags & vfio.VFIO_IOMMU_INFO_CAPS else 0
    seen: set[int] = set()
    while offset:
        if offset in seen:
            raise ValueError("the IOMMU's capabilities form a ring")
        seen.add(offset)
        header = vfio.vfio_info_cap_header.from_buffer_copy(info, offset)
        yield offset, header.id
        offset = header.next


def dirty_tracking(container: int, flag: int) -> None:
    """VFIO_IOMMU_DIRTY_PAGES with ``…_FLAG_START`` or ``…_FLAG_STOP``; either may be repeated.

    :raise OSError: ENOMEM where the kernel has no room for its bitmaps
    """
    argument = vfio.vfio_iommu_type1_dirty_bitmap(8, flag)
    name = "START" if flag == vfio.VFIO_IOMMU_DIRTY_PAGES_FLAG_START else "STOP"
    ioctl(f"VFIO_IOMMU_DIRTY_PAGES({name})", container, vfio.VFIO_IOMMU_DIRTY_PAGES, argument)


def dirty_bitmap(container: int, iova: int, size: int, page_size: int) -> Words:
    """VFIO_IOMMU_DIRTY_PAGES with GET_BITMAP: read the dirty bits of a range and clear them.

    Where nothing is mapped, the bits are zero.

    :param iova: and ``size``, in bytes: may contain mappings, and not cut one in two
    :param page_size: the smallest that the IOMMU has, in bytes
    :return: bit i is the page at ``iova + i * page_size``; some words more than are needed
    :raise OSError: EINVAL if a mapping is cut, the bitmap is too long, or tracking is off
    """
    nbits = size // page_size
    bits = bitmap_memory(nbits)
    argument = vfio.vfio_iommu_type1_get_bitmap()
    argument.head.argsz = ctypes.sizeof(argument)
    argument.head.flags = vfio.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP
    argument.get.iova = iova
    argument.get.size = size
    argument.get.bitmap.pgsize = page_size
    argument.get.bitmap.size = (nbits + 63) // 64 * 8
    argument.get.bitmap.data = bits.ctypes.data
    ioctl("VFIO_IOMMU_DIRTY_PAGES(GET_BITMAP)", container, vfio.VFIO_IOMMU_DIRTY_PAGES, argument)
    return bits


class VfioType1:
    """DMA writes of the devices in one legacy container.

    :ivar exact: valid after :meth:`start`: whether a reported page is news. ``False`` where two
        readings in a row said the same: pages that are dirty whatever happens, and worth a
        comparison only.
    """

    def __init__(
        self,
        container: int,
        blocks: Sequence[RamBlock],
        guest_ranges: Sequence[GuestRange],
        name: str = "vfio",
    ) -> None:
        """Take over a descriptor of the container, which :meth:`stop` closes."""
        self.name = name
        self.exact = False
        self._container = container
        self._blocks = tuple(blocks)
        self._guest_ranges = tuple(guest_ranges)
        self._tracking = False
        self._page_size = 0
        self._spans: list[Span] = []

    def start(self) -> None:
        """Turn tracking on, and find out how the container can be read.

        :raise SourceError: there is no dirty tracking, or RAM that cannot be read without cutting
            a mapping in two
        """
        try:
            info = iommu_info(self._container)
            if not info.dirty_page_sizes or not info.max_bitmap_bytes:
                raise SourceError(self.name, "the IOMMU of the container has no dirty tracking")
            self._page_size = info.dirty_page_sizes & -info.dirty_page_sizes
            ranges = iova_ranges(self._blocks, self._guest_ranges, self._page_size)
            self._reach = Reach(self._blocks, ranges)
            dirty_tracking(self._container, vfio.VFIO_IOMMU_DIRTY_PAGES_FLAG_START)
            self._tracking = True
            limit = info.max_bitmap_bytes // 8 * 64 * self._page_size
            self._spans = [
                span for group in _groups(ranges, limit) for span in self._readable(group, limit)
            ]
            first, second = self.collect(), self.collect()
            self.exact = second != first or not any(pages.any() for pages in second.values())
        except (OSError, ValueError, RamError) as error:
            self.stop()
            raise SourceError(self.name, str(error)) from error
        except BaseException:
            self.stop()
            raise

    def _readable(self, group: Sequence[IovaRange], limit: int) -> list[Span]:
        # The guest's map and the IOMMU's need not have the same borders: what is one range may be
        # several mappings, and what is several, one.
        start, end = group[0].iova, group[-1].end
        windows = range(start // limit * limit, end, limit)
        for spans in (
            [(start, end - start)],
            [(one.iova, one.size) for one in group],
            [(window, limit) for window in windows],
        ):
            if all(self._is_readable(*span) for span in spans):
                return spans
        raise SourceError(
            self.name,
            f"cannot be read at IOVA {start:#x} to {end:#x}: mappings lie across the ends",
        )

    def _is_readable(self, iova: int, size: int) -> bool:
        try:
            dirty_bitmap(self._container, iova, size, self._page_size)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def collect(self) -> PageSet:
        """Pages that a device wrote, or may have written, since the last call.

        :raise SourceError: tracking was ended by somebody else, or the mappings changed
        """
        if not self._tracking:
            raise SourceError(self.name, "was not started")
        dirty = self._reach.nothing()
        for iova, size in self._spans:
            try:
                bits = dirty_bitmap(self._container, iova, size, self._page_size)
            except OSError as error:
                reason = str(error)
                if error.errno == errno.EINVAL:
                    reason += " (was tracking ended by somebody else, or memory mapped anew?)"
                raise SourceError(self.name, reason) from error
            self._reach.add(dirty, bits, iova, size // self._page_size, self._page_size)
        return dirty

    def stop(self) -> None:
        """Turn tracking off, for everybody, and close the descriptor. May be called again."""
        if self._tracking:
            self._tracking = False
            try:
                dirty_tracking(self._container, vfio.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP)
            except OSError as error:
                _log.warning("%s: %s", self.name, error)
        if self._container >= 0:
            os.close(self._container)
            self._container = -1


def _groups(ranges: Sequence[IovaRange], limit: int) -> Iterator[list[IovaRange]]:
    """As few groups of neighbouring ranges as possible, none longer than ``limit`` bytes of IOVA.

    One range that is longer than that is a group of its own.
    """
    group: list[IovaRange] = []
    for one in ranges:
        if group and one.end - group[0].iova > limit:
            yield group
            group = []
        group.append(one)
    if group:
        yield group
