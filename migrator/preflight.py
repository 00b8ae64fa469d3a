"""May this VM be migrated like this? Every refusal comes with its mend; nothing is changed here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from migrator.errors import Refused, VmError
from migrator.findings import (
    Finding,
    backend_findings,
    device_findings,
    disk_findings,
    geometry_findings,
    layout_findings,
    network_findings,
    other_ram_bytes,
    reads_past_page_cache,
    takes_dirty_bits,
    vfio_devices,
)
from migrator.qmp import MemoryBackend, Qmp
from migrator.settle import in_thread
from tracker.dma import dma_sources
from tracker.errors import NotTracking, TrackerError
from tracker.probe import check_tracking
from tracker.ram import (
    GuestRange,
    RamBlock,
    find_block,
    open_file,
    other_mappers,
    parse_flat_view,
)
from tracker.source import DirtySource
from tracker.vfio import VfioType1


@dataclass(frozen=True)
class Plan:
    """What preflight found out, for the migration to go by.

    :ivar source: the source's RAM blocks, by name
    :ivar destination: the destination's, in the same order
    :ivar was_running: whether the guest ran; one that was paused stays paused
    :ivar other_ram_bytes: RAM that QEMU sends itself: ROMs, video memory
    :ivar backends: the source's memory backends, to be compared again later
    :ivar guest_ranges: where the source's guest sees its RAM
    :ivar direct_io: whether a disk of the source is read past the page cache, into pages that were
        marked as written before
    :ivar stop_first: whether the guest has to be stopped, and the devices' dirty bits read, before
        QEMU's own migration is started
    :ivar unstoppable_devices: whether a device may go on writing while the guest stands
    """

    source: tuple[RamBlock, ...]
    destination: tuple[RamBlock, ...]
    was_running: bool
    other_ram_bytes: int
    backends: tuple[MemoryBackend, ...]
    guest_ranges: tuple[GuestRange, ...] = ()
    direct_io: bool = False
    stop_first: bool = False
    unstoppable_devices: bool = False

    @property
    def guest_bytes(self) -> int:
        """Size of the guest's RAM."""
        return sum(block.size for block in self.source)


async def preflight(source: Qmp, destination: Qmp, *, memory_only: bool = False) -> Plan:
    """Look at both sides.

    :param memory_only: only RAM is to be moved: what QEMU cannot migrate is no reason not to
    :raise Refused: with everything that was found, not only the first
    :raise VmError: a QEMU does not answer
    """
    findings: list[Finding] = []
    if source.pid == destination.pid:
        raise Refused(
            [Finding("two VMs", "source and destination are the same QEMU", "give two sockets")]
        )
    for vm in (source, destination):
        findings += _process_findings(vm)
    findings += await _kernel_findings()
    if findings:
        raise Refused(findings)

    state = await source.run_state()
    blockers = await _blocker_findings(source)
    findings += await _source_state_findings(source, state)
    findings += await _destination_state_findings(destination)
    for vm in (source, destination):
        findings += device_findings(vm.name, await vm.human("info qtree"))
        findings += network_findings(vm.name, await vm.human("info network"))
        findings += disk_findings(vm.name, await _block_nodes(vm))
    if not memory_only:
        findings += blockers
        findings += await _machine_findings(source, destination)

    backends = await source.memory_backends()
    findings += backend_findings(source.name, backends)
    findings += backend_findings(destination.name, await destination.memory_backends())
    if findings:
        raise Refused(findings)

    source_blocks, destination_blocks = await _blocks(source), await _blocks(destination)
    findings += geometry_findings(source_blocks, destination_blocks)
    if findings:
        raise Refused(findings)
    by_name = {block.name: block for block in destination_blocks}
    destination_blocks = tuple(by_name[block.name] for block in source_blocks)
    guest_ranges = parse_flat_view(await source.human("info mtree -f"))
    if not memory_only:
        findings += layout_findings(
            by_name, guest_ranges, parse_flat_view(await destination.human("info mtree -f"))
        )
    readers, unread = await in_thread(_dma_readers, source, source_blocks, guest_ranges)
    qtree = await source.human("info qtree")
    has_vfio = vfio_devices(qtree) > 0
    if has_vfio and not readers and not unread:
        # QEMU says so, and nothing of it was found in the process: that is not "no writes"
        unread = [_unread("none of its VFIO devices was found among its descriptors")]
    findings += unread
    findings += _mapper_findings(source, source_blocks)
    findings += _mapper_findings(destination, destination_blocks)
    findings += _space_findings(source, source_blocks, destination, destination_blocks)
    if findings:
        raise Refused(findings)

    ramblocks = (await source.execute("x-query-ramblock"))["human-readable-text"]
    # a second start of tracking does no harm to a legacy container, and clears all bits elsewhere
    shareable = all(issubclass(reader, VfioType1) for reader in readers)
    return Plan(
        source=source_blocks,
        destination=destination_blocks,
        was_running=state == "running",
        other_ram_bytes=other_ram_bytes(ramblocks, {b.name for b in source_blocks}),
        backends=tuple(backends),
        guest_ranges=tuple(guest_ranges),
        direct_io=reads_past_page_cache(await _block_nodes(source)),
        stop_first=has_vfio and (takes_dirty_bits(qtree) or not shareable),
        unstoppable_devices=has_vfio and bool(blockers),
    )


