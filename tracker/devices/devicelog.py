"""What devices themselves log of their DMA writes: VFIO_DEVICE_FEATURE_DMA_LOGGING_* (in v6.1).

mlx5, pds, qat and others can; the IOMMU need not. A device that fails to report has lost its log
(``include/uapi/linux/vfio.h``: "consider all memory dirty"): from then on all that it can reach is
reported, always, and :attr:`DeviceLog.exact` is ``False``.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise

from tracker.abi import vfio
from tracker.bits.pageset import PageSet
from tracker.devices.iova import PAGE_SIZE, Reach, Words, bitmap_memory, iova_ranges, spans
from tracker.errors import RamError, SourceError
from tracker.memory.ram import GuestRange, RamBlock
from tracker.syscalls import ioctl

_log = logging.getLogger(__name__)

Span = tuple[int, int]  # IOVA and size in bytes


def _feature(device: int, flags: int, data: ctypes.Structure | None = None) -> None:
    size = ctypes.sizeof(vfio.vfio_device_feature)
    buffer = bytearray(size) + (bytearray(data) if data is not None else b"")
    head = vfio.vfio_device_feature.from_buffer(buffer)
    head.argsz, head.flags = len(buffer), flags
    ioctl(f"VFIO_DEVICE_FEATURE({flags:#x})", device, vfio.VFIO_DEVICE_FEATURE, buffer)


def can_log(device: int) -> bool:
    """VFIO_DEVICE_FEATURE_PROBE: whether a device can log its DMA writes, and report them.

    :raise OSError: it is no device
    """
    try:
        _feature(
            device,
            vfio.VFIO_DEVICE_FEATURE_PROBE
            | vfio.VFIO_DEVICE_FEATURE_SET
            | vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
        )
        _feature(
            device,
            vfio.VFIO_DEVICE_FEATURE_PROBE
            | vfio.VFIO_DEVICE_FEATURE_GET
            | vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
        )
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        return False
    return True


def start_logging(device: int, ranges: Sequence[Span]) -> None:
    """DMA_LOGGING_START: log writes to these ranges from now on.

    :param ranges: IOVA and size in bytes, multiples of 4096, without overlap
    :raise OSError: E2BIG or what the driver makes of more ranges than it can take
    """
    array = (vfio.vfio_device_feature_dma_logging_range * len(ranges))()
    for i, (iova, size) in enumerate(ranges):
        array[i].iova, array[i].length = iova, size
    control = vfio.vfio_device_feature_dma_logging_control(
        page_size=PAGE_SIZE, num_ranges=len(ranges), ranges=ctypes.addressof(array)
    )
    flags = vfio.VFIO_DEVICE_FEATURE_SET | vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_START
    _feature(device, flags, control)


def stop_logging(device: int) -> None:
    """DMA_LOGGING_STOP.

    :raise OSError: the device does not log, or is gone
    """
    _feature(device, vfio.VFIO_DEVICE_FEATURE_SET | vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP)


def report(device: int, iova: int, size: int) -> Words:
    """DMA_LOGGING_REPORT: read the dirty bits of a range, and clear them.

    :param iova: and ``size``, in bytes, multiples of 4096, inside one range that is logged
    :return: bit i is the 4096 bytes at ``iova + i * 4096``; some words more than are needed
    :raise OSError: the log is lost
    """
    bits = bitmap_memory(size // PAGE_SIZE)
    argument = vfio.vfio_device_feature_dma_logging_report(
        iova=iova, length=size, page_size=PAGE_SIZE, bitmap=bits.ctypes.data
    )
    flags = vfio.VFIO_DEVICE_FEATURE_GET | vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT
    _feature(device, flags, argument)
    return bits


def merged(ranges: Sequence[Span], most: int) -> list[Span]:
    """Join ranges over the narrowest gaps between them until there are no more than ``most``.

    :param ranges: IOVA and size in bytes, in order, without overlap
    """
    gaps = [after[0] - sum(before) for before, after in pairwise(ranges)]
    widest = sorted(sorted(range(len(gaps)), key=lambda i: -gaps[i])[: most - 1])
    starts = [0, *(i + 1 for i in widest)]
    ends = [*widest, len(ranges) - 1]
    return [
        (ranges[first][0], sum(ranges[last]) - ranges[first][0])
        for first, last in zip(starts, ends, strict=True)
    ]


class DeviceLog:
    """DMA writes of devices that log them.

    :ivar exact: whether what is reported was written: ``False`` once a device has lost its log
    """

    def __init__(
        self,
        devices: Mapping[str, int],
        blocks: Sequence[RamBlock],
        guest_ranges: Sequence[GuestRange],
        name: str = "device-log",
    ) -> None:
        """Take over descriptors of the devices, which :meth:`stop` closes.

        :param devices: one descriptor for each device, by a name for people
        """
        self.name = name
        self._devices = dict(devices)
        self._blocks = tuple(blocks)
        self._guest_ranges = tuple(guest_ranges)
        self._logging: list[str] = []
        self._lost: set[str] = set()

    @property
    def exact(self) -> bool:
        """Whether every device still has its log."""
        return not self._lost

    def start(self) -> None:
        """Have every device log.

        :raise SourceError: a device cannot, or somebody else has it log already
        """
        try:
            ranges = iova_ranges(self._blocks, self._guest_ranges)
            self._reach = Reach(self._blocks, ranges)
            for device in self._devices:
                self._start(device, spans(ranges))
        except RamError as error:
            self.stop()
            raise SourceError(self.name, str(error)) from error
        except BaseException:
            self.stop()
            raise

    def _start(self, device: str, ranges: Sequence[Span]) -> None:
        # How many ranges a device takes is told by nobody. Fewer and wider ones also log what is
        # not RAM, which nobody asks about then.
        most = len(ranges)
        while True:
            try:
                start_logging(self._devices[device], merged(ranges, most))
            except OSError as error:
                if most > 1 and error.errno not in (errno.ENOTTY, errno.EBADF, errno.ENODEV):
                    most = (most + 1) // 2
                    continue
                raise SourceError(self.name, f"{device}: {error}") from error
            self._logging.append(device)
            return

    def collect(self) -> PageSet:
        """Pages that a device wrote since the last call; all that it reaches if it cannot tell.

        :raise SourceError: it was not started
        """
        if not self._logging:
            raise SourceError(self.name, "was not started")
        dirty = self._reach.nothing()
        for device in self._logging:
            if device not in self._lost:
                self._read(device, dirty)
        return self._reach.everything() if self._lost else dirty

    def _read(self, device: str, dirty: PageSet) -> None:
        for one in self._reach.ranges:
            try:
                bits = report(self._devices[device], one.iova, one.size)
            except OSError as error:
                _log.warning(
                    "%s: %s lost its log, all counts as dirty: %s", self.name, device, error
                )
                self._lost.add(device)
                return
            self._reach.add(dirty, bits, one.iova, one.size // PAGE_SIZE, PAGE_SIZE)

    def stop(self) -> None:
        """End the logging and close the descriptors. May be called again."""
        while self._logging:
            device = self._logging.pop()
            try:
                stop_logging(self._devices[device])
            except OSError as error:
                _log.warning("%s: %s: %s", self.name, device, error)
        while self._devices:
            os.close(self._devices.popitem()[1])
