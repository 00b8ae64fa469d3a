"""A QEMU in the lab VM whose guest has the lab's ``edu`` device, and lets it write RAM by DMA.

The device is the outer QEMU's. It reaches the inner guest's RAM through the lab's IOMMU, at the
addresses the guest gives it, and the inner QEMU takes no part: this is DMA as hardware does it.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from migrator.guest.edu import BAR, COMMAND_REGISTER, RUN
from migrator.guest.workload import MIB, Workload
from tests.lab.inside.devices import Device
from tests.live.dma import TIMEOUT_S, Guest, started
from tests.live.vms import Machine

# iommufd wants the same leave as type1, as the lab's IOMMU does not remap interrupts.
_UNSAFE_INTERRUPTS = Path("/sys/module/iommufd/parameters/allow_unsafe_interrupts")

WORKLOAD = Workload(working_set_bytes=4 * MIB, dma_pages=4)


def machine(
    device: Device,
    ram: Path,
    *,
    qemu: Sequence[str],
    workload: Workload = WORKLOAD,
    memory: int = 128 * MIB,
    iommufd: bool = False,
) -> Machine:
    """A machine that only the device of its source tells from others: its destination has none.

    :param device: bound to vfio-pci
    :param ram: the file of its RAM, which is not there yet
    :param qemu: the command
    :param memory: bytes, at most 256 MiB: the device reaches no more
    :param iommufd: map it through iommufd (QEMU 9.0 or later) instead of a type1 container
    """
    passed_through = ["-device", f"vfio-pci,sysfsdev={device.sysfs}"]
    if iommufd:
        _UNSAFE_INTERRUPTS.write_text("Y")
        passed_through = ["-object", "iommufd,id=iommufd", *passed_through]
        passed_through[-1] += ",iommufd=iommufd"
    return Machine(
        memory=memory,
        workload=workload,
        ram_path=str(ram),
        source_extra=passed_through,
        qemu=qemu,
    )


@asynccontextmanager
async def running(machine: Machine) -> AsyncIterator[Guest]:
    """Start a VM; its guest beats, walks, and its device has written each page of the region."""
    async with started(machine) as guest:
        await guest.until_beats(3)
        await guest.until_written(machine.workload.dma_pages)
        yield guest


async def until_idle(guest: Guest) -> None:
    """Wait until what the device of a stopped guest had begun has arrived.

    The guest is the only one that starts a transfer, but the device does not stop with it.
    """
    (bar,) = guest.ram[BAR : BAR + 4].view("<u4")
    look = f"xp /1xw {int(bar) + COMMAND_REGISTER:#x}"
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        said = await guest.execute("human-monitor-command", command_line=look)
        found = re.fullmatch(r"[0-9a-f]+: 0x([0-9a-f]{8})\s*", said)
        assert found, said
        if not int(found[1], 16) & RUN:
            return
        assert time.monotonic() < deadline, f"a transfer of more than {TIMEOUT_S:g} s"
        await asyncio.sleep(0.01)


async def stopped(guest: Guest) -> int:
    """Stop the guest, let its device finish, check both; return how many pages it has written."""
    await guest.execute("stop")
    await until_idle(guest)
    return guest.check()
