"""What an IOMMU with dirty bits in its page tables says that devices wrote, asked through iommufd.

Since Linux commit 421a511a293f ("iommu/amd: Access/Dirty bit support in IOPTEs") and its
neighbours, in v6.7. Two things are not as one would expect
(``iommu_read_and_clear_dirty``, drivers/iommu/iommufd/io_pagetable.c):

- A failure in the middle of a range is dropped: the call succeeds, and the bits from there on are
  missing. So what is asked about is mapped as a whole, which is checked: IOMMU_IOAS_COPY of a range
  that has a hole fails.
- For the same reason *nobody tells that tracking has ended*: when another holder of the iommufd
  turns it off, all is clean from then on. QEMU does so when its own migration ends. It must not run
  between :meth:`Iommufd.start` and the last :meth:`Iommufd.collect`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from tracker.bits.pageset import PageSet
from tracker.devices.ioas import (
    IDS,
    Scratch,
    address_spaces,
    common_pieces,
    devices,
    get_dirty_bitmap,
    joined,
    page_tables,
    set_dirty_tracking,
)
from tracker.devices.iova import PAGE_SIZE, IovaRange, Reach, bitmap_memory, iova_ranges
from tracker.errors import RamError, SourceError
from tracker.memory.ram import GuestRange, RamBlock

_log = logging.getLogger(__name__)

_NEW_IDS = 64  # tried in each round, beyond the largest number found


class Iommufd:
    """DMA writes of the devices that are bound to one iommufd.

    :ivar exact: ``True``: what is reported was written, as far as the IOMMU tells
    """

    exact = True

    def __init__(
        self,
        fd: int,
        blocks: Sequence[RamBlock],
        guest_ranges: Sequence[GuestRange],
        name: str = "iommufd",
        page_size: int = PAGE_SIZE,
    ) -> None:
        """Take over a descriptor of the iommufd, which :meth:`stop` closes.

        :param page_size: bytes a dirty bit stands for, a power of two
        """
        self.name = name
        self._fd = fd
        self._blocks = tuple(blocks)
        self._guest_ranges = tuple(guest_ranges)
        self._page_size = page_size
        self._unit = max(page_size, PAGE_SIZE)
        self._tracked: list[int] = []
        self._tables: dict[int, bool] = {}
        self._ids = IDS
        self._mapped: dict[int, list[IovaRange]] = {}
        self._pieces: list[IovaRange] = []

    def start(self) -> None:
        """Find what is mapped, and turn tracking on in all page tables.

        :raise SourceError: there is no page table, or one that has no dirty bits
        """
        try:
            ranges = iova_ranges(self._blocks, self._guest_ranges, self._unit)
            self._reach = Reach(self._blocks, ranges)
            self._mapped = self._mappings(IDS)
            self._pieces = common_pieces(ranges, self._mapped.values())
            self._tables = page_tables(self._fd, ranges[0].iova)
            objects = [*self._mapped, *self._tables, *devices(self._fd)]
            self._ids = max(objects, default=0) + _NEW_IDS
            self._enable()
        except (OSError, RamError) as error:
            self.stop()
            raise SourceError(self.name, str(error)) from error
        except BaseException:
            self.stop()
            raise

    def _enable(self) -> None:
        if not self._tables:
            raise SourceError(self.name, "there is no page table: no device is attached")
        if blind := [number for number, tracks in self._tables.items() if not tracks]:
            raise SourceError(
                self.name,
                f"page table {blind[0]} has no dirty bits: its IOMMU cannot track writes",
            )
        for number in self._tables:
            set_dirty_tracking(self._fd, number, True)
            self._tracked.append(number)

    def collect(self) -> PageSet:
        """Pages that a device wrote since the last call.

        :raise SourceError: a page table cannot be read or appeared since the start, or a mapping is
            not what it was
        """
        if not self._tracked:
            raise SourceError(self.name, "was not started")
        dirty = self._reach.nothing()
        try:
            for one in self._pieces:
                nbits = one.size // self._page_size
                for number in self._tracked:
                    bits = bitmap_memory(nbits)
                    get_dirty_bitmap(self._fd, number, one.iova, one.size, self._page_size, bits)
                    self._reach.add(dirty, bits, one.iova, nbits, self._page_size)
            self._check_unchanged()
        except (OSError, RamError) as error:
            raise SourceError(self.name, str(error)) from error
        return dirty

    def _mappings(self, ids: int) -> dict[int, list[IovaRange]]:
        # what of the blocks is mapped, by address space
        spaces = address_spaces(self._fd, ids)
        with Scratch(self._fd) as scratch:
            return {
                ioas: [
                    piece
                    for one in self._reach.ranges
                    for piece in joined(list(scratch.mapped(ioas, one, self._unit)))
                ]
                for ioas in spaces
            }

    def _check_unchanged(self) -> None:
        # after the reading: what was unmapped before it, is still
        if self._mappings(self._ids) != self._mapped:
            raise SourceError(self.name, "what is mapped for devices changed")
        if page_tables(self._fd, self._reach.ranges[0].iova, self._ids) != self._tables:
            raise SourceError(self.name, "the page tables changed: was a device plugged?")

    def stop(self) -> None:
        """Turn tracking off and close the descriptor. May be called again."""
        while self._tracked:
            number = self._tracked.pop()
            try:
                set_dirty_tracking(self._fd, number, False)
            except OSError as error:
                _log.warning("%s: page table %d: %s", self.name, number, error)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
