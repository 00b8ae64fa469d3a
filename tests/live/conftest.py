"""Places for guest RAM."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import require
from tests.hugepages import huge_pages

_HUGE_PAGES = 2 * 128 // 2


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    """A directory on tmpfs that nobody else uses."""
    require(None if os.access("/dev/shm", os.W_OK) else "no /dev/shm")
    directory = tempfile.mkdtemp(prefix="test-live-", dir="/dev/shm")
    try:
        yield Path(directory)
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory on a file system that is on a disk."""
    with tempfile.TemporaryDirectory(prefix="test-live-", dir="/var/tmp") as directory:
        kind = subprocess.check_output(["stat", "-f", "-c", "%T", directory], text=True).strip()
        require(None if kind in ("ext2/ext3", "xfs") else f"/var/tmp is {kind}, not a disk")
        yield Path(directory)


@pytest.fixture
def hugetlbfs() -> Iterator[Path]:
    """A hugetlbfs with pages of 2 MiB, enough for two guests of 128 MiB."""
    with huge_pages(_HUGE_PAGES), mounted("hugetlbfs", "pagesize=2M") as directory:
        yield directory


@contextmanager
def mounted(kind: str, options: str) -> Iterator[Path]:
    """Mount a file system that has no device; skip the test where that is not allowed."""
    with tempfile.TemporaryDirectory(prefix="test-live-") as directory:
        mount = ["mount", "-t", kind, "-o", options, "none", directory]
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
        require(done.stderr.strip() if done.returncode else None)
        try:
            yield Path(directory)
        finally:
            _unmount(directory)


def _unmount(directory: str) -> None:
    """Unmount it; a process that has ended a moment ago may still let go of its memory."""
    deadline = time.monotonic() + 30.0
    while True:
        done = subprocess.run(["umount", directory], capture_output=True, text=True, check=False)
        if not done.returncode:
            return
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.1)
