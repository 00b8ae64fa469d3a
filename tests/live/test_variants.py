"""VMs of many kinds move: machine types, kinds of RAM, devices, users, versions of QEMU."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from migrator import migrate
from migrator.qemu.process import Vm
from migrator.qemu.qmp import Qmp
from migrator.report.phases import Phase
from tests.conftest import require
from tests.live.moving import VERIFIED, Ram, TwoKinds, move, once
from tests.live.qemus import BACKPORTS, QEMUS, SYSTEM, Qemu, each_qemu
from tests.live.vms import MIB, Machine, pair

pytestmark = pytest.mark.live

GIB = 1 << 30
NOBODY = 65534
ROOT_ONLY = None if os.geteuid() == 0 else "only root may do this"


def moves(machine: Machine, page_size: int = 4096) -> None:
    async def body() -> None:
        async with pair(machine) as vms:
            report = await move(vms)
            assert report.verified_pages == machine.memory // page_size
            await vms.check_heartbeat_unbroken()

    asyncio.run(body())


@each_qemu
@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_machine_types(qemu: Qemu, machine: str) -> None:
    moves(Machine(machine=machine, qemu=qemu.require()))


@each_qemu
def test_two_numa_nodes(qemu: Qemu) -> None:
    moves(Machine(nodes=2, qemu=qemu.require()))


@each_qemu
def test_multifd_that_was_left_on(qemu: Qemu) -> None:
    """As QEMU's own migration leaves it where it has brought a VM."""

    async def body() -> None:
        async with pair(Machine(qemu=qemu.require())) as vms:
            for vm in (vms.source, vms.destination):
                qmp = await Qmp.connect(vm.name, vm.qmp)
                await qmp.set_capabilities({"multifd": True})
                await qmp.close()
            await move(vms)
            await vms.check_heartbeat_unbroken()

    asyncio.run(body())


def test_from_an_old_qemu_to_a_new_one() -> None:
    require(None if BACKPORTS in QEMUS else "the system's QEMU is the newest there is")
    moves(
        TwoKinds(machine="pc-q35-7.2", qemu=SYSTEM.require(), destination_qemu=BACKPORTS.require())
    )


@each_qemu
def test_pages_above_4_gib_of_a_block(qemu: Qemu) -> None:
    """Both offsets in the block and addresses of the guest that do not fit 32 bits."""
    machine = Machine(memory=6 * GIB, qemu=qemu.require())
    before, during = 4 * GIB + 5 * MIB, 6 * GIB - 4096

    async def body() -> None:
        async with pair(machine) as vms:
            source, destination = Ram(vms.source, machine), Ram(vms.destination, machine)
            source.write(before, b"before" * 4096)
            source.write(during, b"x" * 4096)

            def write() -> None:
                assert destination.read(before, 6) == b"before"
                source.write(during, b"during")

            report = await move(vms, once(Phase.ROUNDS, write))
            assert report.verified_pages == machine.memory // 4096
            assert destination.read(before, 6 * 4096) == b"before" * 4096
            assert destination.read(during, 8) == b"duringxx"
            await vms.check_heartbeat_unbroken()

    asyncio.run(body())


# -- kinds of RAM -------------------------------------------------------------------------------


def test_ram_in_files_with_names(tmpfs: Path) -> None:
    moves(TwoKinds(ram_path=f"{tmpfs}/source", destination_ram_path=f"{tmpfs}/destination"))


def test_ram_on_a_disk(disk: Path) -> None:
    moves(Machine(memory=128 * MIB, ram_path=str(disk)))


def test_destination_with_preallocated_ram() -> None:
    moves(TwoKinds(destination_ram_path="/dev/shm,prealloc=on"))


