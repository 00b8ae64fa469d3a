"""May this VM be migrated like this? Every refusal comes with its mend; nothing is changed here."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from migrator.aio import in_thread
from migrator.errors import Finding, NoSpace, Refused
from migrator.preflight.exposure import exposure_warnings
from migrator.preflight.findings import (
    backend_findings,
    geometry_findings,
    layout_findings,
    other_ram_bytes,
    reads_past_page_cache,
    takes_dirty_bits,
    vfio_devices,
)
from migrator.preflight.jobs import job_findings
from migrator.preflight.plan import Plan
from migrator.preflight.waiting import (
    Side,
    block_nodes,
    blocks_of,
    guest_findings,
    machine_of,
    mapper_findings,
    process_findings,
    room_at,
)
from migrator.qemu.qmp import Qmp
from migrator.tracking.strategies import choose_tracker
from migrator.transport.reservation import no_space_to_hold, no_space_to_run
from migrator.transport.space import Room, growth_bytes, margins, to_hold, to_run
from tracker.devices.dma import dma_sources
from tracker.devices.vfio import VfioType1
from tracker.errors import NotTracking, TrackerError
from tracker.memory.ram import GuestRange, RamBlock, parse_flat_view
from tracker.probe.answering import check_answering
from tracker.sources.source import DirtySource
from tracker.sources.uffd import UffdAsync

_log = logging.getLogger(__name__)


async def preflight(
    source: Qmp,
    side: Side,
    *,
    memory_only: bool = False,
    tracker: str = "auto",
    throttles: bool = False,
) -> Plan:
    """Look at both sides.

    :param side: the destination
    :param tracker: name of the source of CPU writes; ``auto`` takes the best that works
    :param throttles: whether writers may be slowed
    :param memory_only: only RAM is to be moved: what QEMU cannot migrate is no reason not to
    :raise Refused: with everything that was found, not only the first
    :raise VmError: a QEMU does not answer
    """
    if side.pid == source.pid:
        raise Refused(
            [Finding("two VMs", "source and destination are the same QEMU", "give two sockets")]
        )
    findings = process_findings(source)
    tracker, unable = await in_thread(choose_tracker, tracker)
    findings += unable
    if throttles and tracker == UffdAsync.name:  # the other one answers anyway
        findings += await in_thread(_throttle_findings)
    if findings:
        raise Refused([*findings, *side.findings])

    state = await source.run_state()
    blockers = await _blocker_findings(source)
    findings += await _source_state_findings(source, state)
    findings += await guest_findings(source)
    findings += side.findings
    if not memory_only:
        findings += blockers
        findings += await job_findings(source)
        findings += _machine_findings(await machine_of(source), side.machine or {})
    backends = await source.memory_backends()
    findings += backend_findings(source.name, backends)
    if findings:
        raise Refused(findings)

    source_blocks = await blocks_of(source)
    findings += geometry_findings(source_blocks, side.blocks)
    if findings:
        raise Refused(findings)
    by_name = {block.name: block for block in side.blocks}
    guest_ranges = parse_flat_view(await source.human("info mtree -f"))
    if not memory_only:
        findings += layout_findings(by_name, guest_ranges, side.guest_ranges)
    readers, unread = await in_thread(_dma_readers, source, source_blocks, guest_ranges)
    qtree = await source.human("info qtree")
    has_vfio = vfio_devices(qtree) > 0
    if has_vfio and not readers and not unread:
        # QEMU says so, and nothing of it was found in the process: that is not "no writes"
        unread = [_unread("none of its VFIO devices was found among its descriptors")]
    findings += unread
    findings += await in_thread(mapper_findings, source, source_blocks)
    findings += side.mappers
    findings += await in_thread(
        lambda: _space_findings(source, source_blocks, side, runs_there=not memory_only)
    )
    if findings:
        raise Refused(findings)

    warnings = await in_thread(exposure_warnings, source.name, source.pid, source_blocks)
    ramblocks = (await source.execute("x-query-ramblock"))["human-readable-text"]
    # a second start of tracking does no harm to a legacy container, and clears all bits elsewhere
    shareable = all(issubclass(reader, VfioType1) for reader in readers)
    return Plan(
        source=source_blocks,
        destination=tuple(by_name[block.name] for block in source_blocks),
        was_running=state == "running",
        other_ram_bytes=other_ram_bytes(ramblocks, {b.name for b in source_blocks}),
        backends=tuple(backends),
        guest_ranges=tuple(guest_ranges),
        direct_io=reads_past_page_cache(await block_nodes(source)),
        stop_first=has_vfio and (takes_dirty_bits(qtree) or not shareable),
        unstoppable_devices=has_vfio and bool(blockers),
        tracker=tracker,
        warnings=(*warnings, *side.warnings),
    )


# -- the kernel, and the source ----------------------------------------------------------------


def _throttle_findings() -> list[Finding]:
    try:
        check_answering()
    except NotTracking as error:
        return [
            Finding(
                "throttle",
                f"writers cannot be slowed by answering them late: {error.reason}",
                "--throttle off; a kernel that behaves is needed (5.19 or newer)",
            )
        ]
    return []


async def _source_state_findings(source: Qmp, state: str) -> list[Finding]:
    findings = []
    if state not in ("running", "paused"):
        findings.append(
            Finding(
                "source state",
                f"the source is in state {state!r}",
                "it has to be running or paused",
            )
        )
    status = await source.migration()
    if status.get("status") in ("setup", "active", "pre-switchover", "device", "cancelling"):
        findings.append(
            Finding(
                "source state",
                f"a migration of the source is under way ({status['status']})",
                "wait for it, or cancel it with migrate_cancel",
            )
        )
    return findings


async def _blocker_findings(source: Qmp) -> list[Finding]:
    return [
        Finding(
            "blocker",
            f"QEMU says: {reason}",
            "remove the device or option it names, or rehearse with --memory-only",
        )
        for reason in (await source.migration()).get("blocked-reasons", [])
    ]


def _machine_findings(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[Finding]:
    mends = {
        "machine type": "give both sides the same versioned -machine",
        "target": "start the destination with the same qemu-system binary",
        "vCPUs": "give both sides the same -smp",
    }
    return [
        Finding(
            what,
            f"{what}: the source has {ours[what]}, the destination {theirs.get(what)}",
            mend,
        )
        for what, mend in mends.items()
        if ours[what] != theirs.get(what)
    ]


# -- RAM ----------------------------------------------------------------------------------------


def _dma_readers(
    source: Qmp, blocks: Sequence[RamBlock], guest_ranges: Sequence[GuestRange]
) -> tuple[list[type[DirtySource]], list[Finding]]:
    """What would tell which pages devices write, and what speaks against that."""
    readers: list[type[DirtySource]] = []
    try:
        for reader in dma_sources(source.pid, blocks, guest_ranges):
            reader.stop()
            readers.append(type(reader))
    except (TrackerError, OSError) as error:
        return [], [_unread(str(error))]
    return readers, []


def _unread(why: str) -> Finding:
    return Finding(
        "VFIO",
        f"what the source's devices write cannot be tracked: {why}",
        "unplug the device (device_del) before migrating",
    )


def _space_findings(
    source: Qmp, blocks: Sequence[RamBlock], side: Side, *, runs_there: bool
) -> list[Finding]:
    """Whether the guest fits the destination's file systems.

    :param runs_there: the guest is to run there too, and to grow as it may at the source
    """
    here = [room_at(source.pid, block) for block in blocks]
    there = [(side.rooms or {})[block.name] for block in blocks]
    held = [room.allocated_bytes for room in here]
    kept = margins(here) if side.pid is not None else {}  # numbers of another host mean nothing
    lack: NoSpace | None = None
    if (found := to_hold(held, there, kept)) is not None:
        lack = no_space_to_hold(found)
    elif runs_there and (found := to_run(held, growth_bytes(here), there, kept)) is not None:
        lack = no_space_to_run(found)
    if lack is None:
        _warn_of_growth(here, there, kept)
        return []
    return [Finding("space", str(lack), "make the file system larger, or use another mem-path")]


def _warn_of_growth(here: Sequence[Room], there: Sequence[Room], kept: Mapping[int, int]) -> None:
    for filesystem in kept:
        pairs = [(a, b) for a, b in zip(here, there, strict=True) if b.filesystem == filesystem]
        free = min((b.free_bytes for _, b in pairs if b.free_bytes is not None), default=None)
        # at the most, both sides come to hold all of the guest's memory
        most = sum(a.growth_bytes + b.growth_bytes for a, b in pairs)
        if free is not None and most > free:
            _log.warning(
                "source and destination share a file system with %d MiB left, and both may come "
                "to need %d MiB of it: the migration is given up if the guest touches too much",
                free >> 20,
                most >> 20,
            )
