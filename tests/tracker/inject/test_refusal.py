"""Why a process may not be traced: a process that is ending is no kernel thread."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tracker.inject.refusal import why_refused


def test_a_process_without_memory_any_more_is_gone() -> None:
    """As between its memory's end and its own, which nobody can hold still; it stays a zombie."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        assert "VmSize" not in Path(f"/proc/{pid}/status").read_text()
        with pytest.raises(ProcessLookupError):
            why_refused(pid)
    finally:
        os.waitpid(pid, 0)
