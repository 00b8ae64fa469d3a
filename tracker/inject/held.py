"""Threads of another process that are kept from running for some milliseconds.

A virtual processor is a thread of QEMU. While it is held, the guest executes nothing, even if
another client of QEMU lets it run; QEMU's main loop answers all the same.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable

from tracker.abi.ptrace import Request
from tracker.errors import InjectionError, TargetGone
from tracker.inject.stops import await_stops, seize
from tracker.syscalls import ptrace_request


class Held:
    """Some threads of one process.

    The tracer is a thread of this process. When it ends, or this process is killed, the kernel
    lets the held threads go on: nothing has to be undone (see :mod:`tracker.inject.stops`).

    :param pid: the process
    :param threads: numbers of its threads
    """

    def __init__(self, pid: int, threads: Iterable[int]) -> None:
        self._pid = pid
        self._threads = frozenset(threads)
        self._answered = threading.Event()
        self._release = threading.Event()
        self._problem: InjectionError | OSError | None = None
        self._tracer: threading.Thread | None = None

    def hold(self, timeout_s: float) -> None:
        """Stop the threads; return once they stand.

        :raise TargetGone: the process ended
        :raise InjectionError: a thread may not be traced, or does not stop in time; none is held
        :raise OSError: the kernel refuses
        """
        assert self._tracer is None
        deadline = time.monotonic() + timeout_s
        self._tracer = threading.Thread(target=self._trace, args=(deadline,), daemon=True)
        self._tracer.start()
        self._answered.wait()
        if self._problem is not None:
            self.release()
            raise self._problem

    def _trace(self, deadline: float) -> None:
        try:
            seized = {tid for tid in self._threads if seize(self._pid, tid)}
            if await_stops(self._pid, seized, deadline) != self._threads:
                raise TargetGone(self._pid, "a thread of it ended")
        except (InjectionError, OSError) as error:
            self._problem = error
            self._answered.set()
            return
        self._answered.set()
        self._release.wait()
        for tid in self._threads:  # at once; the end of this thread may take a moment
            with contextlib.suppress(OSError):
                ptrace_request(Request.DETACH, tid)

    def release(self) -> None:
        """Let the threads go on. May be called again, and where none was held."""
        self._release.set()
        if self._tracer is not None:
            self._tracer.join()
            self._tracer = None
