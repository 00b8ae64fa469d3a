"""Which sources are chosen for a running QEMU with a device, and that they cover its RAM."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from migrator.qemu.qmp import Qmp
from tests.lab.inside.devices import Device
from tests.live.vms import MIB, Machine, pair
from tests.tracker import naive
from tracker.devices.descriptors import Kind, copy_descriptors, vfio_descriptors
from tracker.devices.devicelog import DeviceLog, can_log, start_logging
from tracker.devices.dma import dma_sources
from tracker.devices.vfio import VfioType1
from tracker.errors import SourceError
from tracker.memory.ram import GuestRange, RamBlock, find_block, parse_flat_view

SIZE = 64 * MIB
BEAT_S = 300.0
UNSAFE_INTERRUPTS = Path("/sys/module/iommufd/parameters/allow_unsafe_interrupts")


def check(qemu: Sequence[str], extra: Sequence[str], found: Sequence[Kind]) -> set[int]:
    """Start a QEMU and read what its devices wrote.

    :return: the pages of its RAM that are reported, all of the time
    """

    async def run() -> set[int]:
        machine = Machine(memory=SIZE, qemu=qemu, source_extra=extra)
        async with pair(machine, start=False) as vms:
            arguments = machine.arguments(vms.image, vms.source.console)
            await vms.source.start(arguments, incoming=False)
            await vms.beats(vms.source, 3, timeout_s=BEAT_S)
            qmp = await Qmp.connect("source", vms.source.qmp, timeout_s=60.0)
            view = parse_flat_view(await qmp.human("info mtree -f"))
            await qmp.close()
            pid = vms.source.pid
            assert pid is not None
            kinds = [one.kind for one in vfio_descriptors(pid)]
            assert sorted(kinds, key=lambda kind: kind.name) == list(found)
            return reported(pid, find_block(pid, "ram0", SIZE, "/dev/shm"), view)

    return asyncio.run(run())


def reported(pid: int, block: RamBlock, view: list[GuestRange]) -> set[int]:
    with ExitStack() as stack:
        sources = dma_sources(pid, [block], view)
        for source in sources:
            stack.callback(source.stop)
        assert [source.name for source in sources] == ["vfio"]
        (type1,) = sources
        assert isinstance(type1, VfioType1)
        type1.start()
        assert not type1.exact
        return naive.pages_of(type1.collect()["ram0"].words)


def test_a_legacy_container(edu: Device, inner_qemu: tuple[str, ...]) -> None:
    """All of RAM is reached but what lies under the PC's video memory and ROM."""
    extra = ["-device", f"vfio-pci,host={edu.name}"]
    pages = check(inner_qemu, extra, [Kind.CONTAINER, Kind.LEGACY_DEVICE])
    everything = set(range(SIZE // 4096))
    assert pages <= everything
    assert pages >= everything - set(range(0xA0, 0x100))


def test_an_iommu_without_dirty_bits_is_refused(edu: Device, inner_qemu: tuple[str, ...]) -> None:
    """As QEMU's emulated one is; the device does not log either."""
    extra = [
        *["-object", "iommufd,id=iommufd0"],
        *["-device", f"vfio-pci,host={edu.name},iommufd=iommufd0"],
    ]
    # like type 1's parameter on the VM's command line: the emulated IOMMU remaps no interrupts
    UNSAFE_INTERRUPTS.write_text("1")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(SourceError, match="start QEMU without iommufd="):
        check(inner_qemu, extra, [Kind.DEVICE, Kind.IOMMUFD])
    assert os.listdir("/proc/self/fd") == before


def test_a_device_that_logs(make_mtty: Callable[[], Device], inner_qemu: tuple[str, ...]) -> None:
    """The sample driver has a log (samples/vfio-mdev/mtty.c), in which nothing is ever found.

    The kernel takes 256 ranges at most, whatever the driver (LOG_MAX_RANGES in
    drivers/vfio/vfio_main.c).
    """
    extra = ["-device", f"vfio-pci,sysfsdev={make_mtty().sysfs}"]
    pieces = [GuestRange(i * 16384, 8192, "ram0", i * 16384) for i in range(300)]

    def log_of(pid: int, block: RamBlock) -> None:
        (found,) = [one for one in vfio_descriptors(pid) if one.kind is Kind.LEGACY_DEVICE]
        (device,) = copy_descriptors(pid, [found])
        try:
            assert can_log(device)
            with pytest.raises(OSError, match="VFIO_DEVICE_FEATURE") as caught:
                start_logging(device, [(one.gpa, one.size) for one in pieces])
            assert caught.value.errno == errno.E2BIG
        finally:
            os.close(device)
        for seen in ([GuestRange(0, SIZE, "ram0", 0)], pieces):
            (source,) = dma_sources(pid, [block], seen)
            try:
                assert isinstance(source, DeviceLog)
                source.start()
                assert source.exact
                assert not source.collect()["ram0"].any()
                assert source.exact
            finally:
                source.stop()

    async def run() -> None:
        machine = Machine(memory=SIZE, qemu=inner_qemu, source_extra=extra)
        async with pair(machine, start=False) as vms:
            arguments = machine.arguments(vms.image, vms.source.console)
            await vms.source.start(arguments, incoming=False)
            await vms.beats(vms.source, 3, timeout_s=BEAT_S)
            assert vms.source.pid is not None
            log_of(vms.source.pid, find_block(vms.source.pid, "ram0", SIZE, "/dev/shm"))

    asyncio.run(run())
