"""iommufd's self-test device: an IOMMU in software, whose dirty bits are set by hand.

Linux: drivers/iommu/iommufd/selftest.c and iommufd_test.h, with CONFIG_IOMMUFD_TEST.
"""

from __future__ import annotations

import ctypes
import os

import numpy as np
from numpy.typing import NDArray

from tracker.abi import iommufd
from tracker.abi.ioctl import io
from tracker.syscalls import ioctl

APERTURE_START = 1 << 24
APERTURE_END = 1 << 31
IO_PAGE = 2048
HUGE_IO_PAGE = 512 * IO_PAGE

HUGE_IOVA = 1 << 1
NO_DIRTY = 1 << 0

_MOCK_DOMAIN_REPLACE, _MOCK_DOMAIN_FLAGS, _DIRTY = 10, 12, 13
_HWPT_ALLOC_DIRTY_TRACKING = 1 << 1


class _mock_domain_flags(ctypes.Structure):
    _fields_ = (
        ("out_stdev_id", ctypes.c_uint32),
        ("out_hwpt_id", ctypes.c_uint32),
        ("out_idev_id", ctypes.c_uint32),
        ("dev_flags", ctypes.c_uint32),
    )


class _dirty(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint32),
        ("iova", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("page_size", ctypes.c_uint64),
        ("uptr", ctypes.c_uint64),
        ("out_nr_dirty", ctypes.c_uint64),
    )


class _operation(ctypes.Union):
    _fields_ = (
        ("mock_domain_flags", _mock_domain_flags),
        ("replace_pt_id", ctypes.c_uint32),
        ("dirty", _dirty),
    )


class _iommu_test_cmd(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("op", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("__reserved", ctypes.c_uint32),
        ("u", _operation),
        ("last", ctypes.c_uint32),
    )


class _iommu_ioas_map(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("ioas_id", ctypes.c_uint32),
        ("__reserved", ctypes.c_uint32),
        ("user_va", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("iova", ctypes.c_uint64),
    )


class _iommu_ioas_unmap(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("ioas_id", ctypes.c_uint32),
        ("iova", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
    )


class _iommu_hwpt_alloc(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("dev_id", ctypes.c_uint32),
        ("pt_id", ctypes.c_uint32),
        ("out_hwpt_id", ctypes.c_uint32),
        ("__reserved", ctypes.c_uint32),
        ("data_type", ctypes.c_uint32),
        ("data_len", ctypes.c_uint32),
        ("data_uptr", ctypes.c_uint64),
    )


class MockIommu:
    """An iommufd with an IO address space and devices of the self-test kind.

    :ivar fd: the iommufd
    :ivar ioas: number of the address space
    """

    def __init__(self) -> None:
        self.fd = os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC)
        self.ioas = self.make_ioas()

    def close(self) -> None:
        """Which ends everything that nobody else holds."""
        os.close(self.fd)

    def make_ioas(self) -> int:
        """Make one more address space."""
        argument = iommufd.iommu_ioas_alloc(size=12)
        ioctl("IOMMU_IOAS_ALLOC", self.fd, iommufd.IOMMU_IOAS_ALLOC, argument)
        return int(argument.out_ioas_id)

    def attach(self, *, dirty_bits: bool = True, flags: int = 0, ioas: int | None = None) -> int:
        """Attach one more device.

        :return: the number of its page table
        """
        ioas = ioas or self.ioas
        command = self._command(_MOCK_DOMAIN_FLAGS, ioas)
        command.u.mock_domain_flags.dev_flags = flags
        self._test(command)
        made = command.u.mock_domain_flags
        stdev, hwpt, device = made.out_stdev_id, made.out_hwpt_id, made.out_idev_id
        if not dirty_bits:
            return int(hwpt)
        table = _iommu_hwpt_alloc(
            size=ctypes.sizeof(_iommu_hwpt_alloc),
            flags=_HWPT_ALLOC_DIRTY_TRACKING,
            dev_id=device,
            pt_id=ioas,
        )
        ioctl("IOMMU_HWPT_ALLOC", self.fd, io(iommufd.IOMMUFD_TYPE, 0x89), table)
        # the page table that the device got at first goes away with its only user
        command = self._command(_MOCK_DOMAIN_REPLACE, stdev)
        command.u.replace_pt_id = table.out_hwpt_id
        self._test(command)
        return int(table.out_hwpt_id)

    def map(self, address: int, length: int, iova: int, ioas: int | None = None) -> None:
        """IOMMU_IOAS_MAP memory of this process."""
        argument = _iommu_ioas_map(
            size=ctypes.sizeof(_iommu_ioas_map),
            flags=iommufd.IOMMU_IOAS_MAP_FIXED_IOVA
            | iommufd.IOMMU_IOAS_MAP_READABLE
            | iommufd.IOMMU_IOAS_MAP_WRITEABLE,
            ioas_id=ioas or self.ioas,
            user_va=address,
            length=length,
            iova=iova,
        )
        ioctl("IOMMU_IOAS_MAP", self.fd, io(iommufd.IOMMUFD_TYPE, 0x85), argument)

    def unmap(self, iova: int, length: int) -> None:
        """IOMMU_IOAS_UNMAP."""
        argument = _iommu_ioas_unmap(
            size=ctypes.sizeof(_iommu_ioas_unmap), ioas_id=self.ioas, iova=iova, length=length
        )
        ioctl("IOMMU_IOAS_UNMAP", self.fd, io(iommufd.IOMMUFD_TYPE, 0x86), argument)

    def write(self, hwpt: int, iova: int, length: int, words: NDArray[np.uint64]) -> int:
        """IOMMU_TEST_OP_DIRTY: mark what a device would have written, one bit an IO page.

        :return: how many of them are mapped, and dirty now
        """
        command = self._command(_DIRTY, hwpt)
        command.u.dirty.iova, command.u.dirty.length = iova, length
        command.u.dirty.page_size, command.u.dirty.uptr = IO_PAGE, words.ctypes.data
        self._test(command)
        return int(command.u.dirty.out_nr_dirty)

    def write_pages(self, hwpt: int, iova: int, pages: set[int]) -> None:
        """Mark pages of 4096 bytes from ``iova`` on, by one IO page of each."""
        words = np.zeros(2 * (max(pages) + 1) // 64 + 1, np.uint64)
        for page in pages:
            words[2 * page // 64] |= np.uint64(1 << 2 * page % 64)
        assert self.write(hwpt, iova, (max(pages) + 1) * 2 * IO_PAGE, words) == len(pages)

    def _command(self, operation: int, number: int) -> _iommu_test_cmd:
        return _iommu_test_cmd(size=ctypes.sizeof(_iommu_test_cmd), op=operation, id=number)

    def _test(self, command: _iommu_test_cmd) -> None:
        ioctl("IOMMU_TEST_CMD", self.fd, io(iommufd.IOMMUFD_TYPE, 0xA0), command)
