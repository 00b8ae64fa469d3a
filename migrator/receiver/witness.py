"""A process of its own that answers for a VM whose receiver was killed.

From the moment a receiver has told its QEMU to go, the source may not run; a source that has not
heard so asks the receiver what became of the VM. The witness shares the receiver's listening
socket, and learns over a pipe what the receiver is about to do. When the pipe closes before the
last word, the receiver is dead: the witness ends a VM that was not told to go, and answers in the
receiver's place, for as long as the source could ask (:mod:`migrator.receiver.testimony`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from migrator.errors import MigratorError
from migrator.receiver.deposition import Opened, Post, Seen
from tracker import child


class Witness:
    """The receiver's end of the pipe.

    :raise OSError: no process can be started
    """

    def __init__(self, post: Post, listener: socket.socket) -> None:
        self._process = child.start(
            partial(main, json.dumps(asdict(post)), listener.fileno()),
            stdin=subprocess.PIPE,
            stderr=None,
            fds=(listener.fileno(),),
        )

    def _say(self, **step: Any) -> None:
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), json.dumps(step).encode() + b"\n")
        except OSError as error:
            raise MigratorError(
                f"the witness, process {self._process.pid}, has ended: without it, a receiver that "
                "is killed leaves the source without an answer"
            ) from error

    def opened(self, migration: Opened) -> None:
        """A migration was opened.

        :raise MigratorError: the witness has ended; likewise :meth:`ready` and :meth:`going`
        """
        self._say(opened=asdict(migration))

    def ready(self) -> None:
        """All is here: the source may say *go* at any moment."""
        self._say(ready=True)

    def going(self, *, run: bool) -> None:
        """QEMU is about to be given the end of its stream."""
        self._say(told_to_go=True, run=run)

    def ran(self) -> None:
        """QEMU has it, and runs, if it is to."""
        with contextlib.suppress(MigratorError):
            self._say(ran=True)

    def dismiss(self) -> None:
        """The receiver ends by itself: let the witness end. May be called again."""
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            with contextlib.suppress(MigratorError):
                self._say(done=True)
            self._process.stdin.close()
            self._process.wait()


# -- the witness's own side ---------------------------------------------------------------------


def main(post: str, listener: int) -> int:
    """Read the steps; act when they break off."""
    told = Post(**json.loads(post))
    pidfd = -1
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(told.pid)
    seen = Seen()
    for line in sys.stdin:
        step = json.loads(line)
        if "done" in step:
            return 0
        if "opened" in step:
            step["opened"] = Opened(**step["opened"])
        seen = replace(seen, **step)
    # all that this needs is imported only by the few witnesses that have something to do
    from migrator.receiver.testimony import testify

    return testify(told, seen, pidfd, socket.socket(fileno=listener))
