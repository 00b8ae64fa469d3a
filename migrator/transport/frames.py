"""Frames on a connection for pages: formats, limits, and their checks.

All numbers are little-endian. ``docs/protocol.md`` has the order in which frames are sent. What
comes is checked before anything is done with it, and decides how much memory is taken only within
the limits below.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from migrator.errors import WireError
from migrator.transport.runs import RUNS_PER_FRAME, UNIT, UNITS_PER_FRAME, Runs, check

CONTENT_LIMIT = UNITS_PER_FRAME * UNIT
"""Bytes of content in a frame."""

_FRAME = struct.Struct("<BBHIQ")
FRAME_SIZE = _FRAME.size
RUN_SIZE = 16


class Kind(IntEnum):
    """What a frame is.

    ``PAGES``: runs, then their content. ``ROUND``: all of a round was sent; ``size`` is its number,
    and nothing follows; answered with the same. ``DIGESTS``: runs, then 8 bytes of seed; answered
    with a digest (``uint64``) of each unit of them. ``CHUNKS``: likewise, with one of each 512
    units of the only run.
    """

    PAGES = 1
    ROUND = 2
    DIGESTS = 3
    CHUNKS = 4


class Packing(IntEnum):
    """How the content of a frame is packed."""

    NONE = 0
    ZSTD = 1


@dataclass(frozen=True)
class Frame:
    """The first 16 bytes of a frame.

    :ivar block: index of the RAM block, in the order of the message that opened it
    :ivar count: number of runs that follow
    :ivar size: bytes that follow the runs
    """

    kind: Kind
    packing: Packing
    block: int
    count: int
    size: int

    def pack(self) -> bytes:
        """As bytes."""
        return _FRAME.pack(self.kind, self.packing, self.block, self.count, self.size)


SEED_SIZE = 8
CHUNK_UNITS = 512
"""Units whose digests are compared as one, 2 MiB."""
DIGESTS_LIMIT = 1 << 16
"""Units whose digests, or those of their chunks, are asked for at once."""


def parse_frame(data: bytes | bytearray | memoryview, nblocks: int, peer: str) -> Frame:
    """Check and take apart the first bytes of a frame.

    :raise WireError: no frame, or beyond the limits
    """
    kind, packing, block, count, size = _FRAME.unpack(data)
    try:
        frame = Frame(Kind(kind), Packing(packing), block, count, size)
    except ValueError as error:
        raise WireError(peer, f"sent a frame of kind {kind}, packed by {packing}") from error
    if frame.kind is Kind.ROUND:
        if count or block or packing:
            raise WireError(peer, "ends a round with runs")
        return frame
    if block >= nblocks:
        raise WireError(peer, f"sent a frame for block {block} of {nblocks}")
    if not 0 < count <= RUNS_PER_FRAME:
        raise WireError(peer, f"sent a frame of {count} runs")
    if frame.kind is Kind.PAGES:
        if size > CONTENT_LIMIT:
            raise WireError(peer, f"sent a frame of {size} bytes")
    elif size != SEED_SIZE or packing or (frame.kind is Kind.CHUNKS and count != 1):
        raise WireError(peer, "asks for digests in a form that is not known")
    return frame


def parse_runs(data: bytes | bytearray | memoryview, nunits: int, peer: str) -> tuple[Runs, int]:
    """Check the runs of a frame.

    :param nunits: units of the block
    :return: the runs, on the same memory; units of content
    :raise WireError: out of order, overlapping, or outside the block
    """
    runs = np.frombuffer(data, "<u8").reshape(-1, 2)
    content = int(check(runs, nunits))
    if content < 0:
        raise WireError(peer, "sent runs that overlap, or leave the block")
    return runs, content


def check_content(frame: Frame, units: int, peer: str) -> None:
    """Check that the content of a frame of pages is as long as its runs say.

    :param units: units of content in its runs
    :raise WireError: it is not
    """
    nbytes = units * UNIT
    fits = frame.size == nbytes if frame.packing is Packing.NONE else 0 < frame.size < nbytes
    if nbytes > CONTENT_LIMIT or not fits:
        raise WireError(peer, f"sent {frame.size} bytes of content for {units} units")


def digests_wanted(frame: Frame, runs: Runs, peer: str) -> int:
    """How many digests answer a frame that asks for them.

    :raise WireError: of more units than at once, or chunks that do not begin at one
    """
    units = int((runs[:, 1] >> np.uint64(1)).sum())
    if units > DIGESTS_LIMIT:
        raise WireError(peer, f"asks for digests of {units} units at once")
    if frame.kind is Kind.DIGESTS:
        return units
    if int(runs[0, 0]) % CHUNK_UNITS:
        raise WireError(peer, "asks for a digest of a part of a chunk")
    return -(-units // CHUNK_UNITS)
