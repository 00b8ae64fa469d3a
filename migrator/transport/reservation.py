"""Pages of the destination's RAM files that are allocated before any content is there.

A page that is reserved reads as zeros, and to SEEK_DATA it is a hole until it is written (Linux:
``mm/filemap.c:folio_seek_hole_data``, unwritten extents elsewhere): the pages that hold data stay
those that were copied. On hugetlbfs QEMU reserves all of a block when it maps it.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence

from migrator.errors import NoSpace
from migrator.transport.space import Room, Shortage, room_of
from tracker.bits.bitmap import DirtyBitmap
from tracker.memory.pages import punch_pages, reserve_pages
from tracker.memory.ram import RamBlock

_log = logging.getLogger(__name__)
_PART_WORDS = 1024  # 65536 pages between two looks at the space that is left
_UNABLE = (errno.EOPNOTSUPP, errno.ENOSYS)


class Reservation:
    """The pages of one block that this migration has allocated at the destination.

    :ivar pages: pages that were reserved
    :param fd: the destination's file, not to be closed before this is let go of
    :param held: pages that the file holds already: they stay
    """

    def __init__(self, fd: int, block: RamBlock, held: DirtyBitmap) -> None:
        self.fd, self.block = fd, block
        self.pages = DirtyBitmap.empty(block.npages)
        self._held = held.copy()
        self._lock = threading.Lock()
        self._over = False

    def room(self) -> Room:
        """See :func:`migrator.transport.space.room_of`."""
        return room_of(self.fd, self.block)

    def wanted(self, pages: DirtyBitmap) -> DirtyBitmap:
        """The pages of these that can be reserved, and are not there yet."""
        if self.room().free_bytes is None:
            return DirtyBitmap.empty(self.block.npages)
        return pages - self._held

    def reserve(self, wanted: DirtyBitmap, first: int, last: int) -> int:
        """Allocate the pages of a slice of words; they count as reserved even if that fails.

        :return: 0 or an errno
        """
        with self._lock:
            if self._over:
                return errno.ECANCELED
            self.pages.words[first:last] |= wanted.words[first:last]
            return int(reserve_pages(self.fd, self.block.page_size, wanted.words, first, last))

    def discard(self, pages: DirtyBitmap) -> int:
        """Punch those of the pages that are only reserved: the source has discarded them.

        :return: 0 or an errno
        """
        with self._lock:
            given = pages & self.pages
            if not given.any():
                return 0
            self.pages = self.pages - given
            return int(punch_pages(self.fd, self.block.page_size, given.words))

    def give_back(self) -> None:
        """Punch all that the file did not hold at first: this destination will not run.

        :raise OSError: the file system does not take it back
        """
        with self._lock:
            self._over = True
            self.pages = DirtyBitmap.empty(self.block.npages)
            if self.fd < 0:
                return
            if self.block.is_hugetlb:  # taken from nothing but the pool that QEMU reserved
                return
            taken = DirtyBitmap.full(self.block.npages) - self._held
            error = int(punch_pages(self.fd, self.block.page_size, taken.words))
        if error:
            raise OSError(error, f"punching RAM {self.block.name!r}: {os.strerror(error)}")

    def let_go(self) -> None:
        """Keep the allocated pages; the file may be closed."""
        with self._lock:
            self._over = True
            self.fd = -1


def reserve_all(
    reservations: Sequence[Reservation],
    pages: Sequence[DirtyBitmap],
    look: Callable[[], NoSpace | None],
) -> None:
    """Reserve pages of all blocks, or none.

    :param pages: pages that the source holds, by block
    :param look: called before each part; raises, or tells, when to give up
    :raise NoSpace: there is too little space, now or meanwhile
    :raise OSError: a file cannot be allocated for another reason
    """
    try:
        for reservation, held in zip(reservations, pages, strict=True):
            wanted = reservation.wanted(held)
            for first in range(0, len(wanted.words), _PART_WORDS):
                last = min(first + _PART_WORDS, len(wanted.words))
                if not wanted.words[first:last].any():
                    continue
                lack = look()
                if lack is not None:
                    raise lack
                error = reservation.reserve(wanted, first, last)
                if error in _UNABLE:
                    # the caller should be told of it in the report, once that has warnings
                    _log.warning(
                        "the file system of RAM %r reserves nothing (%s): if it fills up, the "
                        "migration fails while it copies",
                        reservation.block.name,
                        os.strerror(error),
                    )
                    break
                if error in (errno.ENOSPC, errno.EDQUOT):
                    raise _full(reservations, pages)
                if error:
                    name = reservation.block.name
                    raise OSError(error, f"reserving RAM {name!r}: {os.strerror(error)}")
    except BaseException:
        for reservation in reservations:
            reservation.give_back()
        raise


def _full(reservations: Sequence[Reservation], pages: Sequence[DirtyBitmap]) -> NoSpace:
    for reservation in reservations:
        reservation.give_back()
    rooms = [reservation.room() for reservation in reservations]
    needed = sum(
        max(0, held.count() * reservation.block.page_size - room.allocated_bytes)
        for reservation, held, room in zip(reservations, pages, rooms, strict=True)
    )
    free = min((room.free_bytes for room in rooms if room.free_bytes is not None), default=0)
    return no_space_to_hold(Shortage(needed, min(free, needed)))


def no_space_to_hold(found: Shortage) -> NoSpace:
    """The error of a :func:`migrator.transport.space.to_hold` that was found."""
    if found.shared:
        return NoSpace(
            "source and destination share a file system: for the RAM that is to be copied, and for "
            "the source to grow meanwhile, it needs",
            found.needed_bytes,
            found.free_bytes,
        )
    return NoSpace("the destination's RAM needs", found.needed_bytes, found.free_bytes)


def no_space_to_run(found: Shortage) -> NoSpace:
    """The error of a :func:`migrator.transport.space.to_run` that was found."""
    return NoSpace(
        "memory that the guest has not touched yet, and may touch at the source, needs",
        found.needed_bytes,
        found.free_bytes,
    )
