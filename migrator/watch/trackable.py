"""What there is to be tracked of a VM that nobody wants to move: RAM of every kind."""

from __future__ import annotations

import asyncio
import math
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from migrator.aio import in_thread, settle
from migrator.errors import Finding, QmpUnreachable, Refused, SourceUnreachable, VmError
from migrator.preflight.waiting import guest_findings, mapper_findings, process_findings
from migrator.qemu.qmp import MemoryBackend, Qmp, is_alive
from migrator.tracking.readings import Tracking
from migrator.tracking.sources import Sources
from migrator.tracking.strategies import choose_strategy, cpu_source
from tracker.errors import RamError, TrackerError
from tracker.memory.address import find_block_at
from tracker.memory.ram import GuestRange, RamBlock, find_block, parse_flat_view

_HVA = re.compile(r"Host virtual address for 0x[0-9a-f]+ \((.*)\) is 0x([0-9a-f]+)")
_ENDING_S = 2.0


@dataclass(frozen=True)
class Tracked:
    """A VM that is tracked.

    :ivar sources: started
    :ivar notes: what nobody will see, a sentence an item
    """

    vm: Qmp
    tracking: Tracking
    sources: Sources
    notes: tuple[str, ...]


@asynccontextmanager
async def tracked(source: str, strategy: str = "auto") -> AsyncIterator[Tracked]:
    """Track a running VM, and leave it as it was.

    :param source: QMP socket of the QEMU that runs it
    :param strategy: see :func:`migrator.tracking.strategies.choose_strategy`
    :raise Refused: its RAM cannot be found, or not be tracked in the way that is asked for
    :raise SourceUnreachable: it does not answer
    :raise VmError: it ended, its RAM changed, or somebody else tracks it
    """
    try:
        vm = await Qmp.connect("source", source)
    except QmpUnreachable as error:
        raise SourceUnreachable(error.vm, error.reason) from error
    try:
        async with _started(vm, strategy) as found:
            yield found
    finally:
        await settle(vm.close(), too_late=True)


@asynccontextmanager
async def _started(vm: Qmp, strategy: str) -> AsyncIterator[Tracked]:
    if findings := process_findings(vm):
        raise Refused(findings)
    try:
        pidfd = os.pidfd_open(vm.pid)
    except OSError as error:
        raise VmError(vm.name, f"process {vm.pid}: {error.strerror}") from error
    try:
        tracking, notes = await look(vm, strategy)
        cpu = cpu_source(tracking.tracker, vm.pid, tracking.blocks)
        sources = Sources(vm, tracking, cpu)
        try:
            await sources.start()
            notes += tuple(
                f"{name} reports all that devices could write, not what they do"
                for name in sorted(sources.inexact)
            )
            yield Tracked(vm, tracking, sources, notes)
        finally:
            await settle(sources.stop(), too_late=True)
    except (VmError, TrackerError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # of whoever is shown it
            raise
        if await _has_ended(pidfd):
            raise VmError(vm.name, f"QEMU, process {vm.pid}, has ended") from error
        if isinstance(error, VmError):
            raise
        raise VmError(vm.name, str(error)) from error
    finally:
        os.close(pidfd)


async def _has_ended(pidfd: int) -> bool:
    """Whether the process ends now: its sockets and its memory go before it does."""
    deadline = time.monotonic() + _ENDING_S
    while is_alive(pidfd):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


async def look(vm: Qmp, strategy: str = "auto") -> tuple[Tracking, tuple[str, ...]]:
    """Find the RAM and what can track it, and what nobody will see.

    :param strategy: see :func:`migrator.tracking.strategies.choose_strategy`
    :raise Refused: there is something that cannot be
    """
    backends = tuple(await vm.memory_backends())
    guest_ranges = tuple(parse_flat_view(await vm.human("info mtree -f")))
    try:
        blocks = [await _block(vm, backend, guest_ranges) for backend in backends]
    except RamError as error:
        raise Refused(
            [
                Finding(
                    "RAM",
                    f"{vm.name}, process {vm.pid}: {error}",
                    "the socket has to belong to the QEMU process itself, and its RAM to memory "
                    "backends that the guest sees",
                )
            ]
        ) from error
    if not blocks:
        raise Refused([_no_backend(vm)])
    files = [block for block in blocks if block.has_file]
    tracker, notes, unable = await in_thread(choose_strategy, strategy, blocks)
    if unable:
        raise Refused(unable)
    notes += [
        f"RAM {block.name!r} is not a shared file: it can be watched, but not moved"
        for block in blocks
        if not block.has_file
    ]
    unseen = [*await guest_findings(vm), *await in_thread(mapper_findings, vm, files)]
    notes += [f"not seen: {finding.problem}" for finding in unseen]
    # QEMU lists them in no order; they are told in the guest's
    lowest = {r.block: r.gpa for r in reversed(guest_ranges)}
    blocks.sort(key=lambda block: (lowest.get(block.name, math.inf), block.name))
    tracking = Tracking(tuple(blocks), backends, guest_ranges, tracker, reads=False)
    return tracking, tuple(notes)


async def _block(vm: Qmp, backend: MemoryBackend, ranges: tuple[GuestRange, ...]) -> RamBlock:
    if backend.kind == "memory-backend-file" and backend.share:
        return await in_thread(find_block, vm.pid, backend.name, backend.size, backend.mem_path)
    hva = await _address(vm, backend, ranges)
    return await in_thread(find_block_at, vm.pid, backend.name, backend.size, hva)


async def _address(vm: Qmp, backend: MemoryBackend, ranges: tuple[GuestRange, ...]) -> int:
    """Where QEMU itself says that it has the first byte of a block (HMP: ``gpa2hva``)."""
    seen = [r for r in ranges if r.block in (backend.name, f"/objects/{backend.name}")]
    if not seen:
        raise RamError(backend.name, "the guest does not see it, so QEMU does not tell its address")
    largest = max(seen, key=lambda r: r.size)
    said = await vm.human(f"gpa2hva {largest.gpa:#x}")
    found = _HVA.search(said)
    if found is None or found[1] != largest.block:
        raise RamError(backend.name, f"QEMU does not tell its address: {said.strip()}")
    return int(found[2], 16) - largest.offset


def _no_backend(vm: Qmp) -> Finding:
    return Finding(
        "RAM",
        f"the {vm.name} has no memory backend",
        "start QEMU with -machine ...,memory-backend=ram -object memory-backend-ram,id=ram,size=…",
    )
