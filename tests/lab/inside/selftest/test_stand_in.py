"""A stand-in for a device behind an IOMMU with dirty bits: it writes a running guest's memory.

It writes the RAM file through a mapping of its own, which is as invisible to QEMU's page tables as
DMA is, and marks what it wrote on the self-test IOMMU, in which the guest's memory is mapped where
the guest has it. The guest writes meanwhile.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import random

import pytest

from migrator.guest.workload import Workload
from migrator.qemu.qmp import Qmp
from tests.lab.inside.selftest.mock_iommu import APERTURE_START, MockIommu
from tests.live.vms import MIB, Machine, Pair, pair
from tracker.bits.merge import Merged, merge
from tracker.devices.iommufd import Iommufd
from tracker.inject import acquire as inject
from tracker.memory.ram import GuestRange, RamBlock, find_block, open_file
from tracker.sources.uffd import UffdAsync

PAGE = mmap.PAGESIZE
SIZE = 64 * MIB
NPAGES = SIZE // PAGE
FIRST = APERTURE_START // PAGE  # the self-test IOMMU maps nothing below
ROUNDS = 3


class StandIn:
    """The device: 100 pages at each call, anywhere in what it reaches."""

    def __init__(self, block: RamBlock, fd: int) -> None:
        self.ram = mmap.mmap(fd, SIZE)
        self.seen = [GuestRange(APERTURE_START, SIZE - APERTURE_START, block.name, APERTURE_START)]
        self._iommu = MockIommu()
        self._anchor = ctypes.c_char.from_buffer(self.ram)
        address = ctypes.addressof(self._anchor) + APERTURE_START
        self._iommu.map(address, SIZE - APERTURE_START, APERTURE_START)
        self._hwpt = self._iommu.attach()
        self._random = random.Random(1)
        self.written: set[int] = set()

    def source(self, block: RamBlock) -> Iommufd:
        """A source that is not started."""
        return Iommufd(os.dup(self._iommu.fd), [block], self.seen)

    def write(self) -> set[int]:
        """Write, then mark; return the pages."""
        pages = set(self._random.sample(range(FIRST, NPAGES), 100))
        for page in pages:
            self.ram[page * PAGE : (page + 1) * PAGE] = self._random.randbytes(PAGE)
        self._iommu.write_pages(self._hwpt, APERTURE_START, {page - FIRST for page in pages})
        self.written |= pages
        return pages

    def close(self) -> None:
        """Let go of everything."""
        self._iommu.close()
        del self._anchor
        self.ram.close()


async def copied(vms: Pair, with_iommufd: bool) -> tuple[set[int], set[int]]:
    """Copy a running guest's memory, round by round, as a migration does.

    :return: the pages that differ in the end, and those that the device wrote
    """
    assert vms.source.pid is not None
    block = find_block(vms.source.pid, "ram0", SIZE, "/dev/shm")
    fd = open_file(vms.source.pid, block)
    device = StandIn(block, fd)
    uffd = UffdAsync(vms.source.pid, [block])
    iommufd = device.source(block)
    try:
        uffd.start()
        iommufd.start()
        copy = bytearray(device.ram)

        def collect() -> Merged:
            marked = iommufd.collect()
            reports = {"uffd": uffd.collect()}
            if with_iommufd:
                reports["iommufd"] = marked
            merged = merge([block], reports)
            for start, length in zip(*merged.dirty[block.name].runs(), strict=True):
                piece = slice(int(start) * PAGE, int(start + length) * PAGE)
                copy[piece] = device.ram[piece]
            return merged

        for _ in range(ROUNDS):
            pages = device.write()
            merged = collect()
            if with_iommufd:  # what the device wrote is sent, and nothing else because of it
                assert merged.pages_by_source["iommufd"] == len(pages)
        device.write()
        qmp = await Qmp.connect("source", vms.source.qmp, timeout_s=60.0)
        await qmp.execute("stop")
        await qmp.close()
        merged = collect()
        assert merged.pages_by_source["uffd"] > 0, "the guest wrote nothing"
        now = memoryview(device.ram)
        differing = {
            page
            for page in range(NPAGES)
            if copy[page * PAGE : (page + 1) * PAGE] != now[page * PAGE : (page + 1) * PAGE]
        }
        now.release()
        return differing, device.written
    finally:
        uffd.stop()
        iommufd.stop()
        device.close()
        os.close(fd)


@pytest.mark.parametrize("with_iommufd", [True, False])
def test_the_union_has_every_page(
    inner_qemu: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, with_iommufd: bool
) -> None:
    """All of it with the IOMMU's dirty bits; without them, what the device wrote is missing."""
    monkeypatch.setattr(inject, "_GRACE_S", 300.0)  # starting the injector takes seconds here

    async def run() -> tuple[set[int], set[int]]:
        machine = Machine(
            memory=SIZE, workload=Workload(working_set_bytes=8 * MIB), qemu=inner_qemu
        )
        async with pair(machine, start=False) as vms:
            arguments = machine.arguments(vms.image, vms.source.console)
            await vms.source.start(arguments, incoming=False)
            await vms.beats(vms.source, 3, timeout_s=300.0)
            return await copied(vms, with_iommufd)

    differing, written = asyncio.run(run())
    if with_iommufd:
        assert differing == set()
    else:
        assert differing
        assert differing <= written
