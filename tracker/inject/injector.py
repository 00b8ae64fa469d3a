"""The short-lived process that does an injection: started by :mod:`tracker.inject.acquire`, run
once.

It is a process of its own because a tracer that dies in the middle leaves the target with the
registers of the injected call. Whoever asked may be killed at any time; this process is in
another session, ignores everything but SIGKILL, and always finishes what it began. Its imports
are few, as all of them are on the way of an attach.

It is given the process id and the number of seconds in which the target's thread must stop, and
a SOCK_SEQPACKET socket as standard input. It sends one message there, fields divided by line
feeds: ``acquired``, 1 or 0 for user-mode only, the nanoseconds that the thread was stopped, with
the descriptor attached; or the name of an exception class and the reason.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from typing import NamedTuple

from tracker.abi.userfaultfd import UFFD_USER_MODE_ONLY
from tracker.errors import InjectionError, TargetGone
from tracker.inject.tracee import Tracee
from tracker.syscalls import pidfd_getfd


class Copied(NamedTuple):
    """A userfaultfd of the target that only this process has a descriptor of."""

    fd: int
    user_mode_only: bool
    stopped_ns: int


def copy_userfaultfd(pid: int, deadline: float) -> Copied:
    """Make a userfaultfd inside ``pid``, copy it here, and close it there.

    The caller fulfils what :class:`tracker.inject.tracee.Tracee` asks of it.

    :param deadline: until when the thread must have stopped, in :func:`time.monotonic` seconds
    :raise InjectionError: any failure
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise TargetGone(pid, "there is no such process") from None
    except OSError as error:
        raise InjectionError(pid, f"pidfd_open: {error.strerror}") from error
    try:
        with Tracee(pid, deadline) as tracee:
            numbers = tracee.machine.numbers
            flags = os.O_CLOEXEC | os.O_NONBLOCK
            user_mode_only = False
            try:
                theirs = tracee.call("userfaultfd", numbers.userfaultfd, flags)
            except PermissionError:  # /proc/sys/vm/unprivileged_userfaultfd is 0
                user_mode_only = True
                flags |= UFFD_USER_MODE_ONLY
                theirs = tracee.call("userfaultfd", numbers.userfaultfd, flags)
            try:
                fd = pidfd_getfd(pidfd, theirs)
            finally:
                tracee.call("close", numbers.close, theirs)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise TargetGone(pid, "it ended") from None
        raise InjectionError(pid, str(error.strerror)) from error
    finally:
        os.close(pidfd)
    return Copied(fd, user_mode_only, tracee.stopped_ns)


def main(pid: int, timeout_s: float) -> None:
    """Inject into ``pid`` and answer on standard input."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored signals are inherited, and never come
    answer = socket.socket(fileno=0)
    try:
        copied = copy_userfaultfd(pid, time.monotonic() + timeout_s)
    except InjectionError as error:
        fields = (type(error).__name__, error.reason)
        descriptors = []
    else:
        fields = ("acquired", f"{copied.user_mode_only:d}\n{copied.stopped_ns}")
        descriptors = [copied.fd]
    try:
        socket.send_fds(answer, ["\n".join(fields).encode()], descriptors)
    except ConnectionError:  # whoever asked has died; so does the descriptor, with us
        return
