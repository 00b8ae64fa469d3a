"""What QEMU says about itself, and what is found in it."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from migrator.errors import Finding
from migrator.preflight.findings import (
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
from migrator.qemu.process import RunDirectory, Vm
from migrator.qemu.qmp import MemoryBackend, Qmp
from tests.conftest import require
from tracker.memory.ram import GuestRange, RamBlock, find_block, parse_flat_view

QEMU = "qemu-system-x86_64"
GIB = 1 << 30
PAGE = 4096


def checks(findings: list[Finding]) -> list[str]:
    """Their names; each has to say what it found and what to do about it."""
    for finding in findings:
        assert finding.problem
        assert finding.mend
    return [finding.check for finding in findings]


# -- devices ------------------------------------------------------------------------------------

QTREE = """\
bus: main-system-bus
  type System
  dev: hpet, id ""
    gpio-in "" 2
    timers = 3 (0x3)
  dev: q35-pcihost, id ""
    bus: pcie.0
      type PCIE
      dev: virtio-net-pci, id "nic"
        bus: virtio-bus
          type virtio-pci-bus
          dev: virtio-net-device, id ""
            mac = "52:54:00:12:34:56"
            netdev = "vhost-user-looking-name"
      dev: VGA, id "vfio-pci"
        vgamem_mb = 16 (0x10)
"""


def test_a_harmless_tree() -> None:
    assert device_findings("source", QTREE) == []
    assert device_findings("source", "") == []


@pytest.mark.parametrize(
    ("device", "check"),
    [
        ("vhost-user-blk-pci", "vhost-user"),
        ("vhost-user-fs-pci", "vhost-user"),
        ("vhost-user-gpu", "vhost-user"),
        ("vhost-vdpa-device-pci", "vhost-user"),
        ("scsi-generic", "O_DIRECT"),
        ("scsi-block", "O_DIRECT"),
        ("intel-iommu", "vIOMMU"),
        ("amd-iommu", "vIOMMU"),
        ("virtio-iommu-pci", "vIOMMU"),
        ("arm-smmuv3", "vIOMMU"),
    ],
)
def test_a_device_that_writes_unseen(device: str, check: str) -> None:
    found = device_findings("source", QTREE + f'      dev: {device}, id "x"\n        a = 1\n')
    assert checks(found) == [check]
    assert device in found[0].problem
    assert "source" in found[0].problem


def test_each_kind_of_device_once() -> None:
    tree = "".join(f'  dev: vfio-pci, id "{n}"\n' for n in range(3)) + '  dev: intel-iommu, id ""\n'
    assert checks(device_findings("source", tree)) == ["vIOMMU"]


# -- disks --------------------------------------------------------------------------------------


def node(file: str, direct: bool = False, drv: str = "raw") -> dict[str, Any]:
    cache = {"direct": direct, "writeback": True, "no-flush": False}
    return {"node-name": f"#{file}", "file": file, "drv": drv, "cache": cache}


def test_disks() -> None:
    assert disk_findings("source", []) == []
    assert disk_findings("source", [node("/a"), node("/b", drv="file")]) == []
    nodes = [node("/a"), node("/b"), node("/b", direct=True, drv="file")]
    assert disk_findings("source", nodes) == []
    assert reads_past_page_cache(nodes)
    assert not reads_past_page_cache(nodes[:2])


def test_a_controller_that_qemu_drives_itself() -> None:
    """By VFIO, straight into guest RAM, whatever its cache is said to be."""
    found = disk_findings("source", [node("nvme://0000:01:00.0/1", drv="nvme")])
    assert checks(found) == ["VFIO"]
    assert "the source drives nvme://0000:01:00.0/1 itself" in found[0].problem


# -- VFIO devices -------------------------------------------------------------------------------

WITH_TRACKING = """
  dev: vfio-pci, id "a"
    x-pre-copy-dirty-page-tracking = "on"
"""
WITHOUT_TRACKING = """
  dev: vfio-pci, id "b"
    x-pre-copy-dirty-page-tracking = "off"
"""


@pytest.mark.parametrize(
    ("qtree", "devices", "takes"),
    [
        ('  dev: virtio-blk-pci, id ""\n', 0, False),
        (WITH_TRACKING, 1, True),
        (WITHOUT_TRACKING, 1, False),
        (WITH_TRACKING + WITHOUT_TRACKING, 2, True),
        ('  dev: vfio-pci, id "a"\n', 1, True),  # a QEMU that has no such option
    ],
)
def test_vfio_devices(qtree: str, devices: int, takes: bool) -> None:
    assert vfio_devices(qtree) == devices
    assert takes_dirty_bits(qtree) == takes
    assert device_findings("source", qtree) == []


# -- networks -----------------------------------------------------------------------------------

NETWORK = """\
virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56
 \\ net0: index=0,type={},{}
