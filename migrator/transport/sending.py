"""One connection of a stream, used by one thread at a time: frames out, acknowledgements in."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from migrator.errors import LinkLost, WireError
from migrator.transport import frames
from migrator.transport import runs as run_loops
from migrator.transport.frames import CHUNK_UNITS, Frame, Kind, Packing
from migrator.transport.packing import Pace, Packer
from migrator.transport.parts import Ram, Work
from migrator.transport.runs import RUNS_PER_FRAME, UNIT, Runs

Digests = NDArray[np.uint64]
_HEAD_SIZE = frames.FRAME_SIZE + RUNS_PER_FRAME * frames.RUN_SIZE


class Stream:
    """One connection, used by one thread at a time.

    :ivar sent: frames of the present round: block and runs
    """

    def __init__(self, sock: socket.socket, peer: str, compress: str) -> None:
        self.socket = sock
        self._peer = peer
        self.packer = Packer(compress)
        self._head = np.zeros(_HEAD_SIZE, np.uint8)
        self._runs: Runs = self._head[frames.FRAME_SIZE :].view("<u8").reshape(-1, 2)
        self._vectors = np.zeros((RUNS_PER_FRAME + 1, 2), np.uint64)
        self._content = np.zeros(frames.CONTENT_LIMIT, np.uint8)
        self._gathers = isinstance(sock, ssl.SSLSocket) or compress != "none"
        self.begin()

    def begin(self) -> None:
        """A round begins."""
        self.sent: list[tuple[int, Runs]] = []
        self.units = self.zeros = self.bytes = self.wire_bytes = 0
        self.packer.begin()

    # -- a round --------------------------------------------------------------------------------

    def send_parts(
        self,
        work: Work,
        rams: Sequence[Ram],
        dirty: Sequence[NDArray[np.uint64]],
        data: Sequence[NDArray[np.uint64]],
        pace: Pace,
        number: int,
    ) -> None:
        """Send parts until there is none left; return when all has been acknowledged."""
        while (part := work.take()) is not None:
            ram, at = rams[part.block], part.first
            while at < part.last and not work.stop.is_set():
                n, units, zeros, at = run_loops.plan(
                    ram.memory, dirty[part.block], data[part.block], at, part.last, self._runs
                )
                if n:
                    self._send_frame(part.block, ram, n, units, pace, work.stop)
                    self.units += units + zeros
                    self.zeros += zeros
        if work.stop.is_set():
            return
        self._write(Frame(Kind.ROUND, Packing.NONE, 0, 0, number).pack())
        answer = frames.parse_frame(self._read(frames.FRAME_SIZE), 0, self._peer)
        if answer.kind is not Kind.ROUND or answer.size != number:
            raise WireError(self._peer, "acknowledges another round")

    def _send_frame(
        self, block: int, ram: Ram, n: int, units: int, pace: Pace, stop: threading.Event
    ) -> None:
        runs = self._runs[:n]
        self.sent.append((block, runs.copy()))
        nbytes = units * UNIT
        head_size = frames.FRAME_SIZE + n * frames.RUN_SIZE
        head = self._head[:head_size]
        packed = None
        content = self._content[:nbytes]
        if self._gathers and nbytes:
            # what the guest may write to meanwhile is neither packed nor encrypted where it is
            run_loops.gather(ram.memory, runs, self._content)
            packed = self.packer.pack(content.data)
        size = nbytes if packed is None else len(packed)
        packing = Packing.NONE if packed is None else Packing.ZSTD
        frame = Frame(Kind.PAGES, packing, block, n, size)
        head[: frames.FRAME_SIZE] = np.frombuffer(frame.pack(), np.uint8)
        pace.wait_for(head_size + size, stop)
        if packed is not None:
            self._write(head.tobytes() + packed)
        elif self._gathers:
            self._write(head.data)
            if nbytes:
                self._write(content.data)
        else:
            error = run_loops.send(
                self.socket.fileno(),
                head,
                ram.memory.ctypes.data,
                ram.nunits,
                runs,
                self._vectors,
            )
            if error:
                raise LinkLost(self._peer, os.strerror(error))
        self.bytes += nbytes
        self.wire_bytes += head_size + size

    # -- digests --------------------------------------------------------------------------------

    def digests(self, kind: Kind, block: int, runs: Runs, wanted: int, seed: int) -> Digests:
        """Ask for digests of the destination's copy."""
        answers = []
        for at in range(0, len(runs), RUNS_PER_FRAME):
            some = runs[at : at + RUNS_PER_FRAME]
            head = Frame(kind, Packing.NONE, block, len(some), frames.SEED_SIZE).pack()
            self._write(head + some.tobytes() + seed.to_bytes(8, "little"))
            units = int((some[:, 1] >> np.uint64(1)).sum())
            count = -(-units // CHUNK_UNITS) if kind is Kind.CHUNKS else units
            answers.append(np.frombuffer(self._read(8 * count), "<u8"))
        found = np.concatenate(answers) if answers else np.empty(0, np.uint64)
        if len(found) != wanted:
            raise WireError(self._peer, "answers with other digests than were asked for")
        return found

    # -- bytes ----------------------------------------------------------------------------------

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self.socket.sendall(data)
        except OSError as error:  # of which ssl.SSLError is one
            raise LinkLost(self._peer, error.strerror or str(error)) from error

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            try:
                received = self.socket.recv_into(view)
            except OSError as error:
                raise LinkLost(self._peer, error.strerror or str(error)) from error
            if not received:
                raise LinkLost(self._peer, "hung up")
            view = view[received:]
        return data
