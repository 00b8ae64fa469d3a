"""What goes over the wire between two hosts: formats, limits, and their checks.

All numbers are little-endian. ``PROTOCOL.md`` beside this file has the order in which things are
said. Whatever comes is checked before anything is done with it, and nothing that comes decides how
much memory is taken but within the limits below.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from migrator.errors import WireError
from tracker import frames
from tracker.frames import RUNS_PER_FRAME, UNIT, UNITS_PER_FRAME, Runs

VERSION = 1
MESSAGE_LIMIT = 1 << 20
"""Bytes of JSON in a message."""
GREETING_LIMIT = 1 << 12
"""Likewise, of the first one of a connection."""
STATE_LIMIT = 1 << 30
"""Bytes of device state behind a message."""
CONTENT_LIMIT = UNITS_PER_FRAME * UNIT
"""Bytes of content in a frame."""
STREAMS_LIMIT = 32
"""Connections for pages, beside the one for messages."""
BLOCKS_LIMIT = 1 << 10
"""RAM blocks."""

_OPENING = struct.Struct("<8sHH")
_MAGIC = b"qemu-mig"
_MESSAGE = struct.Struct("<II")
_FRAME = struct.Struct("<BBHIQ")
OPENING_SIZE = _OPENING.size
MESSAGE_SIZE = _MESSAGE.size
FRAME_SIZE = _FRAME.size
RUN_SIZE = 16


def opening() -> bytes:
    """What each side sends first: who speaks here, and which version."""
    return _OPENING.pack(_MAGIC, VERSION, 0)


def check_opening(data: bytes | bytearray, peer: str) -> None:
    """Check the other side's opening.

    :raise WireError: it is no migrator, or one of another version
    """
    magic, version, _ = _OPENING.unpack(data)
    if magic != _MAGIC:
        raise WireError(peer, "is no migrator")
    if version != VERSION:
        raise WireError(
            peer,
            f"speaks version {version} of the protocol, this is {VERSION}: "
            "install the same release on both hosts",
        )


# -- messages ------------------------------------------------------------------------------------


def message(said: dict[str, Any], blob_size: int = 0) -> bytes:
    """A message, to be followed by ``blob_size`` bytes."""
    text = json.dumps(said, separators=(",", ":")).encode()
    return _MESSAGE.pack(len(text), blob_size) + text


def message_sizes(data: bytes | bytearray, peer: str, *, limit: int, blob: int) -> tuple[int, int]:
    """Sizes of the JSON that follows, and of what follows that.

    :param limit: most bytes of JSON; likewise ``blob``
    :raise WireError: more than that
    """
    text_size, blob_size = _MESSAGE.unpack(data)
    if text_size > limit or blob_size > blob:
        raise WireError(peer, f"announces a message of {text_size} + {blob_size} bytes")
    return text_size, blob_size


def parse_message(text: bytes | bytearray, peer: str) -> dict[str, Any]:
    """What a message says.

    :raise WireError: no JSON object; NaN and the infinities, which Python adds, are no JSON
    """
    try:
        said = json.loads(bytes(text), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise WireError(peer, "sent a message that is no JSON") from error
    if not isinstance(said, dict):
        raise WireError(peer, "sent a message that is no JSON object")
    return said


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


# -- frames --------------------------------------------------------------------------------------


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
    content = int(frames.check(runs, nunits))
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
