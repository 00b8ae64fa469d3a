"""The lab VM has what its tests are about, and really so: each is used, once."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from tests.lab.inside.devices import Device, bound_to_vfio, find_edu
from tests.live.vms import MIB, Machine, pair
from tracker.abi.ioctl import io
from tracker.bits.words import popcount
from tracker.probe.probe import PROBES, free_huge_pages, try_everything

PAGE = mmap.PAGESIZE
HUGE_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
LIMIT_S = 300.0  # for starting Python in the VM of a busy machine


def test_the_hosts_files_cannot_be_written() -> None:
    for directory in (Path(__file__).parent, Path("/usr"), Path.home()):
        with pytest.raises(OSError, match="Read-only") as caught:
            (directory / "written-by-the-lab").touch()
        assert caught.value.errno == errno.EROFS


def test_soft_dirty() -> None:
    """Documentation/admin-guide/mm/soft-dirty.rst: bit 55 of pagemap, cleared by clear_refs."""
    with mmap.mmap(-1, 3 * PAGE) as memory:
        memory[:] = bytes(3 * PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

        def soft_dirty() -> list[bool]:
            with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
                entries = os.pread(pagemap.fileno(), 3 * 8, address // PAGE * 8)
            return [bool(entry >> 55 & 1) for entry in struct.unpack("3Q", entries)]

        assert soft_dirty() == [True, True, True]
        Path("/proc/self/clear_refs").write_text("4")
        assert soft_dirty() == [False, False, False]
        memory[PAGE] = 1
        assert soft_dirty() == [False, True, False]


def test_compiled_kernels_are_found() -> None:
    """They were compiled outside, as :func:`tests.lab.boot.warm_up` does it."""
    assert popcount(np.array([3], np.uint64)) == 2
    stats = cast(Any, popcount).stats
    assert (sum(stats.cache_hits.values()), sum(stats.cache_misses.values())) == (1, 0)


def test_tracking() -> None:
    outcomes = try_everything(limit_s=LIMIT_S)
    assert len(outcomes) == len(PROBES)
    assert {outcome.probe: outcome.seen for outcome in outcomes if not outcome.right} == {}


def test_tracking_of_huge_pages() -> None:
    HUGE_POOL.write_text("8")
    try:
        assert free_huge_pages()[2 * MIB] == 8
        outcomes = try_everything(2 * MIB, limit_s=LIMIT_S)
    finally:
        HUGE_POOL.write_text("0")
    assert len(outcomes) == len(PROBES)
    assert {outcome.probe: outcome.seen for outcome in outcomes if not outcome.right} == {}


def test_edu_belongs_to_vfio(edu: Device) -> None:
    """include/uapi/linux/vfio.h: struct vfio_group_status; viable: every device is VFIO's."""
    with edu.group.open("r+b", buffering=0) as group:
        status = fcntl.ioctl(group, io(ord(";"), 103), struct.pack("II", 8, 0))
    assert struct.unpack("II", status) == (8, 1)
    assert edu.cdev.is_char_device()


def test_edu_is_given_back() -> None:
    with bound_to_vfio(find_edu()) as edu:
        group = edu.group
        assert group.is_char_device()
    assert not (find_edu() / "driver").exists()
    assert not group.exists()


def test_every_pci_device_has_an_iommu_group() -> None:
    devices = list(Path("/sys/bus/pci/devices").iterdir())
    assert find_edu() in devices
    assert [d.name for d in devices if not (d / "iommu_group").exists()] == []


def test_mtty_mdevs(make_mtty: Callable[[], Device]) -> None:
    first, second = make_mtty(), make_mtty()
    assert first.group != second.group
    for mdev in (first, second):
        assert mdev.group.is_char_device()
        assert mdev.cdev.is_char_device()


def test_io_uring() -> None:
    """include/uapi/linux/io_uring.h: struct io_uring_params; 425 is io_uring_setup."""
    parameters = (ctypes.c_uint32 * 30)()
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(425, 8, ctypes.byref(parameters))
    assert fd >= 0, os.strerror(ctypes.get_errno())
    os.close(fd)
    assert list(parameters[:2]) == [8, 16]


def test_a_guest_runs_in_the_lab(inner_qemu: tuple[str, ...]) -> None:
    async def beat() -> str:
        async with pair(Machine(memory=64 * MIB, qemu=inner_qemu), start=False) as vms:
            await vms.start_source()
            return await vms.state(vms.source)

    assert asyncio.run(beat()) == "running"
