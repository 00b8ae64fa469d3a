"""Stopping threads of another process with ptrace, for as long as the calling thread lives.

A tracer is a thread. When it ends, however it ends, the kernel lets the threads that it seized go
on (Linux: ``kernel/ptrace.c``, ``exit_ptrace``), as PTRACE_O_EXITKILL is not set.
"""

from __future__ import annotations

import os
import time

from tracker.abi import ptrace
from tracker.abi.ptrace import Request
from tracker.errors import InjectionError, TargetGone
from tracker.inject.refusal import proc_status, why_refused
from tracker.syscalls import ptrace_request

_WALL = 0x40000000  # wait for any kind of child; Python's os module lacks it
_LOOK_S = 0.0001


def seize(pid: int, tid: int) -> bool:
    """Begin to stop a thread of process ``pid``; false if it has ended.

    :raise InjectionError: it may not be traced
    """
    try:
        ptrace_request(Request.SEIZE, tid)
        ptrace_request(Request.INTERRUPT, tid)
    except ProcessLookupError:
        return False
    except PermissionError:
        try:
            status = proc_status(tid)
            if status["State"][0] in "ZX":
                return False
            reason = f"thread {tid} ({status['Name']}): {why_refused(tid)}"
        except (OSError, KeyError):
            return False
        raise InjectionError(pid, reason) from None
    return True


def await_stops(pid: int, threads: set[int], deadline: float) -> set[int]:
    """Wait until threads that were seized have stopped.

    Each is waited for by its number: other children of the calling process are left alone.

    :param deadline: in :func:`time.monotonic` seconds
    :return: those that did not end instead
    :raise TargetGone: one of them is not there any more
    :raise InjectionError: one of them does not stop in time
    """
    waiting, stopped = set(threads), set()
    while waiting:
        for tid in sorted(waiting):
            try:
                found, status = os.waitpid(tid, os.WNOHANG | _WALL)
            except ChildProcessError:
                raise TargetGone(pid, "it ended") from None
            if not found:
                continue
            if not os.WIFSTOPPED(status):
                waiting.discard(tid)
            elif status >> 16 == ptrace.PTRACE_EVENT_STOP:
                waiting.discard(tid)
                stopped.add(tid)
            else:  # a signal on its way: deliver it, the stop comes after it
                ptrace_request(Request.CONT, tid, data=os.WSTOPSIG(status))
        if waiting:
            if time.monotonic() > deadline:
                raise InjectionError(pid, f"its thread {min(waiting)} does not stop")
            time.sleep(_LOOK_S)
    return stopped
