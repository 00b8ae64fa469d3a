"""A process of its own that ends well what a killed orchestrator left half done.

Tracking needs nobody: the kernel drops it with the process. But from the moment QEMU's own
migration is started, the source waits, paused, for an answer of ours. The guard learns of each step
over a pipe; when the pipe closes before the last word, it lets the one side run that may::

    begun       all may be changed, the source may be stopped, the
                destination cannot run                                  → the source goes on
    over        it runs on: what was begun is over                      → nothing to do
    committed   the destination may have all it needs                   → it runs, or proves dead
    done        nothing to do

In each case, the capabilities and parameters of both QEMUs are put back.

It is started before the switchover, in a session of its own, so that neither Ctrl-C nor the killing
of a process group reaches it. A migration whose guard has died is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

from migrator.errors import MigratorError, VmError
from migrator.harmless import say
from migrator.migration.wards import LocalWard, Wards
from migrator.qemu.qmp import Qmp, is_alive
from migrator.qemu.rollback import bring_back
from migrator.qemu.settings import Settings, put_back
from tracker import child

_log = logging.getLogger(__name__)

_PATIENCE_S = 30.0


class Guard:
    """The orchestrator's end of the pipe."""

    def __init__(self, wards: Wards) -> None:
        self._process = child.start(partial(main), stdin=subprocess.PIPE, stderr=None)
        self._say(wards.to_json())

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), line.encode() + b"\n")
        except OSError as error:
            raise MigratorError(
                f"the guard, process {self._process.pid}, has ended: without it, a migration that "
                "is killed leaves the guest paused"
            ) from error

    def begun(self, running: bool, *, by_stop: bool = False) -> None:
        """Settings are about to be changed, QEMU's own migration started, or the guest stopped.

        :raise MigratorError: the guard has ended; likewise :meth:`committed`
        :param running: whether the guest runs until then
        :param by_stop: it is we who stop it, with the command ``stop``
        """
        self._say(" ".join(["begun", *["running"] * running, *["stop"] * by_stop]))

    def over(self) -> None:
        """What was begun is over, and the source runs on."""
        with contextlib.suppress(MigratorError):
            self._say("over")

    def committed(self) -> None:
        """The end of the stream is about to be sent to the destination."""
        self._say("committed")

    def leave_it_to_you(self) -> None:
        """We end without a decision: let the guard act."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def dismiss(self) -> None:
        """All is decided: let the guard end."""
        assert self._process.stdin is not None
        with contextlib.suppress(MigratorError):
            self._say("done")
        self._process.stdin.close()
        self._process.wait()


# -- the guard's own side -----------------------------------------------------------------------


def main() -> int:
    """Read the steps; act when they break off."""
    first = sys.stdin.readline()
    if not first:
        return 0
    wards = Wards.from_json(first)
    destination_pidfd = -1
    if isinstance(wards.destination, LocalWard):
        with contextlib.suppress(ProcessLookupError):
            destination_pidfd = os.pidfd_open(wards.destination.pid)
    step = ""
    for line in sys.stdin:
        step, *how = line.split()
        if step == "begun":
            before = replace(wards.before, was_running="running" in how, paused_by_us="stop" in how)
            wards = replace(wards, before=before)
    if step in ("", "over", "done"):
        return 0
    try:
        outcome = asyncio.run(_end_well(wards, step, destination_pidfd))
    except (MigratorError, OSError) as error:
        _tell(f"{error}; look at both VMs yourself")
        return 4
    _tell(f"the orchestrator is gone; {outcome}")
    return 0


def _tell(words: str) -> None:
    with contextlib.suppress(OSError, AttributeError):  # the terminal may be gone, too
        say(f"migrator guard: {words}")


async def _end_well(wards: Wards, step: str, destination_pidfd: int) -> str:
    try:
        if step == "committed" and await _runs_there(wards, destination_pidfd):
            await put_back_settings("source", wards.source, wards.before.settings)
            return "the destination runs"
        source = await Qmp.connect("source", wards.source, timeout_s=_PATIENCE_S)
        try:
            state = await bring_back(source, wards.before)
        finally:
            await source.close()
        return f"the source is {state}"
    finally:
        there = wards.destination
        alive = destination_pidfd >= 0 and is_alive(destination_pidfd)
        if alive and isinstance(there, LocalWard):
            await put_back_settings("destination", there.qmp, there.settings)


async def _runs_there(wards: Wards, destination_pidfd: int) -> bool:
    there = wards.destination
    if isinstance(there, LocalWard):
        run = wards.before.was_running
        return await runs_in_the_end(there.qmp, destination_pidfd, run=run)
    from migrator.migration.remote import outcome

    return await outcome(there, patience_s=_PATIENCE_S)


async def put_back_settings(name: str, path: str, before: Settings) -> None:
    """Put settings back; a QEMU that has ended, or is about to, does not need it."""
    try:
        qmp = await Qmp.connect(name, path, timeout_s=1.0)
        try:
            await put_back(qmp, before)
        finally:
            await qmp.close()
    except VmError as error:
        _log.info("not as it was before: %s", error)


async def runs_in_the_end(path: str, pidfd: int, *, run: bool) -> bool:
    """Wait until a destination runs (true) or is known never to run (false).

    :param path: its QMP socket
    :param pidfd: its process; -1: it has ended
    :param run: whether its guest is to run, once all is loaded
    :raise MigratorError: it does neither
    """
    deadline = time.monotonic() + _PATIENCE_S
    problem: MigratorError | None = None
    while time.monotonic() < deadline:
        if pidfd < 0 or not is_alive(pidfd):
            return False
        try:
            destination = await Qmp.connect("destination", path, timeout_s=1.0)
        except MigratorError as error:
            problem = error
            await asyncio.sleep(0.05)
            continue
        try:
            state = await destination.run_state()
            status = (await destination.migration()).get("status")
            if state == "running" or (status == "completed" and not run):
                return True
            if status == "completed":
                await destination.execute("cont")
            elif status == "failed":
                await destination.execute("quit")
        except MigratorError as error:
            problem = error
        finally:
            await destination.close()
        await asyncio.sleep(0.01)
    raise problem or MigratorError("the destination neither runs nor ends")
