"""Descriptors of a process: what needs no device. The rest is in the lab VM's tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import require
from tracker.devices import descriptors
from tracker.devices.descriptors import Descriptor, Kind, copy_descriptors, vfio_descriptors
from tracker.devices.dma import dma_sources
from tracker.errors import SourceError
from tracker.syscalls import same_file

# holds /dev/null under two numbers, /dev/zero under one, and tells all
CHILD = (
    "import os, sys; null = os.open('/dev/null', os.O_RDWR); "
    "print(null, os.dup(null), os.open('/dev/null', os.O_RDWR), os.open('/dev/zero', os.O_RDWR), "
    "flush=True); sys.stdin.read()"
)


@pytest.fixture
def child() -> Iterator[tuple[int, list[int]]]:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.pid, [int(word) for word in process.stdout.readline().split()]
        process.communicate()


def has_kcmp() -> bool:
    try:
        return same_file(os.getpid(), 0, 0)
    except OSError:
        return False


def test_a_process_without_devices(child: tuple[int, list[int]]) -> None:
    assert vfio_descriptors(child[0]) == []
    assert dma_sources(child[0], [], []) == []


def test_a_process_that_is_gone(child: tuple[int, list[int]]) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    with pytest.raises(FileNotFoundError):
        vfio_descriptors(gone.pid)
    with pytest.raises(SourceError, match=f"process {gone.pid}"):
        dma_sources(gone.pid, [], [])


def test_each_file_is_found_once(
    child: tuple[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the device's number: /dev/null stands for what is not here."""
    require(None if has_kcmp() else "the kernel has no kcmp")
    pid, (null, _, again, zero) = child
    device = os.stat("/dev/null").st_rdev
    kinds = {
        (os.major(device), os.minor(device)): Kind.CONTAINER,
        (os.major(device), None): Kind.DEVICE,  # any of this major
    }
    monkeypatch.setattr(descriptors, "_character_devices", lambda: kinds)
    assert vfio_descriptors(pid) == [
        Descriptor(null, Kind.CONTAINER, f"/dev/null (descriptor {null})"),
        Descriptor(again, Kind.CONTAINER, f"/dev/null (descriptor {again})"),
        Descriptor(zero, Kind.DEVICE, f"/dev/zero (descriptor {zero})"),
    ]


def test_copies_are_the_same_files(child: tuple[int, list[int]]) -> None:
    pid, (null, _, _, zero) = child
    wanted = [Descriptor(n, Kind.CONTAINER, str(n)) for n in (zero, null)]
    copies = copy_descriptors(pid, wanted)
    try:
        assert os.read(copies[0], 2) == b"\0\0"
        assert os.read(copies[1], 2) == b""
        assert not any(os.get_inheritable(fd) for fd in copies)
    finally:
        descriptors.close_all(copies)


def test_copying_all_or_nothing(child: tuple[int, list[int]]) -> None:
    pid, (null, *_) = child
    before = os.listdir("/proc/self/fd")
    wanted = [Descriptor(n, Kind.CONTAINER, str(n)) for n in (null, 999)]
    with pytest.raises(OSError, match="pidfd_getfd"):
        copy_descriptors(pid, wanted)
    assert os.listdir("/proc/self/fd") == before
