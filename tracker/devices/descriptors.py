"""The descriptors through which a QEMU has devices: found in ``/proc``, copied with pidfd_getfd(2).

A copy is the same open file: what is turned on through it is on for QEMU too, and as long as a copy
is open, devices stay bound and memory stays pinned, even when QEMU has ended.
"""

from __future__ import annotations

import enum
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tracker.syscalls import pidfd_getfd, same_file

_LEGACY_DEVICE = "anon_inode:[vfio-device]"
_MISC_MAJOR = 10  # include/uapi/linux/major.h


class Kind(enum.Enum):
    """What a descriptor is of."""

    CONTAINER = "/dev/vfio/vfio, with an IOMMU of type 1"
    IOMMUFD = "/dev/iommu"
    LEGACY_DEVICE = "a device out of a group, whose IOMMU is a container's"
    DEVICE = "a device of its own, whose IOMMU is an iommufd's"


@dataclass(frozen=True)
class Descriptor:
    """A descriptor of a process.

    :ivar number: in that process
    :ivar kind: what it is of
    :ivar label: what people may know it by, unique in the process
    """

    number: int
    kind: Kind
    label: str


def vfio_descriptors(pid: int) -> list[Descriptor]:
    """All that a process has to do with VFIO and iommufd, in order of number, each file once.

    Character devices are known by their numbers, since QEMU may have a ``/dev`` of its own.

    :raise OSError: there is no such process, or it is not ours to look at
    """
    kinds = _character_devices()
    found: list[Descriptor] = []
    for number in sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd")):
        path = f"/proc/{pid}/fd/{number}"
        try:
            target, status = os.readlink(path), os.stat(path)
        except FileNotFoundError:  # closed meanwhile
            continue
        kind = None
        if target == _LEGACY_DEVICE:
            kind = Kind.LEGACY_DEVICE
        elif stat.S_ISCHR(status.st_mode):
            major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
            kind = kinds.get((major, minor), kinds.get((major, None)))
        if kind is None or any(_same(pid, number, one) for one in found if one.kind is kind):
            continue
        found.append(Descriptor(number, kind, _label(pid, number, target)))
    return found


def _character_devices() -> dict[tuple[int, int | None], Kind]:
    # /proc/misc has "196 vfio", /proc/devices "511 vfio-dev": numbers given out at boot
    kinds: dict[tuple[int, int | None], Kind] = {}
    for line in Path("/proc/misc").read_text().splitlines():
        minor, name = line.split()
        if name == "vfio":
            kinds[_MISC_MAJOR, int(minor)] = Kind.CONTAINER
        elif name == "iommu":
            kinds[_MISC_MAJOR, int(minor)] = Kind.IOMMUFD
    for line in Path("/proc/devices").read_text().partition("\n\n")[0].splitlines():
        if line.endswith(" vfio-dev"):
            kinds[int(line.split()[0]), None] = Kind.DEVICE
    return kinds


def _same(pid: int, number: int, one: Descriptor) -> bool:
    try:
        return same_file(pid, number, one.number)
    except OSError:  # a kernel without kcmp: a file that is read twice is no harm
        return False


def _label(pid: int, number: int, target: str) -> str:
    # since v6.17 a device tells its place in sysfs
    try:
        for line in Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines():
            name, _, path = line.partition(":")
            if name == "vfio-device-syspath":
                return f"{os.path.basename(path.strip())} (descriptor {number})"
    except OSError:
        pass
    return f"{target} (descriptor {number})"


def copy_descriptors(pid: int, descriptors: Iterable[Descriptor]) -> list[int]:
    """Copy descriptors of another process, close-on-exec, in the same order.

    :return: ours now, to be closed by the caller
    :raise OSError: EPERM where the process may not be traced; then none is left open
    """
    copies: list[int] = []
    pidfd = os.pidfd_open(pid)
    try:
        for one in descriptors:
            copies.append(pidfd_getfd(pidfd, one.number))
    except BaseException:
        close_all(copies)
        raise
    finally:
        os.close(pidfd)
    return copies


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)
