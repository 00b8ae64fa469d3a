"""Pages from one mapped file to another on the same host, at memory speed."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import TypeVar

import numpy as np

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
from tracker.memory.mapped import Mapped
from tracker.memory.pages import compare_pages, copy_pages, punch_pages, zero_pages
from tracker.memory.ram import RamBlock

_T = TypeVar("_T")
_PART_WORDS = 256  # 16384 pages between two looks at whether to stop
_THREADS = min(4, os.cpu_count() or 1)


class _Pair:
    """One block at both sides, mapped.

    :ivar present: pages that the destination's file holds
    :ivar reservation: pages allocated there
    """

    def __init__(self, source: Mapped, destination: Mapped) -> None:
        self.source, self.destination = source, destination
        self.present = destination.data()
        self.reservation = Reservation(destination.fd, destination.block, self.present)

    @classmethod
    def open(
        cls, source_pid: int, source: RamBlock, destination_pid: int, destination: RamBlock
    ) -> _Pair:
        ours = Mapped(source_pid, source)
        try:
            theirs = Mapped(destination_pid, destination, writable=True)
            try:
                return cls(ours, theirs)
            except BaseException:
                theirs.close()
                raise
        except BaseException:
            ours.close()
            raise

    @property
    def name(self) -> str:
        return self.source.block.name

    @property
    def page_size(self) -> int:
        return self.source.block.page_size

    def close(self) -> None:
        self.reservation.let_go()
        self.source.close()
        self.destination.close()


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
        self._sides = [
            (source_pid, ours, destination_pid, theirs)
            for ours, theirs in zip(source, destination, strict=True)
        ]
        self._pairs: list[_Pair] = []
        self._sent_pages = 0
        self._stop = False
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
        with ExitStack() as opened:
            pairs = [opened.enter_context(closing(_Pair.open(*side))) for side in self._sides]
            opened.pop_all()
        self._pairs = pairs  # all at once: the event loop looks at them meanwhile

    # -- space ----------------------------------------------------------------------------------

    def _reserve(self) -> None:
        def look() -> NoSpace | None:
            if self._stop:
                raise InterruptedError(errno.EINTR, "reserving RAM was interrupted")
            source, destination = self._rooms()
            found = to_hold([room.allocated_bytes for room in source], destination, margins(source))
            return no_space_to_hold(found) if found else None

        held = [pair.source.data() for pair in self._pairs]
        reserve_all([pair.reservation for pair in self._pairs], held, look)

    def _rooms(self) -> tuple[list[Room], list[Room]]:
        return (
            [room_of(pair.source.fd, pair.source.block) for pair in self._pairs],
            [pair.reservation.room() for pair in self._pairs],
        )

    def shortage(self) -> NoSpace | None:
        """See :meth:`migrator.transport.Transport.shortage`."""
        ours = {pair.source.block.device for pair in self._pairs}
        if ours.isdisjoint(pair.destination.block.device for pair in self._pairs):
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
        for pair in self._pairs:
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
            name = pair.name
            error = self._send_block(pair, dirty[name], data[name], sent)
            if error:
                sent.error = OSError(error, f"writing RAM {name!r}: {os.strerror(error)}")
                # of a slice that failed half way nothing is known: the block is owed whole
                undelivered[name].add(dirty[name])
                sent.undelivered = undelivered
                if not pair.destination.block.is_hugetlb:
                    # it has pages that were not written; reading those is SIGBUS on a full tmpfs
                    pair.present = pair.destination.data()
        return sent

    @staticmethod
    def _map_at_destination(pair: _Pair, dirty: DirtyBitmap) -> None:
        """Let QEMU map what we filled: its page tables are what tells data from holes."""
        pair.destination.fault_in(dirty & pair.present)

    def _send_block(self, pair: _Pair, dirty: DirtyBitmap, data: DirtyBitmap, sent: Sent) -> int:
        page_size = pair.page_size
        discarded = dirty - data
        holes = discarded.count()
        self._sent_pages += holes  # for whoever watches: they take no time
        cleared = DirtyBitmap.empty(dirty.npages)
        for first, last in _parts(dirty):
            if self._stop:
                return 0  # nobody will read what came of it
            copied, zeros, error = copy_pages(
                pair.source.memory,
                pair.destination.write_to,
                pair.destination.write_fd,
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
        if pair.destination.block.is_hugetlb:
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
        page_size = pair.page_size
        # a destination that was preallocated keeps what is zero already
        zero_pages(pair.destination.memory, page_size, cleared.words, zeros.words)
        punched = cleared - zeros
        error = punch_pages(pair.destination.fd, page_size, punched.words)
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
            asked = pages[pair.name]
            ours, theirs = data[pair.name] & asked, pair.present & asked
            found[pair.name] = self._differing(pair, ours, theirs)
        return PageSet(pages.blocks, found)

    def _differing(self, pair: _Pair, ours: DirtyBitmap, theirs: DirtyBitmap) -> DirtyBitmap:
        """Pages that differ, of those that hold data at the source or at the destination."""
        differing = DirtyBitmap.empty(ours.npages)

        def compare(part: tuple[int, int]) -> None:
            if not self._stop:
                compare_pages(
                    pair.source.memory,
                    pair.destination.memory,
                    pair.page_size,
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
            ours, theirs = pair.source.data(), pair.destination.data()
            mismatched += self._differing(pair, ours, theirs).count()
            pages += ours.npages
        return Comparison(pages, mismatched)

    async def close(self) -> None:
        """Unmap both sides. May be called again."""
        await in_thread(self._close)

    def _close(self) -> None:
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            pair.close()


def _parts(pages: DirtyBitmap) -> Iterator[tuple[int, int]]:
    """Slices of words that hold any of the pages: (first word, word after the last)."""
    words = pages.words
    starts = np.arange(0, len(words), _PART_WORDS)
    if not len(starts):
        return
    for start in starts[np.logical_or.reduceat(words != 0, starts)]:
        yield int(start), min(int(start) + _PART_WORDS, len(words))
