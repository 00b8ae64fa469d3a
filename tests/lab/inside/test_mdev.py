"""QEMUs with VFIO devices: which of them QEMU would migrate, and which not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from migrator.qemu.process import Vm
from migrator.qemu.qmp import Qmp
from tests.lab.inside.devices import Device
from tests.live.vms import MIB, Machine, pair


def passed_through(device: Device) -> list[str]:
    """Arguments that give a guest a device of VFIO's."""
    return ["-device", f"vfio-pci,sysfsdev={device.sysfs}"]


async def blocked_reasons(vm: Vm) -> list[str]:
    """Why QEMU would not migrate a VM; nothing if it would (QAPI: MigrationInfo)."""
    qmp = await Qmp.connect(vm.name, vm.qmp)
    try:
        return list((await qmp.migration()).get("blocked-reasons", []))
    finally:
        await qmp.close()


def test_qemu_would_migrate_an_mtty(
    make_mtty: Callable[[], Device], inner_qemu: tuple[str, ...]
) -> None:
    machine = Machine(
        memory=64 * MIB,
        qemu=inner_qemu,
        source_extra=passed_through(make_mtty()),
        destination_extra=passed_through(make_mtty()),
    )

    async def ask() -> tuple[list[str], list[str], str, str]:
        async with pair(machine) as vms:
            return (
                await blocked_reasons(vms.source),
                await blocked_reasons(vms.destination),
                await vms.state(vms.source),
                await vms.state(vms.destination),
            )

    assert asyncio.run(ask()) == ([], [], "running", "inmigrate")


def test_qemu_would_not_migrate_edu(edu: Device, inner_qemu: tuple[str, ...]) -> None:
    machine = Machine(memory=64 * MIB, qemu=inner_qemu, source_extra=passed_through(edu))

    async def ask() -> list[str]:
        async with pair(machine, start=False) as vms:
            await vms.start_source()
            return await blocked_reasons(vms.source)

    (reason,) = asyncio.run(ask())
    assert edu.name in reason
