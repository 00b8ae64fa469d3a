"""What a witness does once its receiver was killed: settle whether the VM runs, and tell it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import signal
import socket
from pathlib import Path

from migrator.aio import within
from migrator.errors import MigratorError
from migrator.harmless import say
from migrator.link.connection import Connection
from migrator.link.messages import Greeting, State
from migrator.link.tls import load
from migrator.migration.guard import put_back_settings, runs_in_the_end
from migrator.qemu.process import keep_directory
from migrator.qemu.qmp import is_alive
from migrator.qemu.settings import Settings
from migrator.receiver.deposition import Opened, Post, Seen
from migrator.receiver.door import LINGER_S, Door, refusal

_LOOK_S = 1.0
_END_S = 10.0
_KILLED = "the receiver was killed"
_RUNS = f"{_KILLED}, and the VM runs here"


def testify(post: Post, seen: Seen, pidfd: int, listener: socket.socket) -> int:
    """Settle what becomes of the VM, and answer for as long as the source could ask.

    :param pidfd: QEMU's process; -1: it has ended
    :param listener: where the receiver listened
    """
    try:
        return asyncio.run(_Testimony(post, seen, pidfd).give(listener))
    except (MigratorError, OSError) as error:
        _tell(f"{error}; look at process {post.pid}, QMP socket {post.qmp}, yourself")
        return 4


def _tell(words: str) -> None:
    with contextlib.suppress(OSError, AttributeError):  # the terminal may be gone, too
        say(f"migrator receive, its witness: {words}")


class _Testimony:
    def __init__(self, post: Post, seen: Seen, pidfd: int) -> None:
        self._post = post
        self._seen = seen
        self._pidfd = pidfd
        self._told = asyncio.Event()

    async def give(self, listener: socket.socket) -> int:
        opened = self._seen.opened
        if opened is None:
            self._never()
            _tell(f"{_KILLED} before a VM came")
            return 0
        self._state, self._reason = await self._settle(opened)
        _tell(f"{self._reason or _RUNS}; staying to tell the source so")
        credentials = load(Path(self._post.keys)) if self._post.keys is not None else None
        self._ours = credentials.fingerprint() if credentials is not None else None
        context = credentials.server_context() if credentials is not None else None
        listener.setblocking(False)
        async with Door(listener, context, self._post.peer, self._attend):
            _let_go_of_the_terminal()
            await self._stay(opened)
        return 0

    # -- whether it runs ------------------------------------------------------------------------

    async def _settle(self, opened: Opened) -> tuple[State, str]:
        """What becomes of the VM, and why; settings are as before then."""
        state, reason = State.RUNNING, ""
        if not self._seen.told_to_go:
            self._never()
            state, reason = State.NEVER, f"{_KILLED} before it let the VM run"
        elif not self._seen.ran:
            try:
                ran = await runs_in_the_end(self._post.qmp, self._pidfd, run=self._seen.run)
            except MigratorError as error:
                state, reason = State.UNKNOWN, f"{_KILLED}, and QEMU cannot be asked: {error}"
            else:
                if not ran:
                    self._never()
                    state, reason = State.NEVER, f"{_KILLED}, and QEMU did not get all of the VM"
        if self._lives:
            await put_back_settings("destination", self._post.qmp, Settings(**opened.settings))
            if self._post.directory is not None:
                keep_directory(Path(self._post.directory), self._post.pid)
        return state, reason

    def _never(self) -> None:
        """End a QEMU that was started for the VM, and will not get it."""
        if self._post.directory is None:
            return
        if self._lives:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            select.select([self._pidfd], [], [], _END_S)
        shutil.rmtree(self._post.directory, ignore_errors=True)

    @property
    def _lives(self) -> bool:
        return self._pidfd >= 0 and is_alive(self._pidfd)

    # -- telling it -----------------------------------------------------------------------------

    async def _attend(self, connection: Connection, said: Greeting) -> bool:
        opened, state, reason = self._seen.opened, self._state, self._reason
        assert opened is not None
        if said.purpose != "resolve":
            if said.session == opened.token and connection.fingerprint == opened.opened_by:
                self._told.set()
            await connection.send({"no": f"cannot go on: {reason or 'the VM runs here'}"})
            return False
        answer = refusal(connection, said, opened.token, opened.opened_by, self._ours)
        if answer is None and said.decide == "destination" and state is not State.RUNNING:
            answer = {"no": f"it cannot run here: it is {state.value}"}
        await connection.send(answer or {"state": state.value, "reason": reason, "after_s": None})
        if answer is None and said.decide is not None:
            self._told.set()
        return False

    async def _stay(self, opened: Opened) -> None:
        """Be there for as long as the source could ask."""
        state = self._state
        if state is State.NEVER:
            # a source that may have said go could ask later than it tries by itself
            limit_s = LINGER_S if self._seen.ready else opened.wait_s
            with contextlib.suppress(asyncio.TimeoutError):
                await within(limit_s, self._told.wait())
        while state is not State.NEVER and not self._told.is_set() and self._lives:
            with contextlib.suppress(asyncio.TimeoutError):
                await within(_LOOK_S, self._told.wait())
        await asyncio.sleep(opened.wait_s)  # it may not have heard the answer


def _let_go_of_the_terminal() -> None:
    """Let a reader of the receiver's output see its end."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 2)
    os.close(nowhere)
