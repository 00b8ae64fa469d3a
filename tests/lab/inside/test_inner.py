"""DMA of a device that is passed through: it arrives, and write-protection does not see it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from migrator.guest.edu import BAR, SOURCE
from migrator.guest.workload import PAGE_SIZE
from tests.lab.inside import inner
from tests.lab.inside.devices import Device
from tests.live.dma import Guest
from tests.live.moving import Ram
from tests.live.qemus import QEMUS, Qemu
from tests.live.tracked import pages
from tests.live.vms import Machine
from tracker.sources.uffd import UffdAsync


async def check_missed(guest: Guest) -> None:
    """Track a guest for a while; check what is reported against what was written."""
    workload = guest.workload
    vm = guest.vms.source
    block = Ram(vm, guest.vms.machine).block
    uffd = UffdAsync(vm.pid, [block])
    first = await inner.stopped(guest)
    before = guest.ram.copy()
    uffd.start()
    try:
        await guest.execute("cont")
        await guest.until_written(workload.dma_pages + 1)
        await guest.until_beats(3)
        last = await inner.stopped(guest)
        reported = set(pages(uffd.collect()[block.name]).tolist())
    finally:
        uffd.stop()
    differs = (before != guest.ram).reshape(-1, PAGE_SIZE).any(axis=1)
    changed = set(differs.nonzero()[0].tolist())
    region = set(range(workload.dma_start // PAGE_SIZE, workload.dma_end // PAGE_SIZE))
    working_set = set(range(workload.start // PAGE_SIZE, workload.end // PAGE_SIZE))
    driver = {BAR // PAGE_SIZE, SOURCE // PAGE_SIZE}
    assert last > first + workload.dma_pages
    assert region <= changed
    assert changed - reported == region  # missed: all that the device has written, and no more
    assert reported & region == set()
    assert reported & working_set
    assert driver <= reported


@pytest.mark.parametrize(
    ("qemu", "iommufd"),
    [
        pytest.param(QEMUS[0], False, id="type1"),
        pytest.param(QEMUS[-1], True, id="iommufd"),
    ],
)
def test_device_writes_are_missed_by_write_protection(
    edu: Device, qemu: Qemu, iommufd: bool, tmp_path: Path
) -> None:
    machine = inner.machine(edu, tmp_path / "ram", qemu=qemu.require(), iommufd=iommufd)

    async def body(machine: Machine) -> None:
        async with inner.running(machine) as guest:
            await check_missed(guest)

    asyncio.run(body(machine))
