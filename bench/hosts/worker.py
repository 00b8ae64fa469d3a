"""A process on one of two hosts that does what it is told, one task after the other."""

from __future__ import annotations

import multiprocessing
import signal
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from bench.hosts.twohosts import Host, enter

PORT = 7000


class TaskFailed(Exception):
    """What was told to a worker failed there; the text is its traceback."""


class Worker:
    """The process. Tasks are functions of a module, and get a listening socket first.

    :param host: where it runs, and listens at :data:`PORT` from the first task on
    """

    def __init__(self, host: Host) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(host.path, host.address, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process.pid is not None
        return self._process.pid

    def begin(self, task: Callable[..., Any], *arguments: Any) -> None:
        """Let it do something."""
        self._ours.send((task, arguments))

    def result(self, timeout_s: float = 120.0) -> Any:
        """What the task that began returned.

        :raise TaskFailed: it raised an error, took longer, or the process ended
        """
        try:
            if not self._ours.poll(timeout_s):
                raise TaskFailed(f"took more than {timeout_s:g} s")
            result, problem = self._ours.recv()
        except EOFError as error:
            raise TaskFailed("the process ended") from error
        if problem:
            raise TaskFailed(problem)
        return result

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.join()
        self._ours.close()


def _work(namespace: str, address: str, tasks: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who told us
    enter(namespace)
    with socket.create_server((address, PORT)) as listener:
        while True:
            try:
                task, arguments = tasks.recv()
            except EOFError:
                return
            try:
                tasks.send((task(listener, *arguments), ""))
            except Exception:  # noqa: BLE001 (told to whoever asked)
                tasks.send((None, traceback.format_exc()))
