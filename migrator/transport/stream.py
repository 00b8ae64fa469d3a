"""Pages to another host, over several connections at once: the source's side.

A round is cut into parts of some thousand pages. Each connection has a thread that takes the next
part, finds its zeros, and sends the rest in frames, straight from the mapped RAM file; content that
is compressed or encrypted is gathered first. At the end of the round every connection is answered:
all that was sent on it is in the destination's RAM. If one breaks, the other side tells how many
frames it had written; what was in the others is still owed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from migrator.aio import ended, in_thread, settle, within
from migrator.errors import LinkError, LinkLost, NoSpace
from migrator.link.messages import Lack, parse
from migrator.link.session import Applied, Session
from migrator.transport import Comparison, Sent
from migrator.transport import runs as run_loops
from migrator.transport.frames import CHUNK_UNITS, Kind
from migrator.transport.packing import Pace
from migrator.transport.parts import PART_UNITS, Part, Ram, Work
from migrator.transport.reservation import no_space_to_hold, no_space_to_run
from migrator.transport.runs import UNIT
from migrator.transport.sending import Stream
from migrator.transport.space import Shortage, growth_bytes, room_of
from migrator.transport.warm import warm_up
from tracker.bits import words as kernels
from tracker.bits.bitmap import DirtyBitmap, pages_of
from tracker.bits.pageset import PageSet
from tracker.memory import pagehash
from tracker.memory.ram import RamBlock

_STANDING_S = 30.0  # a guest does not stand longer for a sending
_SLOWEST_BYTES_PER_S = 1e8  # nor for a comparison, of so many more


class StreamCopy:
    """The destination is on another host.

    :param session: connected; opened by :meth:`open`
    :param blocks: the source's blocks
    """

    compares_bytes = False

    def __init__(self, session: Session, source_pid: int, blocks: Sequence[RamBlock]) -> None:
        self._session = session
        self._pid = source_pid
        self._blocks = blocks
        self._rams: list[Ram] = []
        self._streams: list[Stream] = []
        self._units_per_page = min(block.page_size for block in blocks) // UNIT
        self._round = 0
        self._pace = Pace(session.link.bandwidth_bytes_per_s)
        self._work = Work.of([])

    @property
    def sent_pages(self) -> int:
        """Pages sent by the sending that is under way, or by the last one."""
        return sum(stream.units for stream in self._streams) // self._units_per_page

    async def open(self) -> None:
        """Map the source, let the destination map its side, connect the streams.

        :raise OSError: a file cannot be opened or mapped
        :raise RamError: a file is not what it was
        :raise LinkError: the other host does not
        :raise NoSpace: the destination lacks the space; nothing stays reserved
        """
        await in_thread(warm_up)
        await in_thread(self._map)
        await self._session.open([block.name for block in self._blocks])
        self._use_streams()
        await self._reserve()

    def _map(self) -> None:
        for block in self._blocks:
            self._rams.append(Ram(self._pid, block))

    async def reconnect(self) -> None:
        """Make all connections again, between two rounds: all that was sent has arrived.

        :raise LinkError: not within the time for that
        """
        await self._session.resume(self._round)
        self._use_streams()

    def _use_streams(self) -> None:
        session = self._session
        self._streams = [
            Stream(sock, session.peer, session.link.compress) for sock in session.streams
        ]

    # -- space ----------------------------------------------------------------------------------

    async def _reserve(self) -> None:
        held = await in_thread(lambda: [ram.units(ram.data()) for ram in self._rams])
        answer = await self._session.ask("reserve", b"".join(units.tobytes() for units in held))
        lack = self._lack(answer)
        if lack is not None:
            raise no_space_to_hold(lack)

    def shortage(self) -> NoSpace | None:
        """See :meth:`migrator.transport.Transport.shortage`: two hosts share no file system."""
        return None

    async def check_room(self) -> None:
        """See :meth:`migrator.transport.Transport.check_room`.

        :raise LinkError: the other host is lost
        """
        source = [room_of(ram.fd, ram.block) for ram in self._rams]
        answer = await self._session.ask(
            "room",
            held=[room.allocated_bytes for room in source],
            growth=growth_bytes(source),
        )
        lack = self._lack(answer)
        if lack is not None:
            raise no_space_to_run(lack)

    def _lack(self, answer: Mapping[str, Any]) -> Shortage | None:
        lack = parse(Lack, answer, self._session.peer)
        return Shortage(lack.needed, lack.free) if lack.needed is not None else None

    async def give_back(self) -> None:
        """See :meth:`migrator.transport.Transport.give_back`: the receiver does it, once parted."""

    # -- a round --------------------------------------------------------------------------------

    async def send(
        self,
        dirty: PageSet,
        data: PageSet,
        *,
        guest_stands: bool = False,
    ) -> Sent:
        """See :meth:`migrator.transport.Sender.send`. Stops soon when cancelled."""
        dirty_units = [ram.units(dirty[ram.block.name]) for ram in self._rams]
        data_units = [ram.units(data[ram.block.name]) for ram in self._rams]
        for stream in self._streams:
            stream.begin()
        number = self._round
        problem = await self._all_streams(
            [part for i, ram in enumerate(self._rams) for part in ram.parts(i, dirty_units[i])],
            lambda stream, work: stream.send_parts(
                work, self._rams, dirty_units, data_units, self._pace, number
            ),
            limit_s=_STANDING_S if guest_stands else None,
        )
        self._round += 1
        sent = self._tally()
        if problem is None:
            return sent
        sent.undelivered = dirty
        if guest_stands or not isinstance(problem, LinkLost):
            sent.error = problem
            return sent
        streams = self._streams
        try:
            applied = await self._session.resume(self._round)
        except LinkError as error:
            sent.error = error
            return sent
        sent.reconnected = True
        sent.undelivered = self._not_applied(dirty_units, streams, applied, number)
        self._use_streams()
        return sent

    def _tally(self) -> Sent:
        wire_bytes = sum(s.wire_bytes for s in self._streams)
        return Sent(
            pages=self.sent_pages,
            zero_pages=sum(s.zeros for s in self._streams) // self._units_per_page,
            bytes=sum(s.bytes for s in self._streams),
            wire_bytes=wire_bytes,
            least_s=self._pace.least_s(wire_bytes),
        )

    def _not_applied(
        self,
        dirty: Sequence[NDArray[np.uint64]],
        streams: Sequence[Stream],
        applied: Sequence[Applied],
        number: int,
    ) -> PageSet:
        """Pages of which anything did not arrive."""
        arrived = [np.zeros_like(units) for units in dirty]
        for stream, told in zip(streams, applied, strict=True):
            for block, runs in stream.sent[: told.of_round(number)]:
                run_loops.mark(runs, arrived[block])
        return self._page_set([units & ~there for units, there in zip(dirty, arrived, strict=True)])

    def _page_set(self, units: Sequence[NDArray[np.uint64]]) -> PageSet:
        """Pages of all blocks, any unit of which is set."""
        pairs = zip(self._rams, units, strict=True)
        return PageSet(self._blocks, {ram.block.name: ram.pages(some) for ram, some in pairs})

    def _stop(self, work: Work) -> None:
        """Let all connections end what they are at."""
        work.stop.set()
        self._session.break_streams()

    async def _all_streams(
        self,
        parts: Sequence[Part],
        task: Callable[[Stream, Work], None],
        limit_s: float | None = None,
    ) -> LinkError | None:
        """Do something on every stream, each in a thread of its own, until all have ended.

        :param limit_s: break them after so long
        :return: what broke, if anything did
        """
        work = self._work = Work.of(parts)

        def run(stream: Stream) -> LinkError | None:
            try:
                task(stream, work)
            except LinkError as error:
                self._stop(work)
                return error
            except BaseException:
                self._stop(work)
                raise
            return None

        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(len(self._streams), "stream") as executor:
            threads = asyncio.gather(
                *(loop.run_in_executor(executor, run, stream) for stream in self._streams)
            )
            try:
                problems = await within(limit_s, asyncio.shield(threads))
            except (asyncio.CancelledError, asyncio.TimeoutError) as error:
                self._stop(work)
                await settle(ended(threads))
                if isinstance(error, asyncio.CancelledError):
                    raise
                return LinkLost(self._session.peer, f"took more than {limit_s:g} s")
        # when one stream ends with something else, the others break
        told = sorted((p for p in problems if p), key=lambda p: isinstance(p, LinkLost))
        return told[0] if told else None

    # -- comparing ------------------------------------------------------------------------------

    async def changed(
        self,
        pages: PageSet,
        data: PageSet,
        *,
        guest_stands: bool = False,
    ) -> PageSet:
        """See :meth:`migrator.transport.Transport.changed`.

        By digests of the destination's copy, which is the very bytes that were sent.

        :raise LinkError: the other host is lost
        """
        asked = [ram.units(pages[ram.block.name]) for ram in self._rams]
        held = [ram.units(data[ram.block.name]) for ram in self._rams]
        found = [np.zeros_like(units) for units in asked]
        seed = pagehash.new_seed()

        def compare(stream: Stream, work: Work) -> None:
            while (part := work.take()) is not None:
                self._compare_units(stream, part, asked, held, found, seed)

        parts = [part for i, ram in enumerate(self._rams) for part in ram.parts(i, asked[i])]
        # all of RAM may have to be compared, where a device is not known by what it writes
        most_s = _STANDING_S + pages.nbytes() / _SLOWEST_BYTES_PER_S
        problem = await self._all_streams(parts, compare, most_s if guest_stands else None)
        if problem is not None:
            raise problem
        return self._page_set(found)

    def _compare_units(
        self,
        stream: Stream,
        part: Part,
        asked: Sequence[NDArray[np.uint64]],
        held: Sequence[NDArray[np.uint64]],
        found: Sequence[NDArray[np.uint64]],
        seed: int,
    ) -> None:
        """Set the units of a part that were asked for and differ."""
        words = slice(part.first // 64, (part.last + 63) // 64)
        selected = asked[part.block][words]
        ours = np.empty(part.last - part.first, np.uint64)
        count = pagehash.selected_digests(
            self._memory(part),
            UNIT,
            selected,
            held[part.block][words],
            seed,
            ours,
            0,
            len(selected),
        )
        starts, lengths = kernels.runs(selected)
        runs = np.empty((len(starts), 2), np.uint64)
        runs[:, 0], runs[:, 1] = starts + part.first, lengths * 2
        theirs = stream.digests(Kind.DIGESTS, part.block, runs, count, seed)
        units = pages_of(selected)[ours[:count] != theirs]
        differing = DirtyBitmap.from_pages(len(selected) * 64, units)
        found[part.block][words] |= differing.words

    def _memory(self, part: Part) -> NDArray[np.uint8]:
        """The memory of a part. Not to be kept while the other side is waited for: the error of a
        link that breaks then keeps the frames it passed, and a view in them the whole mapping."""
        return self._rams[part.block].memory[part.first * UNIT : part.last * UNIT]

    async def compare(self) -> Comparison:
        """Compare all of RAM, by digests of each 2 MiB, and of pages where these differ.

        :raise LinkError: the other host is lost
        :raise OSError, RamError: the source cannot be read
        """
        await self._session.ask("look-anew")
        held = await in_thread(lambda: [ram.units(ram.data()) for ram in self._rams])
        found = [np.zeros_like(units) for units in held]
        every = [ram.units(DirtyBitmap.full(ram.block.npages)) for ram in self._rams]
        seed = pagehash.new_seed()

        def compare(stream: Stream, work: Work) -> None:
            while (part := work.take()) is not None:
                for chunk in self._differing_chunks(stream, part, held, seed):
                    self._compare_units(stream, chunk, every, held, found, seed)

        parts = [
            Part(i, first, min(first + PART_UNITS, ram.nunits))
            for i, ram in enumerate(self._rams)
            for first in range(0, ram.nunits, PART_UNITS)
        ]
        problem = await self._all_streams(parts, compare)
        if problem is not None:
            raise problem
        return Comparison(
            pages=sum(ram.block.npages for ram in self._rams),
            mismatched=self._page_set(found).count(),
        )

    def _differing_chunks(
        self, stream: Stream, part: Part, held: Sequence[NDArray[np.uint64]], seed: int
    ) -> list[Part]:
        nunits = part.last - part.first
        words = slice(part.first // 64, (part.last + 63) // 64)
        digests = np.empty(nunits, np.uint64)
        pagehash.page_digests(
            self._memory(part),
            UNIT,
            held[part.block][words],
            seed,
            digests,
            0,
            nunits,
        )
        ours = np.empty(-(-nunits // CHUNK_UNITS), np.uint64)
        pagehash.chunk_digests(digests, CHUNK_UNITS, seed, ours)
        run = np.array([[part.first, nunits * 2]], np.uint64)
        theirs = stream.digests(Kind.CHUNKS, part.block, run, len(ours), seed)
        starts = part.first + np.flatnonzero(ours != theirs) * CHUNK_UNITS
        return [Part(part.block, int(s), min(int(s) + CHUNK_UNITS, part.last)) for s in starts]

    async def close(self) -> None:
        """Hang up, and unmap the source. May be called again."""
        self._session.hang_up()
        await in_thread(self._close)

    def _close(self) -> None:
        self._streams = []
        while self._rams:
            self._rams.pop().close()
