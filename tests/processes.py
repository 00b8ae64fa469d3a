"""Whether a process runs (:mod:`bench.hosts.processes`), and which ones do, for tests."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from bench.hosts.processes import is_running

__all__ = ["fault_servers", "is_running"]


def fault_servers() -> set[int]:
    """Processes that answer write faults for this run of the tests: others run beside it.

    What it starts inherits its directory for sockets.
    """
    ours = f"XDG_RUNTIME_DIR={os.environ['XDG_RUNTIME_DIR']}\0".encode()
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_one = b"tracker.answered.faultserver" in (entry / "cmdline").read_bytes()
            if is_one and ours in (entry / "environ").read_bytes():
                found.add(int(entry.name))
    return found
