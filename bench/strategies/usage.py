"""What this process and those it started have used: processor time, and memory of their own."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_UTIME = 11  # fields of /proc/PID/stat after the name (proc_pid_stat(5)); stime is the next


def cpu_s() -> float:
    """Processor time of this process, in seconds."""
    return time.process_time()


def ended_children_cpu_s() -> float:
    """Processor time of its children that have ended, in seconds."""
    used = os.times()
    return used.children_user + used.children_system


def children_cpu_s() -> float:
    """Processor time of its children that run, in seconds; to a hundredth."""
    return sum(_cpu_s(pid) for pid in _children())


def own_bytes() -> int:
    """Resident memory of this process, without what it has mapped of the guest's and of copies."""
    return _status_bytes(os.getpid(), "RssAnon") + _status_bytes(os.getpid(), "RssFile")


def children_bytes() -> int:
    """The same of its children."""
    return sum(_status_bytes(p, "RssAnon") + _status_bytes(p, "RssFile") for p in _children())


def _children() -> list[int]:
    pid = os.getpid()  # whoever starts them is the main thread
    return [int(child) for child in _text(f"/proc/{pid}/task/{pid}/children").split()]


def _cpu_s(pid: int) -> float:
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return sum(map(int, fields[_UTIME : _UTIME + 2])) / _TICKS_PER_S


def _status_bytes(pid: int, name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", _text(f"/proc/{pid}/status"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # it has ended
        return ""
