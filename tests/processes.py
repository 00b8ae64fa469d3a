"""Whether a process runs (:mod:`bench.hosts.processes`), and which ones do, for tests."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from bench.hosts.processes import is_running

__all__ = ["fault_servers", "is_running"]


def fault_servers() -> set[int]:
    """Processes that answer write faults, whoever started them."""
    found = set()
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{entry}/cmdline")
            if entry.isdigit() and b"tracker.answered.faultserver" in command.read_bytes():
                found.add(int(entry))
    return found
