"""A running VM moves: the whole path on the real kernel and the real QEMU."""

from __future__ import annotations

import asyncio
import mmap
import os

import numpy as np
import pytest

from migrator import migrate
from migrator.guest.workload import check_walk
from migrator.qemu.qmp import Qmp
from tests.live.moving import VERIFIED
from tests.live.vms import MIB, Machine, pair
from tracker.memory.ram import find_block, open_file

pytestmark = pytest.mark.live


def test_a_running_vm_moves_and_every_page_is_equal() -> None:
    async def body() -> None:
        async with pair() as vms:
            report = await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED, watch=None)
            assert report.status == "completed"
            assert report.mismatched_pages == 0
            assert report.verified_pages == 256 * MIB // 4096
            assert report.pages_sent >= 32 * MIB // 4096
            assert report.downtime_ms is not None
            assert report.downtime_ms > 0
            in_phases = sum(report.phases[name] for name in report.downtime_phases)
            assert in_phases == pytest.approx(report.downtime_ms, abs=1.0)
            assert sum(report.phases.values()) == pytest.approx(report.total_ms, abs=1.0)
            assert report.qemu_ram_transferred is not None
            assert report.qemu_ram_transferred < MIB
            assert await vms.state(vms.source) == "postmigrate"
            assert await vms.state(vms.destination) == "running"
            assert vms.traces(vms.source) == []
            await vms.check_heartbeat_unbroken()

    asyncio.run(body())


def test_the_walk_goes_on_in_the_destinations_ram() -> None:
    """The guest's own oracle, independent of any comparison: at most one edge, anywhere."""

    async def body() -> None:
        async with pair() as vms:
            await migrate(vms.source.qmp, vms.destination.qmp)
            # long enough that the walk has passed over every page that was sent
            await vms.beats(vms.destination, 50)
            qmp = await Qmp.connect("destination", vms.destination.qmp)
            try:
                await qmp.execute("stop")
                (backend,) = await qmp.memory_backends()
            finally:
                await qmp.close()
            block = find_block(vms.destination.pid, backend.name, backend.size, backend.mem_path)
            fd = open_file(vms.destination.pid, block)
            with mmap.mmap(fd, block.size, mmap.MAP_SHARED, mmap.PROT_READ) as ram:
                memory = np.frombuffer(ram, np.uint8)
                walk = check_walk(memory, vms.machine.workload)
                stale = memory.copy()
                del memory
            os.close(fd)
            assert walk.ok, walk.problem
            assert walk.value > 0
            # and it would notice a page that is one pass behind
            page = vms.machine.workload.start + 1000 * 4096
            stale[page] -= 1
            assert not check_walk(stale, vms.machine.workload).ok

    asyncio.run(body())


def test_a_guest_above_the_pci_hole() -> None:
    async def body() -> None:
        async with pair(Machine(memory=5 << 30)) as vms:
            report = await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED)
            assert report.mismatched_pages == 0
            assert report.verified_pages == (5 << 30) // 4096
            await vms.check_heartbeat_unbroken()

    asyncio.run(body())
