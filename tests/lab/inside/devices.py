"""The lab VM's devices: ``edu`` bound to vfio-pci, and mdevs of the ``mtty`` sample driver."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

EDU_ID = ("0x1234", "0x11e8")
"""Vendor and device of QEMU's edu (docs/specs/edu.rst there)."""

_PCI = Path("/sys/bus/pci")
_MTTY = Path("/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-1")


@dataclass(frozen=True)
class Device:
    """A device that can be passed through.

    :ivar name: PCI address, such as ``0000:00:05.0``, or the UUID of an mdev; what
        VFIO_GROUP_GET_DEVICE_FD takes
    :ivar sysfs: its directory; what ``-device vfio-pci,sysfsdev=`` takes
    """

    name: str
    sysfs: Path

    @property
    def group(self) -> Path:
        """Its VFIO group, in ``/dev/vfio``."""
        return Path("/dev/vfio") / (self.sysfs / "iommu_group").resolve().name

    @property
    def cdev(self) -> Path:
        """Its character device for iommufd, in ``/dev/vfio/devices``."""
        (name,) = (entry.name for entry in (self.sysfs / "vfio-dev").iterdir())
        return Path("/dev/vfio/devices") / name


def find_edu() -> Path:
    """The directory of the edu device in sysfs.

    :raise LookupError: there is none, or more than one
    """
    found = [
        device
        for device in (_PCI / "devices").iterdir()
        if tuple((device / kind).read_text().strip() for kind in ("vendor", "device")) == EDU_ID
    ]
    if len(found) != 1:
        raise LookupError(f"{len(found)} edu devices")
    return found[0]


@contextmanager
def bound_to_vfio(sysfs: Path) -> Iterator[Device]:
    """Let vfio-pci have a PCI device, and nobody after that.

    :raise OSError: sysfs refuses
    :raise LookupError: vfio-pci did not take it
    """
    (sysfs / "driver_override").write_text("vfio-pci")
    try:
        (_PCI / "drivers_probe").write_text(sysfs.name)
        if not (sysfs / "driver").exists():
            raise LookupError(f"vfio-pci did not take {sysfs.name}")
        yield Device(sysfs.name, sysfs)
    finally:
        with contextlib.suppress(FileNotFoundError):  # it is not bound
            (sysfs / "driver" / "unbind").write_text(sysfs.name)
        (sysfs / "driver_override").write_text("\n")


@contextmanager
def mtty() -> Iterator[Device]:
    """Make a serial port of the mtty sample driver (samples/vfio-mdev/mtty.c), which can migrate.

    :raise OSError: sysfs refuses
    """
    name = str(uuid.uuid4())
    (_MTTY / "create").write_text(name)
    sysfs = Path("/sys/bus/mdev/devices") / name
    try:
        yield Device(name, sysfs)
    finally:
        (sysfs / "remove").write_text("1")
