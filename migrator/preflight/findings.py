"""What speaks against a migration, told from what QEMU says: pure functions.

Every finding comes with its mend. :mod:`migrator.preflight.preflight` does the asking.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from migrator.errors import Finding
from migrator.qemu.qmp import MemoryBackend
from tracker.memory.ram import GuestRange, RamBlock

_DEVICE = re.compile(r"^ *dev: ([^,]+), id", re.MULTILINE)
_NO_TRACKING = re.compile(r'^ *x-pre-copy-dirty-page-tracking = "?(?:off|false)', re.MULTILINE)
_OUTSIDE_NETWORK = re.compile(r"^[ \\]*([^:]+): .*\btype=(vhost-user|vhost-vdpa)\b", re.MULTILINE)
_BLOCK_LINE = re.compile(r"^ *(\S.*?) +\d+ \w+ +0x[0-9a-f]+ +0x([0-9a-f]+) +0x", re.MULTILINE)
_IOMMUS = ("intel-iommu", "amd-iommu", "virtio-iommu", "smmuv3", "arm-smmuv3")
_SMALL = 1 << 20  # below it, firmware decides at run time what the guest sees as RAM


# -- devices ------------------------------------------------------------------------------------


def device_findings(vm: str, qtree: str) -> list[Finding]:
    """Devices whose writes no source sees, in QEMU's ``info qtree``."""
    findings = []
    for device in sorted(set(_DEVICE.findall(qtree))):
        if device.startswith(("vhost-user", "vhost-vdpa")):
            findings.append(
                Finding(
                    "vhost-user",
                    f"the {vm} has {device}: guest RAM is written from outside QEMU, by another "
                    "process or a device",
                    "use a device that QEMU or vhost in the kernel serves",
                )
            )
        elif device.startswith(_IOMMUS):
            findings.append(
                Finding(
                    "vIOMMU",
                    f"the {vm} has {device}: device addresses are not guest addresses",
                    "start the VM without it",
                )
            )
        elif device.startswith("vhost-scsi") or device in ("scsi-generic", "scsi-block"):
            findings.append(
                Finding(
                    "O_DIRECT",
                    f"the {vm} has {device}: the host's driver writes guest RAM, unseen",
                    "use scsi-hd, with a disk that is not opened with cache.direct=on",
                )
            )
    return findings


def vfio_devices(qtree: str) -> int:
    """How many VFIO devices there are in QEMU's ``info qtree``."""
    return sum(device.startswith("vfio-") for device in _DEVICE.findall(qtree))


def takes_dirty_bits(qtree: str) -> bool:
    """Whether QEMU's own migration reads, and thereby clears, dirty bits of VFIO devices.

    It does from its start on, unless every device has ``x-pre-copy-dirty-page-tracking=off``: then
    only when it saves the device state (QEMU: ``hw/vfio/common.c``, ``vfio_log_sync_needed``).
    """
    return len(_NO_TRACKING.findall(qtree)) < vfio_devices(qtree)


def network_findings(vm: str, networks: str) -> list[Finding]:
    """Networks whose other end writes guest RAM itself, in QEMU's ``info network``."""
    return [
        Finding(
            "vhost-user",
            f"the {vm} has network {name!r} of type {kind}: guest RAM is written from outside "
            "QEMU, by another process or a device",
            "use a network that QEMU or vhost in the kernel serves, such as tap",
        )
        for name, kind in _OUTSIDE_NETWORK.findall(networks)
    ]


def disk_findings(vm: str, nodes: Sequence[dict[str, Any]]) -> list[Finding]:
    """Disks that are devices of the host, which write guest RAM themselves.

    :param nodes: all block nodes (QAPI: ``query-named-block-nodes``), as the one that opens the
        file need not be the one that the device sees
    """
    return [
        Finding(
            "VFIO",
            f"the {vm} drives {image} itself: the device writes guest RAM, unseen",
            "let the host's driver have the disk, and give the VM its block device",
        )
        for image in sorted(str(node["file"]) for node in nodes if node["drv"] == "nvme")
    ]


