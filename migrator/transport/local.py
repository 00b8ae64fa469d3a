"""Pages from one mapped file to another on the same host, at memory speed."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from migrator.aio import ended, in_thread, settle
from migrator.errors import NoSpace
from migrator.transport import Comparison, Sent
from migrator.transport.reservation import (
    Reservation,
    no_space_to_hold,
    no_space_to_run,
    reserve_all,
)
from migrator.transport.space import Growth, Room, growth_bytes, margins, room_of, to_hold, to_run
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.memory.extents import data_pages
from tracker.memory.pages import compare_pages, copy_pages, punch_pages, zero_pages
from tracker.memory.ram import RamBlock, open_file
from tracker.syscalls import fault_in

_T = TypeVar("_T")
_PART_WORDS = 256  # 16384 pages between two looks at whether to stop
_THREADS = min(4, os.cpu_count() or 1)
_NOWHERE = np.empty(0, np.uint8)


class _Pair:
    """One block at both sides."""

    def __init__(
        self, source_pid: int, source: RamBlock, destination_pid: int, destination: RamBlock
    ) -> None:
        self.source_pid, self.source = source_pid, source
        self.destination_pid, self.destination = destination_pid, destination
        self._reservation: Reservation | None = None
        self._fds: list[int] = []
        self._maps: list[mmap.mmap] = []

    def open(self) -> None:
        writable = self.destination.is_hugetlb  # hugetlbfs takes no write(2)
        self.source_fd, self.from_memory = self._map(self.source_pid, self.source, mmap.PROT_READ)
        self.fd, self.to_memory = self._map(
            self.destination_pid,
            self.destination,
            mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0),
        )
        self.present = self.destination_data()
        self._reservation = Reservation(self.fd, self.destination, self.present)
        self.write_to = self.to_memory if writable else _NOWHERE
        self.write_fd = -1 if writable else self.fd

    @property
    def reservation(self) -> Reservation:
        """The pages allocated at the destination, once it is open."""
        assert self._reservation is not None
        return self._reservation

    def _map(self, pid: int, block: RamBlock, protection: int) -> tuple[int, NDArray[np.uint8]]:
        fd = open_file(pid, block)
        self._fds.append(fd)
        mapped = mmap.mmap(fd, block.size, mmap.MAP_SHARED, protection)
        self._maps.append(mapped)
        return fd, np.frombuffer(mapped, np.uint8)

    def source_data(self) -> DirtyBitmap:
        return data_pages(self.source_pid, self.source, self.source_fd)

    def destination_data(self) -> DirtyBitmap:
        return data_pages(self.destination_pid, self.destination, self.fd)

    def close(self) -> None:
        if self._reservation is not None:
            self._reservation.let_go()
        self.from_memory = self.to_memory = self.write_to = _NOWHERE
        while self._maps:
            self._maps.pop().close()
        while self._fds:
            os.close(self._fds.pop())


class LocalCopy:
    """Both sides are processes on this host.

    :param source: the source's blocks
    :param destination: the destination's, in the same order
    """

    compares_bytes = True

    def __init__(
        self,
        source_pid: int,
        source: Sequence[RamBlock],
        destination_pid: int,
        destination: Sequence[RamBlock],
    ) -> None:
        self._pairs = [
            _Pair(source_pid, ours, destination_pid, theirs)
            for ours, theirs in zip(source, destination, strict=True)
        ]
        self._sent_pages = 0
        self._stop = False
        self._is_open = False
        self._growth = Growth()

    @property
    def sent_pages(self) -> int:
        """Pages sent by the sending that is under way, or by the last one."""
        return self._sent_pages

    async def open(self) -> None:
        """Map both sides; reserve at the destination the pages that the source holds.

        :raise OSError: a file cannot be opened or mapped
        :raise RamError: a file is not what it was
        :raise NoSpace: there is too little space; nothing stays reserved
        """
        await in_thread(self._open)
        await self._stoppable(self._reserve)

    def _open(self) -> None:
        for pair in self._pairs:
            pair.open()
        self._is_open = True

    # -- space ----------------------------------------------------------------------------------

    def _reserve(self) -> None:
        def look() -> NoSpace | None:
            if self._stop:
                raise InterruptedError(errno.EINTR, "reserving RAM was interrupted")
            source, destination = self._rooms()
            found = to_hold([room.allocated_bytes for room in source], destination, margins(source))
            return no_space_to_hold(found) if found else None

        held = [pair.source_data() for pair in self._pairs]
        reserve_all([pair.reservation for pair in self._pairs], held, look)

    def _rooms(self) -> tuple[list[Room], list[Room]]:
        return (
            [room_of(pair.source_fd, pair.source) for pair in self._pairs],
            [pair.reservation.room() for pair in self._pairs],
        )

    def shortage(self) -> NoSpace | None:
        """See :meth:`migrator.transport.Transport.shortage`."""
        ours = {pair.source.device for pair in self._pairs}
        if not self._is_open or ours.isdisjoint(pair.destination.device for pair in self._pairs):
            return None
        source, destination = self._rooms()
        held = [room.allocated_bytes for room in source]
        kept = margins(source, self._growth.lately(sum(held)))
        # elsewhere the destination alone suffers, and the writing to it fails
        shared = [i for i, room in enumerate(destination) if room.filesystem in kept]
        found = to_hold([held[i] for i in shared], [destination[i] for i in shared], kept)
        return no_space_to_hold(found) if found else None

    async def check_room(self) -> None:
        """See :meth:`migrator.transport.Transport.check_room`."""
        source, destination = self._rooms()
        held = [room.allocated_bytes for room in source]
        found = to_run(held, growth_bytes(source), destination, margins(source))
        if found is not None:
            raise no_space_to_run(found)

    async def give_back(self) -> None:
        """See :meth:`migrator.transport.Transport.give_back`."""
        await in_thread(self._give_back)

    def _give_back(self) -> None:
        for pair in self._pairs if self._is_open else ():
            pair.reservation.give_back()

    # -- pages ----------------------------------------------------------------------------------

    async def send(
        self,
        dirty: PageSet,
        data: PageSet,
        *,
        guest_stands: bool = False,  # nothing here could be waited for
    ) -> Sent:
        """See :meth:`migrator.transport.Sender.send`. Stops soon when cancelled."""
        self._sent_pages = 0
        return await self._stoppable(lambda: self._send(dirty, data))

    async def _stoppable(self, work: Callable[[], _T]) -> _T:
        self._stop = False
        thread = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            self._stop = True
            await settle(ended(thread))
            if not thread.cancelled():
                thread.exception()
            raise

    def _send(self, dirty: PageSet, data: PageSet) -> Sent:
        sent, undelivered = Sent(), PageSet.empty(dirty.blocks)
        for pair in self._pairs:
            name = pair.source.name
            error = self._send_block(pair, dirty[name], data[name], sent)
            if error:
                sent.error = OSError(error, f"writing RAM {name!r}: {os.strerror(error)}")
                # of a slice that failed half way nothing is known: the block is owed whole
                undelivered[name].add(dirty[name])
                sent.undelivered = undelivered
                if not pair.destination.is_hugetlb:
                    # it has pages that were not written; reading those is SIGBUS on a full tmpfs
                    pair.present = pair.destination_data()
        return sent

    @staticmethod
    def _map_at_destination(pair: _Pair, dirty: DirtyBitmap) -> None:
        """Let QEMU map what we filled: its page tables are what tells data from holes."""
        pages = (dirty & pair.present).pages()
        block = pair.destination
        fault_in(pair.destination_pid, (block.hva + pages * block.page_size).astype(np.uint64))

    def _send_block(self, pair: _Pair, dirty: DirtyBitmap, data: DirtyBitmap, sent: Sent) -> int:
        page_size = pair.source.page_size
        discarded = dirty - data
        holes = discarded.count()
        self._sent_pages += holes  # for whoever watches: they take no time
        cleared = DirtyBitmap.empty(dirty.npages)
        for first, last in _parts(dirty):
            if self._stop:
                return 0  # nobody will read what came of it
            copied, zeros, error = copy_pages(
                pair.from_memory,
                pair.write_to,
                pair.write_fd,
                page_size,
                dirty.words,
                data.words,
                pair.present.words,
                cleared.words,
                first,
                last,
            )
            if error:
                return int(error)
            sent.pages += copied + zeros
            sent.zero_pages += zeros
            sent.bytes += copied * page_size
            self._sent_pages += copied + zeros
        if cleared.any():
            error = self._clear(pair, cleared)
            if error:
                return error
        if holes:  # they are to be none at the destination only because they were reserved
            error = pair.reservation.discard(discarded - pair.present)
            if error:
                return error
        if pair.destination.is_hugetlb:
            try:
                self._map_at_destination(pair, dirty)
            except OSError as failure:
                return failure.errno or errno.EFAULT
        sent.pages += holes
        sent.zero_pages += holes
        return 0

    @staticmethod
    def _clear(pair: _Pair, cleared: DirtyBitmap) -> int:
        """Make the pages read as zeros, and holes where they did not; return an errno."""
        zeros = DirtyBitmap.empty(cleared.npages)
        page_size = pair.destination.page_size
        # a destination that was preallocated keeps what is zero already
        zero_pages(pair.to_memory, page_size, cleared.words, zeros.words)
        punched = cleared - zeros
        error = punch_pages(pair.fd, page_size, punched.words)
        if not error:
            pair.present = pair.present - punched
        return int(error)

    async def changed(
        self,
        pages: PageSet,
        data: PageSet,
        *,
        guest_stands: bool = False,
    ) -> PageSet:
        """See :meth:`migrator.transport.Transport.changed`.

        Compared with the destination's copy: these are the very bytes that were sent.
        """
        return await self._stoppable(lambda: self._changed(pages, data))

    def _changed(self, pages: PageSet, data: PageSet) -> PageSet:
        found = {}
        for pair in self._pairs:
            asked = pages[pair.source.name]
            ours, theirs = data[pair.source.name] & asked, pair.present & asked
            found[pair.source.name] = self._differing(pair, ours, theirs)
        return PageSet(pages.blocks, found)

    def _differing(self, pair: _Pair, ours: DirtyBitmap, theirs: DirtyBitmap) -> DirtyBitmap:
        """Pages that differ, of those that hold data at the source or at the destination."""
        differing = DirtyBitmap.empty(ours.npages)

        def compare(part: tuple[int, int]) -> None:
            if not self._stop:
                compare_pages(
                    pair.from_memory,
                    pair.to_memory,
                    pair.source.page_size,
                    ours.words,
                    theirs.words,
                    differing.words,
                    *part,
                )

        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(compare, _parts(ours | theirs)))  # raises what one of them raised
        return differing

    async def compare(self) -> Comparison:
        """Compare all pages of both sides, which stand still. Holes are equal to zeros."""
        return await self._stoppable(self._compare)

    def _compare(self) -> Comparison:
        pages = mismatched = 0
        for pair in self._pairs:
            # looked up anew: what was kept while sending is not to vouch for itself
            ours, theirs = pair.source_data(), pair.destination_data()
            mismatched += self._differing(pair, ours, theirs).count()
            pages += ours.npages
        return Comparison(pages, mismatched)

    async def close(self) -> None:
        """Unmap both sides. May be called again."""
        await in_thread(self._close)

    def _close(self) -> None:
        self._is_open = False
        for pair in self._pairs:
            pair.close()


def _parts(pages: DirtyBitmap) -> Iterator[tuple[int, int]]:
    """Slices of words that hold any of the pages: (first word, word after the last)."""
    words = pages.words
    starts = np.arange(0, len(words), _PART_WORDS)
    if not len(starts):
        return
    for start in starts[np.logical_or.reduceat(words != 0, starts)]:
        yield int(start), min(int(start) + _PART_WORDS, len(words))
