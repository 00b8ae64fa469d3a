"""Space for RAM files: the bytes that a migration needs, and those that the source has to keep.

A guest whose file system is full when it touches a page for the first time dies of SIGBUS. So the
destination reserves the pages that the source holds before any is copied, the guest is handed over
only where it may grow as it may at the source, and a copy on the file system of the source itself
is given up while there is still room for the source to grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from migrator.aio import ended, settle
from migrator.errors import Aborted, NoSpace
from migrator.report.phases import Phase, Phases
from tracker.memory.ram import RamBlock

_LEAST_MARGIN_BYTES = 64 << 20
_MARGIN_SHARE = 0.02
_REACTION_S = (
    0.5  # from a look that finds too little to the return of the space, with much to spare
)
_LOOK_S = 0.01
_GUEST_RUNS = (
    Phase.PREFLIGHT,
    Phase.ATTACH,
    Phase.DRAIN,
    Phase.COPY,
    Phase.ROUNDS,
    Phase.SWITCHOVER,
)


@dataclass(frozen=True)
class Room:
    """The file of a RAM block, and the file system that it is on.

    :ivar filesystem: ``st_dev``: blocks with the same one share the free bytes
    :ivar size_bytes: size of the block
    :ivar allocated_bytes: bytes that the file holds already
    :ivar free_bytes: bytes that the file system has left; ``None`` if it has no limit, or if all
        that the block needs was reserved when QEMU mapped it (hugetlbfs)
    """

    filesystem: int
    size_bytes: int
    allocated_bytes: int
    free_bytes: int | None

    @property
    def growth_bytes(self) -> int:
        """Bytes that the file does not hold yet."""
        return max(0, self.size_bytes - self.allocated_bytes)


@dataclass(frozen=True)
class Shortage:
    """A file system with too few free bytes.

    :ivar needed_bytes: bytes that are needed of it
    :ivar free_bytes: bytes that it has left
    :ivar shared: whether RAM of the source is on it too
    """

    needed_bytes: int
    free_bytes: int
    shared: bool = False


def room_of(fd: int, block: RamBlock) -> Room:
    """Look at the file of a block; takes microseconds.

    :param fd: a descriptor of the file
    :raise OSError: the file cannot be looked at
    """
    status, space = os.fstat(fd), os.fstatvfs(fd)
    limited = space.f_blocks and not block.is_hugetlb
    return Room(
        status.st_dev,
        block.size,
        status.st_blocks * 512,
        space.f_bavail * space.f_frsize if limited else None,
    )


def growth_bytes(source: Sequence[Room]) -> int:
    """Bytes that the guest may still allocate where it is."""
    growth: dict[int, int] = {}
    for room in source:
        before = growth.get(room.filesystem, 0)
        more = before + room.growth_bytes
        growth[room.filesystem] = more if room.free_bytes is None else min(more, room.free_bytes)
    return sum(growth.values())


def margins(source: Sequence[Room], grown_bytes: int = 0) -> dict[int, int]:
    """Bytes that have to stay free for the source, by file system that holds RAM of it.

    :param grown_bytes: bytes that the guest allocated within the last half second
    """
    size_bytes = sum(room.size_bytes for room in source)
    least = max(_LEAST_MARGIN_BYTES, int(size_bytes * _MARGIN_SHARE), grown_bytes)
    growth: dict[int, int] = {}
    for room in source:
        if room.free_bytes is not None:
            growth[room.filesystem] = growth.get(room.filesystem, 0) + room.growth_bytes
    return {filesystem: min(least, nbytes) for filesystem, nbytes in growth.items()}


def to_hold(
    held: Sequence[int], destination: Sequence[Room], kept: Mapping[int, int]
) -> Shortage | None:
    """Whether the destination's file systems lack space for the bytes that the source holds.

    :param held: bytes that the source holds, by block
    :param destination: the blocks there, in the same order
    :param kept: :func:`margins` of a source on the same host; empty for one on another host
    """
    for filesystem, blocks in _by_filesystem(held, destination).items():
        needed = sum(max(0, ours - room.allocated_bytes) for ours, room in blocks)
        found = _shortage(blocks, needed + kept.get(filesystem, 0), shared=filesystem in kept)
        if found is not None:
            return found
    return None


def to_run(
    held: Sequence[int], growth: int, destination: Sequence[Room], kept: Mapping[int, int]
) -> Shortage | None:
    """Whether the guest could allocate less at the destination than it can at the source.

    On a file system that both sides share the source's RAM is free once its QEMU has ended, so
    that the margin is enough there.

    :param growth: :func:`growth_bytes` of the source
    :param held: see :func:`to_hold`, likewise ``destination`` and ``kept``
    """
    for filesystem, blocks in _by_filesystem(held, destination).items():
        most = sum(room.growth_bytes for _, room in blocks)
        needed = sum(max(0, ours - room.allocated_bytes) for ours, room in blocks) + growth
        shared = filesystem in kept
        found = _shortage(blocks, min(most, kept[filesystem] if shared else needed), shared=shared)
        if found is not None:
            return found
    return None


_Blocks = list[tuple[int, Room]]


def _by_filesystem(held: Sequence[int], destination: Sequence[Room]) -> dict[int, _Blocks]:
    found: dict[int, _Blocks] = {}
    for ours, room in zip(held, destination, strict=True):
        if room.free_bytes is not None:
            found.setdefault(room.filesystem, []).append((ours, room))
    return found


def _shortage(blocks: _Blocks, needed: int, *, shared: bool) -> Shortage | None:
    free = min(room.free_bytes for _, room in blocks if room.free_bytes is not None)
    return Shortage(needed, free, shared) if needed > free else None


class Growth:
    """Bytes that the source allocated lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def lately(self, held_bytes: int) -> int:
        """Note the bytes that it holds now; tell by how many they grew within half a second."""
        now = self._clock()
        self._seen.append((now, held_bytes))
        # one that is older stays, for the case that no look was taken since
        while len(self._seen) > 1 and self._seen[1][0] <= now - _REACTION_S:
            self._seen.popleft()
        return max(0, held_bytes - min(held for _, held in self._seen))


@contextlib.asynccontextmanager
async def given_up_in_time(
    shortage: Callable[[], NoSpace | None], phases: Phases
) -> AsyncIterator[None]:
    """Cancel the body when there is too little space for the source to go on growing.

    :param shortage: asked a hundred times a second until the guest stands
    :raise Aborted: the body was cancelled for that
    """
    body = asyncio.current_task()
    assert body is not None
    found: list[NoSpace] = []

    async def look() -> None:
        while phases.current in _GUEST_RUNS:
            lack = shortage()
            if lack is not None:
                found.append(lack)
                body.cancel()
                return
            await asyncio.sleep(_LOOK_S)

    looking = asyncio.create_task(look())
    try:
        yield
    except asyncio.CancelledError as error:
        if found:
            raise Aborted(phases.current.value, str(found[0])) from error
        raise
    finally:
        looking.cancel()
        # a body that came to its end has handed the VM over: that is not to be cancelled any more
        await settle(ended(looking), too_late=True)
