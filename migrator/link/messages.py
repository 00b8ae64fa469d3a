"""The messages between two hosts, as types: parsed once, at the door, and bounded there.

A message that does not fit its type ends the migration with a :class:`~migrator.errors.WireError`;
nothing behind the door has to expect a missing member, a number that is none, or a list where a
name was expected. Members that are not known are ignored.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from migrator.errors import WireError
from migrator.link import envelope

_M = TypeVar("_M", bound="Message")
_MOST = (1 << 62) - 1
_DAY_S = 86_400.0
_PAGE_SIZES = (1 << 12, 1 << 30)

Text = Annotated[str, Field(max_length=4096)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Token = Annotated[str, Field(max_length=64)]
Count = Annotated[int, Field(ge=0, le=_MOST)]
Seconds = Annotated[float, Field(ge=0, le=_DAY_S, allow_inf_nan=False)]


class Message(BaseModel):
    """Base of all messages."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


def parse(kind: type[_M], said: object, peer: str) -> _M:
    """Parse what the other host said.

    :raise WireError: it does not fit
    """
    try:
        return kind.model_validate(said)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part)[:64] for part in first["loc"][:8]) or "all of it"
        raise WireError(
            peer, f"sent a message that makes no sense: {where}: {first['msg']}"
        ) from None


# -- from the receiver --------------------------------------------------------------------------


class State(str, Enum):
    """What a receiver says of a migration; :mod:`migrator.receiver.incoming` has the moves."""

    WAITING = "waiting"  # it knows of none
    OPEN = "open"
    READY = "ready"
    GOING = "going"
    RUNNING = "running"
    NEVER = "never"
    UNKNOWN = "unknown"


class Told(Message):
    """What became of a migration.

    :ivar after_s: how long after *go* its guest began to run
    """

    state: Annotated[State, Field(strict=False)]  # a name of one
    reason: Text = ""
    after_s: Seconds | None = None


class Arrived(Message):
    """How far a stream has come: a round, and frames of it."""

    round: Count
    frames: Count


class FindingSaid(Message):
    """See :class:`migrator.preflight.findings.Finding`."""

    check: Text
    problem: Text
    mend: Text


class BlockSaid(Message):
    """A RAM block: its size is whole pages."""

    name: Name
    size: Annotated[int, Field(gt=0, le=_MOST)]
    page_size: Annotated[int, Field(ge=_PAGE_SIZES[0], le=_PAGE_SIZES[1])]

    @model_validator(mode="after")
    def _whole_pages(self) -> BlockSaid:
        if self.page_size & (self.page_size - 1) or self.size % self.page_size:
            raise ValueError("expected whole pages, of a power of two bytes")
        return self


class RoomSaid(Message):
    """See :class:`migrator.transport.space.Room`."""

    filesystem: Annotated[int, Field(ge=0, lt=1 << 64)]
    size_bytes: Count
    allocated_bytes: Count
    free_bytes: Count | None


class RangeSaid(Message):
    """See :class:`tracker.memory.ram.GuestRange`."""

    gpa: Annotated[int, Field(ge=0, lt=1 << 64)]
    size: Annotated[int, Field(ge=0, le=1 << 64)]
    block: Text
    offset: Count


class SideSaid(Message):
    """See :class:`migrator.preflight.waiting.Side`: complete, unless findings say why not."""

    findings: Annotated[list[FindingSaid], Field(max_length=envelope.BLOCKS_LIMIT)]
    blocks: Annotated[list[BlockSaid], Field(max_length=envelope.BLOCKS_LIMIT)] = []
    rooms: Annotated[dict[Name, RoomSaid], Field(max_length=envelope.BLOCKS_LIMIT)] | None = None
    machine: Annotated[dict[Name, Text], Field(max_length=64)] | None = None
    guest_ranges: Annotated[list[RangeSaid], Field(max_length=1 << 16)] = []
    mappers: Annotated[list[FindingSaid], Field(max_length=1 << 16)] = []
    warnings: Annotated[list[Text], Field(max_length=1 << 16)] = []

    @model_validator(mode="after")
    def _complete(self) -> SideSaid:
        if not self.findings:
            if self.machine is None or not self.blocks:
                raise ValueError("expected blocks and a machine, as nothing speaks against it")
            if set(self.rooms or {}) != {block.name for block in self.blocks}:
                raise ValueError("expected a room for each block")
        return self


class Looked(Message):
    """The answer to ``look``."""

    side: SideSaid


class Lack(Message):
    """The answer to ``reserve`` and ``room``: a file system that is too small, if one is."""

    needed: Count | None = None
    free: Count = 0


# -- from the source ----------------------------------------------------------------------------

Decision = Literal["source", "destination"]


class Greeting(Message):
    """The first message of a connection: what it is for."""

    purpose: Literal["migrate", "resume", "stream", "resolve"]
    session: Token = ""
    stream: Annotated[int, Field(ge=0, lt=envelope.STREAMS_LIMIT)] = 0
    round: Count = 0
    decide: Decision | None = None


class Open(Message):
    """Open a migration.

    :ivar blocks: names of RAM blocks, in the order of the indices in frames
    """

    session: Annotated[str, Field(min_length=1, max_length=64)]
    blocks: Annotated[list[Name], Field(max_length=envelope.BLOCKS_LIMIT)]
    reconnect_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    silence_s: Annotated[float, Field(ge=0.1, allow_inf_nan=False)] = 10.0


class Load(Message):
    """Load the device state behind the message, but its last ``end`` bytes."""

    end: Annotated[int, Field(gt=0, le=envelope.STATE_LIMIT)]
    timeout_s: Seconds


class Room(Message):
    """Bytes that the source holds, by block, and by which the guest could grow there."""

    held: Annotated[list[Count], Field(max_length=envelope.BLOCKS_LIMIT)]
    growth: Count


class Go(Message):
    """Give QEMU the end."""

    run: bool
    timeout_s: Seconds = 60.0


class Parting(Message):
    """Part: ``abort`` or ``bye``."""

    reason: Text = ""


def is_busy(said: dict[str, Any]) -> bool:
    """Whether a receiver only says that it is at it still."""
    return said.get("busy") is True
