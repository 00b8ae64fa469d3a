"""What a QEMU that waits for a VM tells of itself, for the source to compare with its own.

All of it can be written as JSON, as the two may be on different hosts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from migrator.aio import in_thread
from migrator.errors import Finding, Refused, VmError
from migrator.link.messages import SideSaid
from migrator.preflight.exposure import exposure_warnings
from migrator.preflight.findings import (
    backend_findings,
    device_findings,
    disk_findings,
    network_findings,
)
from migrator.qemu.qmp import Qmp
from migrator.transport.space import Room, room_of
from tracker.errors import TrackerError
from tracker.memory.ram import (
    GuestRange,
    RamBlock,
    find_block,
    open_file,
    other_mappers,
    parse_flat_view,
)


@dataclass(frozen=True)
class Side:
    """A QEMU that waits for a VM.

    :ivar pid: its process; ``None`` if that is on another host
    :ivar findings: what speaks against it already; all else is unknown then
    :ivar blocks: its RAM blocks; those of another host have ``hva``, ``device`` and ``inode`` 0
    :ivar rooms: by name of the block
    :ivar machine: what has to be the same at both sides: machine type, target, vCPUs
    :ivar guest_ranges: where its guest will see RAM
    :ivar mappers: other processes that have its RAM mapped, which may be the source itself
    :ivar warnings: sentences about it for people; none of them is a reason not to migrate
    """

    pid: int | None
    findings: tuple[Finding, ...]
    blocks: tuple[RamBlock, ...] = ()
    rooms: Mapping[str, Room] | None = None
    machine: Mapping[str, str] | None = None
    guest_ranges: tuple[GuestRange, ...] = ()
    mappers: tuple[Finding, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON for another host."""
        return asdict(self)

    @classmethod
    def from_said(cls, said: SideSaid) -> Side:
        """What another host said of its side."""
        return cls(
            pid=None,
            findings=tuple(Finding(**f.model_dump()) for f in said.findings),
            blocks=tuple(RamBlock(**b.model_dump(), hva=0, device=0, inode=0) for b in said.blocks),
            rooms={name: Room(**room.model_dump()) for name, room in (said.rooms or {}).items()},
            machine=said.machine,
            guest_ranges=tuple(GuestRange(**r.model_dump()) for r in said.guest_ranges),
            mappers=tuple(Finding(**f.model_dump()) for f in said.mappers),
            warnings=tuple(said.warnings),
        )


async def look_at(vm: Qmp) -> Side:
    """Look at a QEMU that waits; nothing is changed.

    :raise VmError: it does not answer
    """
    findings = process_findings(vm)
    if findings:
        return Side(vm.pid, tuple(findings))
    findings += await _waiting_findings(vm)
    findings += await guest_findings(vm)
    backends = backend_findings(vm.name, await vm.memory_backends())
    machine = await machine_of(vm)
    if findings or backends:
        return Side(vm.pid, (*findings, *backends), machine=machine)
    try:
        blocks = await blocks_of(vm)
    except Refused as refused:
        return Side(vm.pid, refused.findings, machine=machine)
    return Side(
        vm.pid,
        (),
        blocks,
        mappers=tuple(await in_thread(mapper_findings, vm, blocks)),
        rooms={block.name: await in_thread(room_at, vm.pid, block) for block in blocks},
        machine=machine,
        warnings=await in_thread(exposure_warnings, vm.name, vm.pid, blocks),
        guest_ranges=tuple(parse_flat_view(await vm.human("info mtree -f"))),
    )


# -- what both sides are asked ------------------------------------------------------------------


def process_findings(vm: Qmp) -> list[Finding]:
    """Whether the process may be looked at."""
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


async def guest_findings(vm: Qmp) -> list[Finding]:
    """Devices, networks and disks whose writes nobody sees."""
    return [
        *device_findings(vm.name, await vm.human("info qtree")),
        *network_findings(vm.name, await vm.human("info network")),
        *disk_findings(vm.name, await block_nodes(vm)),
    ]


async def block_nodes(vm: Qmp) -> list[dict[str, Any]]:
    """All block nodes (QAPI: ``query-named-block-nodes``)."""
    return list(await vm.execute("query-named-block-nodes", flat=True))


async def machine_of(vm: Qmp) -> dict[str, str]:
    """What has to be the same at both sides."""
    return {
        "machine type": str(await vm.execute("qom-get", path="/machine", property="type")),
        "target": str((await vm.execute("query-target"))["arch"]),
        "vCPUs": str(len(await vm.execute("query-cpus-fast"))),
    }


async def blocks_of(vm: Qmp) -> tuple[RamBlock, ...]:
    """The RAM blocks of all memory backends.

    :raise Refused: one cannot be found, or is not QEMU's alone
    :raise VmError: the process cannot be looked at
    """
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


def mapper_findings(vm: Qmp, blocks: Sequence[RamBlock]) -> list[Finding]:
    """Other processes that have the RAM mapped."""
    return [
        Finding(
            "second mapper",
            f"process {pid} has RAM {name!r} of the {vm.name} mapped too: "
            "what it writes is not seen",
            f"end process {pid}, or the device it serves",
        )
        for pid, name in other_mappers(vm.pid, blocks)
    ]


# -- what only the one that waits is asked ------------------------------------------------------


async def _waiting_findings(vm: Qmp) -> list[Finding]:
    state = await vm.run_state()
    migration = await vm.migration()
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


def room_at(pid: int, block: RamBlock) -> Room:
    """See :func:`migrator.transport.space.room_of`.

    :raise OSError, RamError: the file cannot be looked at
    """
    fd = open_file(pid, block)
    try:
        return room_of(fd, block)
    finally:
        os.close(fd)
