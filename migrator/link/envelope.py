"""Messages on a connection between two hosts: how they are framed, and how long they may be.

All numbers are little-endian. A connection begins with an opening of each side; a message is the
sizes of what follows, JSON, and bytes that belong to it. ``docs/protocol.md`` has the order in
which things are said. Nothing that comes decides how much memory is taken but within the limits
below.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from migrator.errors import WireError

VERSION = 1
MESSAGE_LIMIT = 1 << 20
"""Bytes of JSON in a message."""
GREETING_LIMIT = 1 << 12
"""Likewise, of the first one of a connection."""
STATE_LIMIT = 1 << 30
"""Bytes of device state behind a message."""
STREAMS_LIMIT = 32
"""Connections for pages, beside the one for messages."""
BLOCKS_LIMIT = 1 << 10
"""RAM blocks."""

_OPENING = struct.Struct("<8sHH")
_MAGIC = b"qemu-mig"
_MESSAGE = struct.Struct("<II")
OPENING_SIZE = _OPENING.size
MESSAGE_SIZE = _MESSAGE.size


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
