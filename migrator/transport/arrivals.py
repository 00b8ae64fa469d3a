"""Pages from another host, into the destination's RAM: the receiving side of a stream.

Content is received into a buffer that stays in the processor's cache, and written to the RAM file
from there: for pages that are not there yet that is several times as fast as receiving into a
mapping of it, where each page is a fault, and a file system that is full is an error instead of a
SIGBUS.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence

import numpy as np
import zstandard
from numpy.typing import NDArray

from migrator.errors import LinkError, LinkLost, NoSpace, WireError
from migrator.link.connection import hang_up
from migrator.transport import frames
from migrator.transport import runs as run_loops
from migrator.transport.frames import CHUNK_UNITS, Frame, Kind, Packing
from migrator.transport.reservation import Reservation, no_space_to_hold, reserve_all
from migrator.transport.runs import RUNS_PER_FRAME, UNIT, Runs
from migrator.transport.space import Shortage, to_hold
from tracker.bits import rescale
from tracker.bits import words as kernels
from tracker.bits.bitmap import DirtyBitmap
from tracker.errors import TrackerError
from tracker.memory import pagehash
from tracker.memory.mapped import Mapped
from tracker.memory.ram import RamBlock


class Target:
    """One block of the destination, written by several threads.

    :raise OSError: its file cannot be opened or mapped
    :raise RamError: its file is not what it was
    """

    def __init__(self, pid: int, block: RamBlock) -> None:
        self._block = block
        self.nunits = block.size // UNIT
        self._ram = Mapped(pid, block, writable=True)
        self._lock = threading.Lock()  # kernels change bitmap words without one
        self._filled = DirtyBitmap.empty(block.npages)
        try:
            self.look_anew()
            self.reservation = Reservation(self._ram.fd, block, self._present)
        except BaseException:
            self._ram.close()
            raise

    def look_anew(self) -> None:
        """See which pages the file holds."""
        self._present = self._ram.data()

    def pages(self, units: NDArray[np.uint64]) -> DirtyBitmap:
        """Pages of which any unit is set.

        :raise BitmapError: more units than the block has
        """
        found = DirtyBitmap(self.nunits, units)
        if self._block.page_size == UNIT:
            return found
        pages = DirtyBitmap.empty(self._block.npages)
        size = self._block.page_size
        rescale.spread(found.words, 0, self.nunits, UNIT, pages.words, size, 0)
        return pages

    def size_of(self, pages: DirtyBitmap) -> int:
        """Bytes of some pages."""
        return pages.count() * self._block.page_size

    def put(self, content: NDArray[np.uint8], runs: Runs) -> None:
        """Write the content of runs that were checked, and clear those of zeros.

        :raise OSError: the file system is full, for one
        """
        ram, block = self._ram, self._block
        with self._lock:
            present = self._present.words
            error = run_loops.clear(
                runs, ram.memory, ram.write_to, ram.write_fd, block.page_size, present
            )
            if not error and len(content):
                error = run_loops.put(
                    content, runs, ram.write_to, ram.write_fd, block.page_size, present
                )
                if block.is_hugetlb:
                    units = np.zeros((self.nunits + 63) // 64, np.uint64)
                    run_loops.mark(runs, units)
                    rescale.spread(
                        units,
                        0,
                        self.nunits,
                        UNIT,
                        self._filled.words,
                        block.page_size,
                        0,
                    )
        if error:
            raise OSError(error, f"writing RAM {block.name!r}: {os.strerror(error)}")

    def end_round(self) -> None:
        """Let QEMU map huge pages that were filled: its page tables tell data from holes.

        :raise OSError: its process is gone
        """
        if not self._block.is_hugetlb:
            return
        with self._lock:
            self._ram.fault_in(self._filled & self._present)
            self._filled.clear()

    def digests(self, kind: Kind, runs: Runs, seed: int) -> NDArray[np.uint64]:
        """Digests of what is there, as :class:`migrator.transport.frames.Kind` has them."""
        first = int(runs[0, 0]) & ~63
        last = int(runs[-1, 0] + (runs[-1, 1] >> np.uint64(1)))
        nunits = min((last + 63) & ~63, self.nunits) - first
        memory = self._ram.memory[first * UNIT : (first + nunits) * UNIT]
        held = self._units()[first // 64 : (first + nunits + 63) // 64]
        selected = np.zeros((nunits + 63) // 64, np.uint64)
        shifted = runs.copy()
        shifted[:, 0] -= np.uint64(first)
        run_loops.mark(shifted, selected)
        found = np.empty(int(kernels.popcount(selected)), np.uint64)
        pagehash.selected_digests(memory, UNIT, selected, held, seed, found, 0, len(selected))
        if kind is Kind.CHUNKS:
            chunks = np.empty(-(-len(found) // CHUNK_UNITS), np.uint64)
            pagehash.chunk_digests(found, CHUNK_UNITS, seed, chunks)
            return chunks
        return found

    def _units(self) -> NDArray[np.uint64]:
        if self._block.page_size == UNIT:
            return self._present.words
        words = np.zeros((self.nunits + 63) // 64, np.uint64)
        size = self._block.page_size
        rescale.spread(self._present.words, 0, self._block.npages, size, words, UNIT, 0)
        return words

    def close(self) -> None:
        """Unmap it. No thread may use it any more."""
        self.reservation.let_go()
        self._ram.close()


def reserve_at(targets: Sequence[Target], units: bytes) -> Shortage | None:
    """Reserve the pages that the source holds, or none.

    :param units: a bit a unit of 4096 bytes, as whole 64-bit words, of one block after the other
    :return: the space that is missing, if any is
    :raise ValueError: not as many bits as the blocks have
    :raise BitmapError: bits past the last unit
    :raise OSError: a file cannot be allocated
    """
    words = np.frombuffer(units, "<u8").astype(np.uint64)
    lengths = [(target.nunits + 63) // 64 for target in targets]
    if len(words) != sum(lengths):
        raise ValueError(f"{len(words)} words of units for {sum(lengths)}")
    pieces = np.split(words, np.cumsum(lengths)[:-1]) if targets else []
    pages = [target.pages(piece.copy()) for target, piece in zip(targets, pieces, strict=True)]
    reservations = [target.reservation for target in targets]

    def look() -> NoSpace | None:
        held = [target.size_of(some) for target, some in zip(targets, pages, strict=True)]
        found = to_hold(held, [reservation.room() for reservation in reservations], {})
        return no_space_to_hold(found) if found else None

    try:
        reserve_all(reservations, pages, look)
    except NoSpace as lack:
        return Shortage(lack.needed_bytes, lack.free_bytes)
    return None


class Arrivals(threading.Thread):
    """A connection for pages: writes what comes, answers what is asked, until it breaks.

    :ivar round: number of the round that is under way
    :ivar frames: of it, frames that were written
    :param spoilt: called, in this thread and before it hangs up, with what it ends with; not for a
        broken link, which is for the source to mend
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        targets: list[Target],
        round_number: int,
        *,
        spoilt: Callable[[Exception], object],
    ) -> None:
        super().__init__(name=f"arrivals from {peer}", daemon=True)
        self._socket = sock
        self._peer = peer
        self._targets = targets
        self._began_at = (round_number, 0)
        self.round, self.frames = self._began_at
        self.bytes = 0
        self._spoilt = spoilt
        self._head = bytearray(frames.FRAME_SIZE)
        self._runs = bytearray(RUNS_PER_FRAME * frames.RUN_SIZE)
        self._content = np.empty(frames.CONTENT_LIMIT, np.uint8)
        self._packed = bytearray()
        # a frame may ask for a window of 128 MiB otherwise, however short it is
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=frames.CONTENT_LIMIT)

    @property
    def has_begun(self) -> bool:
        """Whether anything came."""
        return (self.round, self.frames) != self._began_at

    def run(self) -> None:
        """Until the connection ends, or what comes makes no sense."""
        try:
            while self._frame():
                pass
        except LinkLost:
            return
        except (LinkError, OSError, TrackerError) as error:
            self._spoilt(error)
        finally:
            self._socket.close()

    def hang_up(self) -> None:
        """Break the connection; wait until nothing of it is written any more."""
        hang_up(self._socket)
        self.join()

    def _frame(self) -> bool:
        head = memoryview(self._head)
        if not self._read(head, may_end=True):
            return False
        frame = frames.parse_frame(head, len(self._targets), self._peer)
        if frame.kind is Kind.ROUND:
            for target in self._targets:
                target.end_round()
            self.round, self.frames = frame.size + 1, 0
            self._write(head)
            return True
        target = self._targets[frame.block]
        table = memoryview(self._runs)[: frame.count * frames.RUN_SIZE]
        self._read(table)
        runs, units = frames.parse_runs(table, target.nunits, self._peer)
        if frame.kind is Kind.PAGES:
            frames.check_content(frame, units, self._peer)
            target.put(self._receive_content(frame, units), runs)
            self.frames += 1
            self.bytes += frames.FRAME_SIZE + len(table) + frame.size
            return True
        frames.digests_wanted(frame, runs, self._peer)
        seed = bytearray(frames.SEED_SIZE)
        self._read(memoryview(seed))
        digests = target.digests(frame.kind, runs, int.from_bytes(seed, "little"))
        self._write(digests.data.cast("B"))
        return True

    def _receive_content(self, frame: Frame, units: int) -> NDArray[np.uint8]:
        content = self._content[: units * UNIT]
        if frame.packing is Packing.NONE:
            self._read(content.data)
            return content
        if len(self._packed) < frame.size:
            self._packed = bytearray(frame.size)
        packed = memoryview(self._packed)[: frame.size]
        self._read(packed)
        reader = self._decompressor.stream_reader(packed)
        try:
            if reader.readinto(content.data) != len(content) or reader.read(1):
                raise WireError(self._peer, "sent content that unpacks to another size")
        except zstandard.ZstdError as error:
            raise WireError(self._peer, "sent content that does not unpack") from error
        return content

    def _read(self, view: memoryview, *, may_end: bool = False) -> bool:
        whole = len(view)
        while view:
            try:
                received = self._socket.recv_into(view)
            except OSError as error:
                raise LinkLost(self._peer, error.strerror or str(error)) from error
            if not received:
                if may_end and len(view) == whole:
                    return False
                raise LinkLost(self._peer, "hung up")
            view = view[received:]
        return True

    def _write(self, data: memoryview) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise LinkLost(self._peer, error.strerror or str(error)) from error