hub 0
 \\ hub0port0: index=0,type=user,net=10.0.2.0,restrict=off
"""


@pytest.mark.parametrize("kind", ["tap", "user", "socket", "l2tpv3"])
def test_harmless_networks(kind: str) -> None:
    assert network_findings("source", NETWORK.format(kind, "ifname=vhost-user")) == []
    assert network_findings("source", "") == []


@pytest.mark.parametrize("kind", ["vhost-user", "vhost-vdpa"])
def test_networks_that_write_from_outside(kind: str) -> None:
    found = network_findings("source", NETWORK.format(kind, "fwd=x"))
    assert checks(found) == ["vhost-user"]
    assert "'net0'" in found[0].problem
    assert kind in found[0].problem


# -- backends -----------------------------------------------------------------------------------

GOOD = MemoryBackend("ram", "memory-backend-file", GIB, True, "/dev/shm")


def test_good_backends() -> None:
    assert backend_findings("source", [GOOD, replace(GOOD, name="more")]) == []


@pytest.mark.parametrize(
    "bad",
    [
        replace(GOOD, share=False),
        replace(GOOD, kind="memory-backend-ram", mem_path=""),
        replace(GOOD, kind="memory-backend-ram", share=False, mem_path=""),
        replace(GOOD, kind="memory-backend-memfd", mem_path=""),
        replace(GOOD, kind="memory-backend-epc"),
    ],
)
def test_bad_backends(bad: MemoryBackend) -> None:
    found = backend_findings("source", [replace(GOOD, name="good"), bad])
    assert checks(found) == ["RAM"]
    assert "'ram' of the source" in found[0].problem
    assert bad.kind in found[0].problem
    assert "memory-backend-file,id=ram,size=1024M,share=on" in found[0].mend
    assert ("memfd has no name" in found[0].mend) == (bad.kind == "memory-backend-memfd")


def test_the_name_of_a_default_backend_is_no_id() -> None:
    default = MemoryBackend("pc.ram", "memory-backend-ram", GIB, False, "")
    (finding,) = backend_findings("source", [default])
    assert "id=ram," in finding.mend


def test_no_backend_at_all() -> None:
    assert checks(backend_findings("source", [])) == ["RAM"]


# -- geometry and layout ------------------------------------------------------------------------

BLOCK = RamBlock("ram", 64 * PAGE, PAGE, 0x7F0000000000, device=27, inode=5)
OTHER = replace(BLOCK, hva=0x7E0000000000, inode=6)


def test_two_sides_that_fit() -> None:
    more = replace(BLOCK, name="more", inode=7), replace(OTHER, name="more", inode=8)
    assert geometry_findings([BLOCK, more[0]], [more[1], OTHER]) == []
    # the same inode on another file system is another file
    assert geometry_findings([BLOCK], [replace(OTHER, device=28, inode=5)]) == []


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ([], "the destination has no RAM 'ram'"),
        ([replace(OTHER, size=65 * PAGE)], f"{64 * PAGE} bytes in pages of 4096"),
        ([replace(OTHER, page_size=2 << 20)], f"in pages of {2 << 20} at the destination"),
        ([replace(OTHER, device=27, inode=5)], "the same file"),
        ([OTHER, replace(OTHER, name="more")], "the source has no RAM 'more'"),
    ],
)
def test_two_sides_that_do_not(theirs: list[RamBlock], said: str) -> None:
    found = geometry_findings([BLOCK], theirs)
    assert checks(found) == ["RAM geometry"]
    assert said in found[0].problem


def test_another_name_is_two_findings() -> None:
    assert len(geometry_findings([BLOCK], [replace(OTHER, name="more")])) == 2


LOW = GuestRange(0, 2 * GIB, "ram", 0)
HIGH = GuestRange(4 * GIB, 3 * GIB, "ram", 2 * GIB)


def test_the_same_layout() -> None:
    assert layout_findings(["ram"], [LOW, HIGH], [HIGH, LOW]) == []


def test_what_firmware_moves_does_not_matter() -> None:
    """Shadowed ROM below 1 MiB cuts the RAM there differently at a side that has not booted."""
    cut = [
        GuestRange(0, 0xC0000, "ram", 0),
        GuestRange(0x100000, 2 * GIB - 0x100000, "ram", 0x100000),
        GuestRange(0xFFFC0000, 0x40000, "pc.bios", 0),
        HIGH,
    ]
    assert layout_findings(["ram"], [LOW, HIGH], cut) == []
    vga = GuestRange(0xFD000000, 16 << 20, "vga.vram", 0)
    assert layout_findings(["ram"], [LOW, HIGH, vga], cut) == []


@pytest.mark.parametrize(
    "theirs",
    [
        [LOW],
        [LOW, replace(HIGH, gpa=5 * GIB)],
        [replace(LOW, size=3 * GIB), replace(HIGH, offset=3 * GIB)],
        [LOW, replace(HIGH, block="more")],
    ],
)
def test_another_layout(theirs: list[GuestRange]) -> None:
    for found in (
        layout_findings(["ram", "more"], [LOW, HIGH], theirs),
        layout_findings(["ram", "more"], theirs, [LOW, HIGH]),
    ):
        assert set(checks(found)) == {"RAM geometry"}


# -- RAM that QEMU sends itself -----------------------------------------------------------------

RAMBLOCKS = """\
              Block Name    PSize              Offset               Used              Total
                     ram    4 KiB  0x0000000000000000 0x0000000140000000 0x0000000140000000
    /rom@etc/acpi/tables    4 KiB  0x0000000140080000 0x0000000000020000 0x0000000000200000
                 pc.bios    4 KiB  0x0000000140000000 0x0000000000040000 0x0000000000040000
           /objects/more    2 MiB  0x0000000150000000 0x0000000010000000 0x0000000010000000
