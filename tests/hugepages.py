"""Huge pages of 2 MiB for a test: one test at a time has them.

The pool belongs to the whole machine, and tests run side by side. A lock on the pool's directory
keeps them apart, also those of two checkouts; the kernel lets go of it when a process ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import require

HUGE = 2 << 20
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def _read(name: str) -> int:
    return int((_POOL / name).read_text())


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Have ``count`` huge pages that are free; skip the test where that is not possible."""
    require(None if _POOL.exists() else "the kernel has no huge pages of 2 MiB")
    directory = os.open(_POOL, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        # the reserved ones belong to mappings that have not touched them yet
        free = _read("free_hugepages") - _read("resv_hugepages")
        before = _read("nr_hugepages")
        more = max(0, count - free)
        if more:
            require(None if os.geteuid() == 0 else "only root may make huge pages")
            (_POOL / "nr_hugepages").write_text(f"{before + more}")
        try:
            missing = before + more - _read("nr_hugepages")
            require(f"memory is short of {missing} huge pages" if missing > 0 else None)
            yield
        finally:
            if more:
                (_POOL / "nr_hugepages").write_text(f"{before}")
    finally:
        os.close(directory)
