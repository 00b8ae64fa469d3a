"""On what, and with what, something was measured."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any


def describe(qemu: str) -> dict[str, Any]:
    """The machine, and versions; nothing that tells whose it is."""
    cpu = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": _first_line(qemu, "--version"),
        "revision": _first_line("git", "-C", str(Path(__file__).parent), "describe", *_FLAGS),
    }


_FLAGS = ("--always", "--dirty", "--exclude=*")


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.partition("\n")[0].strip()
