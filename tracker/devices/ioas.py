"""What an iommufd holds: devices, IO address spaces, page tables, and what is mapped in them.

The kernel tells the objects' numbers to nobody but who made them. They are small, so all are tried:
a new object gets the lowest that is free (``xa_alloc``, drivers/iommu/iommufd/main.c).
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

from tracker.abi import iommufd
from tracker.devices.iova import PAGE_SIZE, IovaRange, Words, bitmap_memory
from tracker.errors import RamError
from tracker.syscalls import ioctl

IDS = 1024
"""Numbers tried, from 1."""

_PROBES = 1 << 16


def get_dirty_bitmap(
    fd: int, hwpt: int, iova: int, length: int, page_size: int, bits: Words, no_clear: bool = False
) -> None:
    """IOMMU_HWPT_GET_DIRTY_BITMAP: add the dirty bits of a range to ``bits``, and clear them.

    :param iova: and ``length``, in bytes, multiples of ``page_size``
    :param page_size: bytes a bit stands for, a power of two; a larger IO page sets all its bits
    :param bits: bit i is the page at ``iova + i * page_size``. The rest of the memory page that the
        last one lies in may be written to as well: :func:`tracker.devices.iova.bitmap_memory`
    :param no_clear: leave them dirty. Not for rounds: the next reading would report them again
    :raise OSError: ENOENT if there is no such page table, EOPNOTSUPP if it has no dirty bits
    """
    argument = iommufd.iommu_hwpt_get_dirty_bitmap(
        size=ctypes.sizeof(iommufd.iommu_hwpt_get_dirty_bitmap),
        hwpt_id=hwpt,
        flags=iommufd.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR if no_clear else 0,
        iova=iova,
        length=length,
        page_size=page_size,
        data=bits.ctypes.data,
    )
    ioctl("IOMMU_HWPT_GET_DIRTY_BITMAP", fd, iommufd.IOMMU_HWPT_GET_DIRTY_BITMAP, argument)


def set_dirty_tracking(fd: int, hwpt: int, enable: bool) -> None:
    """IOMMU_HWPT_SET_DIRTY_TRACKING; turning it on, also once more, clears all dirty bits.

    :raise OSError: EOPNOTSUPP if the page table has no dirty bits
    """
    argument = iommufd.iommu_hwpt_set_dirty_tracking(
        size=ctypes.sizeof(iommufd.iommu_hwpt_set_dirty_tracking),
        flags=iommufd.IOMMU_HWPT_DIRTY_TRACKING_ENABLE if enable else 0,
        hwpt_id=hwpt,
    )
    ioctl("IOMMU_HWPT_SET_DIRTY_TRACKING", fd, iommufd.IOMMU_HWPT_SET_DIRTY_TRACKING, argument)


def devices(fd: int, ids: int = IDS) -> dict[int, bool]:
    """Numbers of the devices bound to an iommufd, and whether the IOMMU of each has dirty bits.

    Mediated devices are not among them: they have no IOMMU, and what they write only their driver
    knows.

    :param ids: try the numbers up to this one
    :raise OSError: it is no iommufd
    """
    found = {}
    for number in range(1, ids + 1):
        argument = iommufd.iommu_hw_info(size=ctypes.sizeof(iommufd.iommu_hw_info), dev_id=number)
        if _exists("IOMMU_GET_HW_INFO", fd, iommufd.IOMMU_GET_HW_INFO, argument):
            capabilities = int(argument.out_capabilities)
            found[number] = bool(capabilities & iommufd.IOMMU_HW_CAP_DIRTY_TRACKING)
    return found


def address_spaces(fd: int, ids: int = IDS) -> list[int]:
    """Numbers of the IO address spaces (IOAS) of an iommufd.

    :param ids: try the numbers up to this one
    :raise OSError: it is no iommufd
    """
    found = []
    for number in range(1, ids + 1):
        argument = iommufd.iommu_ioas_iova_ranges(
            size=ctypes.sizeof(iommufd.iommu_ioas_iova_ranges), ioas_id=number
        )
        name, request = "IOMMU_IOAS_IOVA_RANGES", iommufd.IOMMU_IOAS_IOVA_RANGES
        if _exists(name, fd, request, argument, errno.EMSGSIZE):
            found.append(number)
    return found


def page_tables(fd: int, iova: int, ids: int = IDS) -> dict[int, bool]:
    """Numbers of the page tables (HWPT) of an iommufd, and whether each has dirty bits.

    Dirty bits stay as they are: they are read with NO_CLEAR.

    :param iova: where to look, a multiple of 4096
    :param ids: try the numbers up to this one
    :raise OSError: it is no iommufd, or the kernel knows no dirty tracking
    """
    bits = bitmap_memory(1)
    found = {}
    for number in range(1, ids + 1):
        try:
            get_dirty_bitmap(fd, number, iova, PAGE_SIZE, PAGE_SIZE, bits, no_clear=True)
        except OSError as error:
            if error.errno == errno.ENOENT:
                continue
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            found[number] = error.errno == errno.EINVAL  # it may say so while tracking is off
        else:
            found[number] = True
    return found


def _exists(
    name: str, fd: int, request: int, argument: ctypes.Structure, also: int = errno.ENOENT
) -> bool:
    try:
        ioctl(name, fd, request, argument)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        if error.errno != also:
            raise
    return True


class Scratch:
    """An empty IO address space that nobody uses: what can be copied into it is mapped elsewhere.

    Copying takes no memory of the guest and pins none, as no device is attached.
    """

    def __init__(self, fd: int) -> None:
        """Make one.

        :raise OSError: it is no iommufd
        """
        argument = iommufd.iommu_ioas_alloc(size=ctypes.sizeof(iommufd.iommu_ioas_alloc))
        ioctl("IOMMU_IOAS_ALLOC", fd, iommufd.IOMMU_IOAS_ALLOC, argument)
        self.number = int(argument.out_ioas_id)
        self._fd = fd
        self._probes = 0

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        argument = iommufd.iommu_destroy(size=ctypes.sizeof(iommufd.iommu_destroy), id=self.number)
        ioctl("IOMMU_DESTROY", self._fd, iommufd.IOMMU_DESTROY, argument)

    def is_mapped(self, ioas: int, one: IovaRange) -> bool:
        """Tell whether all of a range is mapped in an address space.

        :raise OSError: there is no such address space
        """
        argument = iommufd.iommu_ioas_copy(
            size=ctypes.sizeof(iommufd.iommu_ioas_copy),
            flags=iommufd.IOMMU_IOAS_MAP_READABLE,
            dst_ioas_id=self.number,
            src_ioas_id=ioas,
            length=one.size,
            src_iova=one.iova,
        )
        return _exists("IOMMU_IOAS_COPY", self._fd, iommufd.IOMMU_IOAS_COPY, argument)

    def mapped(self, ioas: int, one: IovaRange, smallest: int) -> Iterator[IovaRange]:
        """Those pieces of a range, down to ``smallest`` bytes, that are mapped.

        :raise RamError: so many pieces that this would never end
        """
        self._probes += 1
        if self._probes > _PROBES:
            raise RamError(one.block, "is mapped for devices only in part, and in many pieces")
        if self.is_mapped(ioas, one):
            yield one
        elif one.size > smallest:
            middle = one.iova + one.size // 2 // smallest * smallest
            yield from self.mapped(ioas, one.part(one.iova, middle), smallest)
            yield from self.mapped(ioas, one.part(middle, one.end), smallest)


def joined(pieces: Sequence[IovaRange]) -> list[IovaRange]:
    """Join neighbours, which are pieces of one range and in order of IOVA."""
    found: list[IovaRange] = []
    for one in pieces:
        before = found[-1] if found else None
        if before and before.block == one.block and before.end == one.iova:
            found[-1] = IovaRange(before.iova, before.size + one.size, one.block, before.offset)
        else:
            found.append(one)
    return found


def common_pieces(
    ranges: Sequence[IovaRange], spaces: Collection[Sequence[IovaRange]]
) -> list[IovaRange]:
    """Pieces of the ranges that are mapped somewhere, each of them whole or not at all everywhere.

    Which page table belongs to which address space is not told either.
    """
    edges = sorted({edge for mapped in spaces for one in mapped for edge in (one.iova, one.end)})
    pieces = []
    for one in ranges:
        cuts = [one.iova, *(edge for edge in edges if one.iova < edge < one.end), one.end]
        pieces += [one.part(*ends) for ends in pairwise(cuts)]

    def is_mapped(piece: IovaRange) -> bool:
        return any(
            one.iova <= piece.iova and piece.end <= one.end for mapped in spaces for one in mapped
        )

    return [piece for piece in pieces if is_mapped(piece)]
