"""A process that owns a device and the memory it writes, as a QEMU does; it does what it is told.

``python -m tests.lab.inside.owner RAM SIZE GROUP DEVICE`` maps the file shared, opens the device
through a container of type 1, and answers ``ready ADDRESS``. Then each line of standard input is a
command, answered with ``done``, or with the errno of the call that failed. Numbers are decimal.
Its imports are few: it has to start fast.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable

# include/uapi/linux/vfio.h: _IO(';', 100 + n)
_SET_CONTAINER, _SET_IOMMU, _GET_DEVICE_FD = 0x3B68, 0x3B66, 0x3B6A
_GET_REGION_INFO, _MAP_DMA, _UNMAP_DMA = 0x3B6C, 0x3B71, 0x3B72
_TYPE1V2 = 3
_BAR0, _CONFIG = 0, 7
_COMMAND, _MEMORY_AND_MASTER = 4, 2 | 4  # PCI configuration space

# docs/specs/edu.rst in QEMU
_DMA_SOURCE, _DMA_DESTINATION, _DMA_COUNT, _DMA_COMMAND = 0x80, 0x88, 0x90, 0x98
_EDU_BUFFER = 0x40000
_RUN, _TO_RAM = 1, 2
_DEADLINE_S = 120.0


class Owner:
    """The memory, the container and the device."""

    def __init__(self, ram: str, size: int, group: str, device: str) -> None:
        fd = os.open(ram, os.O_RDWR | os.O_CLOEXEC)
        self._ram = mmap.mmap(fd, size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._ram))
        self._container = os.open("/dev/vfio/vfio", os.O_RDWR | os.O_CLOEXEC)
        self._group = os.open(group, os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(self._group, _SET_CONTAINER, struct.pack("i", self._container))
        fcntl.ioctl(self._container, _SET_IOMMU, _TYPE1V2)
        self._device = fcntl.ioctl(self._group, _GET_DEVICE_FD, bytearray(device.encode() + b"\0"))
        command = self._region(_CONFIG) + _COMMAND
        (value,) = struct.unpack("H", os.pread(self._device, 2, command))
        os.pwrite(self._device, struct.pack("H", value | _MEMORY_AND_MASTER), command)
        self._registers = self._region(_BAR0)

    def _region(self, index: int) -> int:
        # struct vfio_region_info: argsz, flags, index, cap_offset, size, offset
        info = fcntl.ioctl(
            self._device, _GET_REGION_INFO, struct.pack("IIIIQQ", 32, 0, index, 0, 0, 0)
        )
        return int(struct.unpack("IIIIQQ", info)[5])

    def map(self, iova: int, size: int, offset: int) -> None:
        """Map a piece of the memory for the device, for reading and writing."""
        fields = (32, 3, self.address + offset, iova, size)
        fcntl.ioctl(self._container, _MAP_DMA, struct.pack("IIQQQ", *fields))

    def unmap(self, iova: int, size: int) -> None:
        """Take it back."""
        fcntl.ioctl(self._container, _UNMAP_DMA, struct.pack("IIQQ", 24, 0, iova, size))

    def device_writes(self, iova: int, size: int) -> None:
        """Let the device write what is in its buffer."""
        self._dma(_EDU_BUFFER, iova, size, _TO_RAM)

    def device_reads(self, iova: int, size: int) -> None:
        """Let the device read into its buffer."""
        self._dma(iova, _EDU_BUFFER, size, 0)

    def _dma(self, source: int, destination: int, size: int, direction: int) -> None:
        for register, value in (
            (_DMA_SOURCE, source),
            (_DMA_DESTINATION, destination),
            (_DMA_COUNT, size),
            (_DMA_COMMAND, _RUN | direction),
        ):
            os.pwrite(self._device, struct.pack("I", value), self._registers + register)
        deadline = time.monotonic() + _DEADLINE_S
        while self._read(_DMA_COMMAND) & _RUN:
            if time.monotonic() > deadline:
                raise TimeoutError("the device does not end its DMA")
            time.sleep(0.01)

    def _read(self, register: int) -> int:
        value = os.pread(self._device, 4, self._registers + register)
        return int(struct.unpack("I", value)[0])

    def cpu_writes(self, offset: int, value: int) -> None:
        """Write one byte through the mapping."""
        self._ram[offset] = value

    def duplicate(self) -> None:
        """Hold the container and the device twice, as is seen in QEMUs."""
        os.dup(self._container)
        os.dup(self._device)


def main(ram: str, size: str, group: str, device: str) -> None:
    """Introduce ourselves, then serve standard input until it ends."""
    owner = Owner(ram, int(size), group, device)
    commands: dict[str, Callable[..., None]] = {
        "map": owner.map,
        "unmap": owner.unmap,
        "device-writes": owner.device_writes,
        "device-reads": owner.device_reads,
        "cpu-writes": owner.cpu_writes,
        "duplicate": owner.duplicate,
    }
    print(f"ready {owner.address}", flush=True)
    for line in sys.stdin:
        name, *numbers = line.split()
        try:
            commands[name](*map(int, numbers))
        except OSError as error:
            print(error.errno or -1, flush=True)
        else:
            print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