def test_destination_with_garbage_in_its_ram(tmpfs: Path) -> None:
    garbage = tmpfs / "garbage"
    garbage.write_bytes(os.urandom(MIB) * (Machine().memory // MIB))
    moves(TwoKinds(destination_ram_path=str(garbage)))


def on_huge_pages(directory: Path, destination: str = "") -> TwoKinds:
    return TwoKinds(
        memory=128 * MIB, ram_path=str(directory), destination_ram_path=f"{directory}{destination}"
    )


@each_qemu
def test_ram_on_huge_pages(hugetlbfs: Path, qemu: Qemu) -> None:
    """There and on: what arrived at a destination can go on from there."""
    machine = replace(on_huge_pages(hugetlbfs), qemu=qemu.require())

    async def body() -> None:
        async with pair(machine) as vms:
            report = await move(vms)
            assert report.verified_pages == machine.memory // (2 * MIB)
            await vms.check_heartbeat_unbroken()
            await vms.source.stop()
            vms.source, third = vms.destination, Vm("third", vms.directory)
            vms.destination = third
            try:
                await vms.start_destination()
                await move(vms)
                await vms.beats(third, 3)
            finally:
                await third.stop()

    asyncio.run(body())


def test_ram_on_huge_pages_preallocated_at_the_destination(hugetlbfs: Path) -> None:
    moves(on_huge_pages(hugetlbfs, ",prealloc=on"), page_size=2 * MIB)


# -- states of the guest ------------------------------------------------------------------------


def test_destination_started_with_its_cpus_stopped() -> None:
    moves(Machine(destination_extra=["-S"]))


def test_a_paused_guest_stays_paused() -> None:
    async def body() -> None:
        async with pair() as vms:
            await tell(vms.source, "stop")
            report = await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED)
            assert report.status == "completed"
            assert report.mismatched_pages == 0
            assert report.downtime_ms is None
            assert await vms.state(vms.source) == "postmigrate"
            assert await vms.state(vms.destination) == "paused"
            assert vms.destination.console.read_bytes() == b""
            await tell(vms.destination, "cont")
            await vms.check_heartbeat_unbroken()

    asyncio.run(body())


async def tell(vm: Vm, command: str) -> None:
    qmp = await Qmp.connect(vm.name, vm.qmp)
    try:
        await qmp.execute(command)
    finally:
        await qmp.close()


# -- devices ------------------------------------------------------------------------------------


@each_qemu
def test_with_a_screen_and_virtio_and_usb(qemu: Qemu, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4 * MIB))
    devices = [
        *["-vga", "std"],
        *["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"],
        *["-device", "virtio-balloon-pci", "-device", "virtio-rng-pci"],
        *["-drive", f"if=none,id=disk,format=raw,cache=writeback,file.locking=off,file={disk}"],
        *["-device", "virtio-blk-pci,drive=disk"],
        *["-device", "qemu-xhci", "-device", "usb-tablet"],
    ]
    moves(Machine(extra=devices, qemu=qemu.require()))


# -- users --------------------------------------------------------------------------------------


def test_qemu_that_gave_up_root() -> None:
    require(ROOT_ONLY)
    moves(Machine(extra=["-runas", "nobody"]))


def test_qemu_of_another_user_in_a_sandbox() -> None:
    """As libvirt runs it."""
    require(ROOT_ONLY)
    deny = "obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    machine = Machine(qemu=[*as_nobody, *SYSTEM.require()], extra=["-sandbox", f"on,{deny}"])

    async def body() -> None:
        async with pair(machine, start=False) as vms:
            for path in (vms.directory, vms.source.console, vms.destination.console):
                if path != vms.directory:
                    path.touch()
                os.chown(path, NOBODY, NOBODY)
            await vms.start_destination()
            await vms.start_source()
            status = Path(f"/proc/{vms.source.pid}/status").read_text().split()
            assert status[status.index("Uid:") + 1] == str(NOBODY)
            assert status[status.index("Seccomp:") + 1] == "2"
            await move(vms)
            await vms.check_heartbeat_unbroken()

    asyncio.run(body())
