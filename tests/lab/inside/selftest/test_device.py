"""iommufd's self-test device is there: a made-up device behind a made-up IOMMU."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from tracker.abi.ioctl import io


def test_nothing_is_behind_a_real_iommu() -> None:
    assert list(Path("/sys/class/iommu").glob("dmar*")) == []


def test_iommufd_self_test_device() -> None:
    """drivers/iommu/iommufd/iommufd_test.h: a device, attached to an IOAS."""
    fd = os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC)
    try:
        # struct iommu_ioas_alloc: size, flags, out_ioas_id
        allocated = fcntl.ioctl(fd, io(ord(";"), 0x81), struct.pack("III", 12, 0, 0))
        ioas_id = struct.unpack("III", allocated)[2]
        assert ioas_id
        # struct iommu_test_cmd: size, op, id, reserved; a union of 48 bytes; last
        mock_domain = struct.pack("IIII48xII", 72, 2, ioas_id, 0, 0, 0)
        answer = struct.unpack("IIIIIII36xII", fcntl.ioctl(fd, io(ord(";"), 0xA0), mock_domain))
        stdev_id, hwpt_id, device_id = answer[4:7]
        assert len({ioas_id, stdev_id, hwpt_id, device_id, 0}) == 5
    finally:
        os.close(fd)
