"""A process of its own that answers for a VM whose receiver was killed.

From the moment a receiver has told its QEMU to go, the source may not run; a source that has not
heard so asks the receiver what became of the VM. The witness shares the receiver's listening
socket, and learns over a pipe what the receiver is about to do. When the pipe closes before the
last word, the receiver is dead: the witness ends a VM that was not told to go, and answers in the
receiver's place, for as long as the source could ask (:mod:`migrator.testimony`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from migrator.errors import MigratorError
from tracker import child


@dataclass(frozen=True)
class Post:
    """What a witness has to know from the beginning.

    :ivar qmp: QMP socket of the QEMU that waits
    :ivar pid: its process
    :ivar directory: the private directory of a QEMU that the receiver started; ``None``: it did not
    :ivar keys: directory of this host's keys; ``None``: not secured
    :ivar peer: the host that may connect
    """

    qmp: str
    pid: int
    directory: str | None
    keys: str | None
    peer: str | None


@dataclass(frozen=True)
class Opened:
    """The migration that was opened.

    :ivar token: names it
    :ivar opened_by: fingerprint of the certificate that opened it, if one was shown
    :ivar wait_s: how long the source tries to reach the receiver again, at most
    :ivar settings: of QEMU, from before the migration
    """

    token: str
    opened_by: str | None
    wait_s: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """What the receiver did before it died.

    :ivar ready: all of the VM is here, but the end of QEMU's stream
    :ivar told_to_go: QEMU may have been given the end of its stream
    :ivar run: its guest is to run then
    :ivar ran: QEMU has said that its guest runs, or that all was loaded where it is not to
    """

    opened: Opened | None = None
    ready: bool = False
    told_to_go: bool = False
    run: bool = True
    ran: bool = False


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
    from migrator.testimony import testify

    return testify(told, seen, pidfd, socket.socket(fileno=listener))