async def _block_nodes(vm: Qmp) -> list[dict[str, Any]]:
    return list(await vm.execute("query-named-block-nodes", flat=True))


# -- the processes and their states -------------------------------------------------------------


def _process_findings(vm: Qmp) -> list[Finding]:
    if vm.pid <= 0:
        return [
            Finding(
                "process",
                f"the {vm.name}'s process is in another PID namespace",
                "run this program in the namespace of QEMU, or in the host's",
            )
        ]
    try:
        os.listdir(f"/proc/{vm.pid}/fd")
        open(f"/proc/{vm.pid}/maps", "rb").close()
    except OSError as error:
        return [
            Finding(
                "permission",
                f"process {vm.pid} of the {vm.name} may not be looked at: {error.strerror}",
                "run this program as QEMU's user, or as root",
            )
        ]
    return []


async def _kernel_findings() -> list[Finding]:
    try:
        await in_thread(check_tracking)
    except NotTracking as error:
        return [
            Finding(
                "kernel",
                f"it does not track writes as it has to: {error.reason}",
                "migrator doctor tells more; a kernel that behaves is needed (6.7 or newer)",
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


async def _destination_state_findings(destination: Qmp) -> list[Finding]:
    state = await destination.run_state()
    migration = await destination.migration()
    status = migration.get("status")
    listens = "socket-address" in migration  # QEMU 7.2 has no status then
    if state == "inmigrate" and status in (None, "none") and not listens:
        return []
    found = f"state {state!r}" + (f", migration {status!r}" if status else "")
    if listens:
        found += ", and listens for somebody else's migration"
    return [
        Finding(
            "destination state",
            f"the destination is in {found}",
            "start it anew with the source's command line and -incoming defer",
        )
    ]


async def _machine_findings(source: Qmp, destination: Qmp) -> list[Finding]:
    findings = []
    for what, ask, mend in (
        ("machine type", _machine_type, "give both sides the same versioned -machine"),
        ("target", _target, "start the destination with the same qemu-system binary"),
        ("vCPUs", _vcpus, "give both sides the same -smp"),
    ):
        ours, theirs = await ask(source), await ask(destination)
        if ours != theirs:
            findings.append(
                Finding(what, f"{what}: the source has {ours}, the destination {theirs}", mend)
            )
    return findings


async def _machine_type(vm: Qmp) -> str:
    return str(await vm.execute("qom-get", path="/machine", property="type"))


async def _target(vm: Qmp) -> str:
    return str((await vm.execute("query-target"))["arch"])


async def _vcpus(vm: Qmp) -> int:
    return len(await vm.execute("query-cpus-fast"))


# -- RAM ----------------------------------------------------------------------------------------


async def _blocks(vm: Qmp) -> tuple[RamBlock, ...]:
    try:
        return tuple(
            find_block(vm.pid, backend.name, backend.size, backend.mem_path)
            for backend in await vm.memory_backends()
        )
    except TrackerError as error:
        raise Refused(
            [
                Finding(
                    "RAM",
                    f"{vm.name}, process {vm.pid}: {error}",
                    "the socket has to belong to the QEMU process itself, and its RAM files "
                    "to it alone",
                )
            ]
        ) from error
    except OSError as error:
        raise VmError(vm.name, f"process {vm.pid}: {error}") from error


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


def _mapper_findings(vm: Qmp, blocks: Sequence[RamBlock]) -> list[Finding]:
    return [
        Finding(
            "second mapper",
            f"process {pid} has RAM {name!r} of the {vm.name} mapped too: "
            "what it writes is not seen",
            f"end process {pid}, or the device it serves",
        )
        for pid, name in other_mappers(vm.pid, blocks)
    ]


def _space_findings(
    source: Qmp,
    source_blocks: Sequence[RamBlock],
    destination: Qmp,
    destination_blocks: Sequence[RamBlock],
) -> list[Finding]:
    findings = []
    needed: dict[int, int] = {}
    free: dict[int, int] = {}
    for ours, theirs in zip(source_blocks, destination_blocks, strict=True):
        if theirs.is_hugetlb:  # reserved when QEMU mapped it
            continue
        source_fd = open_file(source.pid, ours)
        destination_fd = open_file(destination.pid, theirs)
        try:
            more = os.fstat(source_fd).st_blocks - os.fstat(destination_fd).st_blocks
            space = os.fstatvfs(destination_fd)
        finally:
            os.close(source_fd)
            os.close(destination_fd)
        needed[theirs.device] = needed.get(theirs.device, 0) + max(0, more) * 512
        if space.f_blocks:
            free[theirs.device] = space.f_bavail * space.f_frsize
    for device, room in free.items():
        if needed[device] > room:
            findings.append(
                Finding(
                    "space",
                    f"the destination's RAM needs {needed[device] >> 20} MiB more, its file "
                    f"system has {room >> 20} MiB left",
                    "make the file system larger, or use another mem-path",
                )
            )
    return findings
