"""A process that stands still while something is done that takes more than one step."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from functools import partial

from tracker import child
from tracker.errors import InjectionError, TargetGone
from tracker.inject.freezer import main

_GRACE_S = 60.0  # for starting an interpreter on a busy, emulated machine

_ERRORS = {error.__name__: error for error in (InjectionError, TargetGone)}


@contextlib.contextmanager
def frozen(pid: int, *, timeout_s: float = 5.0) -> Iterator[None]:
    """Stop all threads of process ``pid`` while the ``with`` block runs.

    Whatever becomes of us, the process goes on: when we end, so does :mod:`tracker.inject.freezer`,
    and when that ends, the kernel lets the process go. What its threads may notice is what any stop
    makes visible (see :mod:`tracker.inject.tracee`). What others write to its memory meanwhile goes
    on: devices, and kernel work that was begun before.

    :param timeout_s: how long to wait until all threads stop
    :raise TargetGone: the process ended, or there is none
    :raise InjectionError: a thread may not be traced (one of the kernel's own, such as io_uring's
        workers, never may), or does not stop in time; or vhost has a kernel thread that would go on
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            freezer = child.start(
                partial(main, pid, timeout_s),
                site=False,
                stdin=theirs.fileno(),
                stderr=subprocess.PIPE,
            )
        try:
            ours.settimeout(timeout_s + _GRACE_S)
            try:
                answer = ours.recv(65536).decode()
            except (TimeoutError, ConnectionError):
                raise InjectionError(pid, "its freezer does not answer") from None
            if not answer:
                _, complaint = freezer.communicate(timeout=_GRACE_S)
                raise InjectionError(pid, f"its freezer ended: {complaint.decode().strip()}")
            if answer != "stopped":
                kind, _, reason = answer.partition("\n")
                raise _ERRORS[kind](pid, reason)
            yield
            if freezer.poll() is not None:
                raise InjectionError(pid, "its freezer ended too early, and it went on")
        finally:
            freezer.kill()
            freezer.communicate()
