"""Who knows what the devices of a running QEMU wrote: sources such that no device is left out.

In order of preference: the device's own log, an IOMMU with dirty bits, and the legacy container
that calls everything dirty (:attr:`tracker.devices.vfio.VfioType1.exact` says when).
"""

from __future__ import annotations

from collections.abc import Sequence

from tracker.devices.descriptors import (
    Descriptor,
    Kind,
    close_all,
    copy_descriptors,
    vfio_descriptors,
)
from tracker.devices.devicelog import DeviceLog, can_log
from tracker.devices.ioas import devices as iommu_devices
from tracker.devices.iommufd import Iommufd
from tracker.devices.vfio import VfioType1
from tracker.errors import SourceError
from tracker.memory.ram import GuestRange, RamBlock
from tracker.sources.source import DirtySource

Copies = dict[Descriptor, int]


def dma_sources(
    pid: int, blocks: Sequence[RamBlock], guest_ranges: Sequence[GuestRange]
) -> list[DirtySource]:
    """Choose sources for all VFIO devices of a process, without starting any.

    They have copies of its descriptors, which their ``stop()`` closes: call it for every one of
    them, whether it was started or not.

    :param guest_ranges: where the guest sees the blocks
        (:func:`tracker.memory.ram.parse_flat_view`); there may be no IOMMU in the guest
    :return: one or more, or none if the process has no VFIO device
    :raise SourceError: nothing covers a device: which, and what to do
    """
    try:
        found = vfio_descriptors(pid)
        copies = dict(zip(found, copy_descriptors(pid, found), strict=True))
    except OSError as error:
        raise SourceError("vfio", f"the descriptors of process {pid}: {error}") from error
    sources: list[DirtySource] = []
    try:
        sources += _of_containers(copies, blocks, guest_ranges)
        sources += _of_iommufds(copies, blocks, guest_ranges)
    except BaseException as error:
        for source in sources:
            source.stop()
        if isinstance(error, OSError):
            raise SourceError("vfio", str(error)) from error
        raise
    finally:
        close_all(list(copies.values()))  # those that a source has are no longer among them
    return sources


def _of_containers(
    copies: Copies, blocks: Sequence[RamBlock], guest_ranges: Sequence[GuestRange]
) -> list[DirtySource]:
    devices = _of_kind(copies, Kind.LEGACY_DEVICE)
    containers = _of_kind(copies, Kind.CONTAINER)
    if not devices:
        return []
    if all(can_log(copies[device]) for device in devices):
        log = {device.label: copies.pop(device) for device in devices}
        return [DeviceLog(log, blocks, guest_ranges)]
    if not containers:
        raise SourceError(
            "vfio",
            f"{devices[0].label} is in no container, and does not log its writes: "
            "start QEMU without iommufd= for it, where /dev/vfio/vfio is the legacy container",
        )
    return [
        VfioType1(copies.pop(container), blocks, guest_ranges, _numbered("vfio", number))
        for number, container in enumerate(containers)
    ]


def _of_iommufds(
    copies: Copies, blocks: Sequence[RamBlock], guest_ranges: Sequence[GuestRange]
) -> list[DirtySource]:
    devices = _of_kind(copies, Kind.DEVICE)
    iommufds = _of_kind(copies, Kind.IOMMUFD)
    if not devices:
        return []
    if all(can_log(copies[device]) for device in devices):
        log = {device.label: copies.pop(device) for device in devices}
        return [DeviceLog(log, blocks, guest_ranges, "device-log-iommufd")]
    tracks = [tracks for iommufd in iommufds for tracks in iommu_devices(copies[iommufd]).values()]
    if len(tracks) < len(devices) or not all(tracks):
        names = ", ".join(device.label for device in devices)
        raise SourceError(
            "iommufd",
            f"of {names}, {sum(tracks)} are behind an IOMMU with dirty bits, and not all log their "
            "writes: start QEMU without iommufd=, so that the legacy container is used",
        )
    return [
        Iommufd(copies.pop(iommufd), blocks, guest_ranges, _numbered("iommufd", number))
        for number, iommufd in enumerate(iommufds)
        if iommu_devices(copies[iommufd])
    ]


def _of_kind(copies: Copies, kind: Kind) -> list[Descriptor]:
    return [one for one in copies if one.kind is kind]


def _numbered(name: str, number: int) -> str:
    return name if number == 0 else f"{name}-{number + 1}"