def reads_past_page_cache(nodes: Sequence[dict[str, Any]]) -> bool:
    """Whether an image is opened with O_DIRECT.

    What is read from it arrives in a page some time after the page was marked as written, and is
    seen by nobody: such pages have to be compared once no I/O is under way.

    :param nodes: see :func:`disk_findings`
    """
    return any(node["cache"]["direct"] for node in nodes)


# -- RAM ----------------------------------------------------------------------------------------


def backend_findings(vm: str, backends: Sequence[MemoryBackend]) -> list[Finding]:
    """Memory that is not a shared, named file."""
    if not backends:
        return [
            Finding(
                "RAM", f"the {vm} has no memory backend", _ram_mend("ram", 0, "memory-backend-ram")
            )
        ]
    return [
        Finding(
            "RAM",
            f"RAM {backend.name!r} of the {vm} is not a shared file ({backend.kind}, "
            f"share={'on' if backend.share else 'off'})",
            _ram_mend(backend.name, backend.size, backend.kind),
        )
        for backend in backends
        if backend.kind != "memory-backend-file" or not backend.share
    ]


def _ram_mend(name: str, size: int, kind: str) -> str:
    size_text = f"{size >> 20}M" if size else "SIZE"
    ident = name if re.fullmatch(r"[A-Za-z][\w-]*", name) else "ram"
    mend = (
        f"start QEMU with -object memory-backend-file,id={ident},size={size_text},share=on,"
        f"mem-path=/dev/shm -machine ...,memory-backend={ident}"
    )
    if kind == "memory-backend-memfd":
        mend += " (a memfd has no name, so QEMU would send it all by itself)"
    return mend


def geometry_findings(source: Sequence[RamBlock], destination: Sequence[RamBlock]) -> list[Finding]:
    """Blocks that differ in name, size or page size, or are one and the same file."""
    findings = []
    theirs = {block.name: block for block in destination}
    for ours in source:
        other = theirs.pop(ours.name, None)
        if other is None:
            findings.append(
                Finding(
                    "RAM geometry",
                    f"the destination has no RAM {ours.name!r}",
                    "give both sides the same memory backends, with the same ids",
                )
            )
        elif (ours.size, ours.page_size) != (other.size, other.page_size):
            findings.append(
                Finding(
                    "RAM geometry",
                    f"RAM {ours.name!r} is {ours.size} bytes in pages of {ours.page_size} at the "
                    f"source, {other.size} in pages of {other.page_size} at the destination",
                    "give both sides the same size and the same kind of pages",
                )
            )
        elif (ours.device, ours.inode) == (other.device, other.inode):
            findings.append(
                Finding(
                    "RAM geometry",
                    f"RAM {ours.name!r} is the same file at both sides",
                    "give the destination a mem-path of its own",
                )
            )
    for name in theirs:
        findings.append(
            Finding(
                "RAM geometry",
                f"the source has no RAM {name!r}",
                "give both sides the same memory backends, with the same ids",
            )
        )
    return findings


def layout_findings(
    names: Collection[str], source: Sequence[GuestRange], destination: Sequence[GuestRange]
) -> list[Finding]:
    """Blocks that the two guests see at different places.

    :param names: the blocks to look at; what else is mapped, firmware may have moved
    """

    def places(ranges: Sequence[GuestRange]) -> set[tuple[str, int]]:
        return {
            (r.block, r.gpa - r.offset) for r in ranges if r.block in names and r.size >= _SMALL
        }

    return [
        Finding(
            "RAM geometry",
            f"RAM {block!r} is not seen by both guests at offset + {delta:#x}",
            "give both sides the same machine type and -m",
        )
        for block, delta in sorted(places(source) ^ places(destination))
    ]


def other_ram_bytes(ramblocks: str, ours: set[str]) -> int:
    """Bytes of RAM in QEMU's ``x-query-ramblock`` that are not in our blocks."""
    return sum(
        int(used, 16)
        for name, used in _BLOCK_LINE.findall(ramblocks)
        if name not in ours and name.removeprefix("/objects/") not in ours
    )