"""
RAMBLOCKS_10 = """\
              Block Name    PSize              Offset               Used              Total\
                HVA  RO
                     ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000\
 0x00007f5a33e00000  rw
   0000:00:02.0/vga.vram    4 KiB  0x0000000010080000 0x0000000001000000 0x0000000001000000\
 0x00007f5a32e00000  rw
                 pc.bios    4 KiB  0x0000000010000000 0x0000000000040000 0x0000000000040000\
 0x00007f5a43e00000  ro
"""


def test_other_ram() -> None:
    assert other_ram_bytes(RAMBLOCKS, {"ram", "more"}) == 0x60000
    assert other_ram_bytes(RAMBLOCKS, {"more"}) == 0x140060000
    assert other_ram_bytes(RAMBLOCKS_10, {"ram"}) == 0x1040000
    assert other_ram_bytes("", {"ram"}) == 0


# -- a real QEMU --------------------------------------------------------------------------------

Body = Callable[[Qmp], Awaitable[None]]


def with_qemu(body: Body, *arguments: str) -> None:
    """Start a QEMU whose guest does not run, and ask it."""
    require(None if shutil.which(QEMU) else f"{QEMU} is not installed")

    async def run() -> None:
        with RunDirectory() as directory:
            vm = Vm("source", directory)
            try:
                bare = ["-accel", "tcg", "-S", "-nodefaults", "-display", "none"]
                await vm.start([QEMU, *bare, *arguments], incoming=False)
                qmp = await Qmp.connect(vm.name, vm.qmp)
                try:
                    await body(qmp)
                finally:
                    await qmp.close()
            finally:
                await vm.stop()

    asyncio.run(run())


async def nodes_of(qmp: Qmp) -> list[dict[str, Any]]:
    return list(await qmp.execute("query-named-block-nodes", flat=True))


def ram(*sizes: int) -> list[str]:
    arguments = ["-m", f"{sum(sizes) >> 20}M"]
    for node, size in enumerate(sizes):
        arguments += [
            "-object",
            f"memory-backend-file,id=ram{node},size={size},share=on,mem-path=/dev/shm",
        ]
        if len(sizes) > 1:
            arguments += ["-numa", f"node,nodeid={node},memdev=ram{node}"]
    return arguments


def machine(name: str, nodes: int) -> list[str]:
    return ["-machine", name if nodes > 1 else f"{name},memory-backend=ram0"]


@pytest.mark.live
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(("name", "below"), [("q35", 2 * GIB), ("pc", 3 * GIB)])
def test_a_real_machine_of_more_than_4_gib(name: str, below: int, nodes: int) -> None:
    sizes = [6 * GIB // nodes] * nodes

    async def body(qmp: Qmp) -> None:
        backends = await qmp.memory_backends()
        assert sorted((b.name, b.size) for b in backends) == [
            (f"ram{node}", size) for node, size in enumerate(sizes)
        ]
        assert backend_findings("source", backends) == []
        names = {b.name for b in backends}
        for backend in backends:
            block = find_block(qmp.pid, backend.name, backend.size, backend.mem_path)
            assert (block.size, block.page_size) == (backend.size, PAGE)

        view = parse_flat_view(await qmp.human("info mtree -f"))
        ours = sorted((r for r in view if r.block in names), key=lambda r: r.gpa)
        # where the guest sees each byte of RAM, but what is shadowed below 1 MiB
        for wanted in places(sizes, below):
            assert sum(covers(r, wanted) for r in ours) == 1, wanted
        assert sum(r.size for r in ours) in range(sum(sizes) - (1 << 20), sum(sizes) + 1)
        assert layout_findings(names, view, view) == []
        moved = [replace(r, gpa=r.gpa + GIB) if r.gpa >= 4 * GIB else r for r in view]
        assert layout_findings(names, view, moved)

        text = (await qmp.execute("x-query-ramblock"))["human-readable-text"]
        rest = other_ram_bytes(text, names)
        assert 256 << 10 <= rest < 64 << 20
        assert other_ram_bytes(text, set()) == rest + sum(sizes)

        assert device_findings("source", await qmp.human("info qtree")) == []
        assert disk_findings("source", await nodes_of(qmp)) == []
        assert network_findings("source", await qmp.human("info network")) == []

    with_qemu(body, *machine(name, nodes), *ram(*sizes))


def places(sizes: list[int], below: int) -> list[GuestRange]:
    """Single pages at all the edges: of the blocks, and of the hole."""
    found, start = [], 0
    for node, size in enumerate(sizes):
        edges = {0, size - PAGE, 1 << 20, size // 2}
        edges |= {at - start for at in (below - PAGE, below) if 0 <= at - start < size}
        for offset in edges:
            gpa = start + offset
            gpa += 4 * GIB - below if gpa >= below else 0
            found.append(GuestRange(gpa, PAGE, f"ram{node}", offset))
        start += size
    return found


def covers(whole: GuestRange, part: GuestRange) -> bool:
    return (
        whole.block == part.block
        and whole.gpa <= part.gpa
        and part.gpa + part.size <= whole.gpa + whole.size
        and whole.gpa - whole.offset == part.gpa - part.offset
    )


@pytest.mark.live
def test_real_devices() -> None:
    async def body(qmp: Qmp) -> None:
        tree = await qmp.human("info qtree")
        assert "dev: virtio-net-pci" in tree
        network = await qmp.human("info network")
        assert "net0: index=0,type=user" in network
        assert network_findings("source", network) == []
        assert checks(device_findings("source", tree)) == ["vIOMMU"]

    devices = ["-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0"]
    devices += ["-device", "qemu-xhci", "-device", "intel-iommu"]
    with_qemu(body, *machine("q35", 1), *ram(64 << 20), *devices)


@pytest.fixture
def image() -> Any:
    with tempfile.NamedTemporaryFile(prefix="test-preflight-", dir="/var/tmp") as file:
        os.truncate(file.name, 1 << 20)
        yield Path(file.name)


@pytest.mark.live
@pytest.mark.parametrize(
    ("drive", "direct"),
    [
        (["-drive", "if=none,id=d,format=raw,cache=none,file={}"], True),
        (["-drive", "if=none,id=d,format=raw,cache=directsync,file={}"], True),
        (["-drive", "if=none,id=d,format=raw,cache=writeback,file={}"], False),
        (["-drive", "if=none,id=d,format=raw,cache=writethrough,file={}"], False),
        (
            [
                *["-blockdev", "file,node-name=f,filename={},cache.direct=on"],
                *["-blockdev", "raw,node-name=d,file=f"],
            ],
            True,
        ),
        (
            [
                *["-blockdev", "file,node-name=f,filename={}"],
                *["-blockdev", "raw,node-name=d,file=f"],
            ],
            False,
        ),
    ],
)
def test_real_disks(image: Path, drive: list[str], direct: bool) -> None:
    async def body(qmp: Qmp) -> None:
        assert reads_past_page_cache(await nodes_of(qmp)) == direct

    drive = [argument.format(image) for argument in drive]
    device = ["-device", "virtio-blk-pci,drive=d"]
    with_qemu(body, *machine("q35", 1), *ram(64 << 20), *drive, *device)
