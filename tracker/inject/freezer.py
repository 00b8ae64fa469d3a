"""The process that keeps another one standing still: started by :mod:`tracker.inject.frozen`, run
once.

It stops every thread with ptrace. It is a process of its own so that nothing can be left standing:
when a tracer ends, however it ends, the kernel lets its threads go on. It ends when whoever asked
says so, or is gone.

It is given the process id and the number of seconds in which all threads must stop, and a
SOCK_SEQPACKET socket as standard input. It sends one message there: ``stopped``, or the reason why
not. Then it waits for the socket to end.
"""

from __future__ import annotations

import os
import signal
import socket
import time

from tracker.errors import InjectionError, TargetGone
from tracker.inject.stops import await_stops, seize


def stop_all(pid: int, deadline: float) -> set[int]:
    """Stop every thread of a process, until we end.

    :param deadline: until when, in :func:`time.monotonic` seconds
    :return: the threads
    :raise TargetGone: the process ended
    :raise InjectionError: one of them may not be traced, or does not stop in time
    """
    stopped: set[int] = set()
    while True:
        new = _threads(pid) - stopped
        if not new:  # and none of those that stand can make another
            break
        seized = {tid for tid in new if seize(pid, tid)}
        stopped |= await_stops(pid, seized, deadline)
        if new - seized and time.monotonic() > deadline:
            raise InjectionError(pid, "its threads come and go")
    if not stopped:
        raise TargetGone(pid, "it ended")
    if helper := _kernel_helper(pid):
        raise InjectionError(pid, f"{helper} writes its memory and cannot be stopped")
    return stopped


def _threads(pid: int) -> set[int]:
    try:
        return {int(tid) for tid in os.listdir(f"/proc/{pid}/task")}
    except (FileNotFoundError, ProcessLookupError):
        raise TargetGone(pid, "there is no such process") from None


def _kernel_helper(pid: int) -> str:
    """Name of a kernel thread that writes for the process: vhost's, before they were its own.

    (Linux: commit 6e890c5d5021, "vhost: use vhost_tasks for worker threads", in v6.4.)
    """
    wanted = f"vhost-{pid}"
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/comm", encoding="utf-8", errors="replace") as comm:
                    name = comm.read().strip()
            except OSError:
                continue
            if name == wanted:  # processes only: a vhost of today is a thread of QEMU's
                return f"kernel thread {name}"
    return ""


def main(pid: int, timeout_s: float) -> None:
    """Stop ``pid``, say so on standard input, and keep it so until that ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would take the stops away from us
    channel = socket.socket(fileno=0)
    try:
        stop_all(pid, time.monotonic() + timeout_s)
        answer = "stopped"
    except InjectionError as error:
        answer = f"{type(error).__name__}\n{error.reason}"
    except OSError as error:
        answer = f"{InjectionError.__name__}\n{error.strerror}"
    try:
        channel.send(answer.encode())
        channel.recv(1)
    except ConnectionError:
        pass
