"""A userfaultfd of another process, obtained without its help."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import partial
from typing import NamedTuple

from tracker import child
from tracker.errors import InjectionError, TargetGone, UnsupportedMachine
from tracker.inject.injector import main

# How much longer than the target's thread may take to stop everything else may take: starting an
# interpreter on a busy machine, and the injected calls.
_GRACE_S = 60.0


_INT_BYTES = 4

_ERRORS = {error.__name__: error for error in (InjectionError, TargetGone, UnsupportedMachine)}


class AcquiredUffd(NamedTuple):
    """A userfaultfd over another process's memory, of which there is no other descriptor.

    When it is closed, also by the death of its owner, the kernel undoes all registrations.

    :ivar fd: close-on-exec and non-blocking; the receiver owns it
    :ivar user_mode_only: faults of the kernel are not handled. Asynchronous write-protection does
        without; synchronous does not
    :ivar stopped_ms: how long the process's main thread was stopped
    """

    fd: int
    user_mode_only: bool
    stopped_ms: float


def acquire_userfaultfd(pid: int, *, timeout_s: float = 5.0) -> AcquiredUffd:
    """Run userfaultfd(2) in the main thread of process ``pid`` and take the descriptor away.

    Blocks for some tens of milliseconds, most of it for starting a process, without holding the
    interpreter lock. The target goes on as if nothing had been, whether this succeeds or fails,
    and whatever happens to the calling process (:mod:`tracker.inject.injector`,
    :mod:`tracker.inject.tracee`). Only if the target forks in the very moment between two injected
    calls, the new process keeps a descriptor too.

    :param timeout_s: how long to wait until the thread stops; one in uninterruptible sleep does
        not
    :raise TargetGone: the process ended, or there is none
    :raise UnsupportedMachine: neither x86-64 nor arm64
    :raise InjectionError: it may not be traced (the reason says why), is traced already, is a
        32-bit process, does not stop in time, or its kernel denies it a userfaultfd
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            injector = child.start(
                partial(main, pid, timeout_s),
                site=False,
                stdin=theirs.fileno(),
                stderr=subprocess.PIPE,
            )
        ours.settimeout(timeout_s + _GRACE_S)
        try:
            # Not socket.recv_fds: it takes flags and leaves them out, so that the descriptor could
            # be inherited by a process that another thread starts.
            message, ancillary, _, _ = ours.recvmsg(
                65536, socket.CMSG_LEN(_INT_BYTES), socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError:
            # It is left alone: killing it now could kill the target.
            reason = f"process {injector.pid} is not done with the injection"
            raise InjectionError(pid, reason) from None
    fds = [int.from_bytes(data, sys.byteorder) for _, _, data in ancillary]  # only SCM_RIGHTS
    try:
        _, complaint = injector.communicate(timeout=_GRACE_S)
        if not message:
            reason = f"the injector ended with {injector.returncode}: {complaint.decode().strip()}"
            raise InjectionError(pid, reason)
        kind, rest = message.decode().split("\n", 1)
        if kind != "acquired":
            raise _ERRORS[kind](pid, rest)
        user_mode_only, stopped_ns = rest.split("\n")
        return AcquiredUffd(fds[0], user_mode_only == "1", int(stopped_ns) / 1e6)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
