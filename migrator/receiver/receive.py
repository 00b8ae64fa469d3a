"""Receiving a VM, from QEMU's start to its going on alone."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrator.aio import in_thread, on_signals, settle
from migrator.errors import ConfigError, VmError
from migrator.link.tls import load, parse_peer
from migrator.migration.destination import LocalDestination
from migrator.qemu.accel import choose_accel
from migrator.qemu.process import RunDirectory, Vm, fill_in
from migrator.qemu.qmp import Qmp
from migrator.receiver.deposition import Post
from migrator.receiver.door import listen
from migrator.receiver.incoming import Outcome
from migrator.receiver.receiver import PATIENCE_S, Receiver
from migrator.receiver.witness import Witness
from migrator.transport.warm import warm_up

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Received:
    """What came of it.

    :ivar outcome: which side runs
    :ivar pid: QEMU's process; likewise ``qmp``, its socket
    """

    outcome: Outcome
    pid: int
    qmp: str

    @property
    def exit_code(self) -> int:
        """What the command ends with."""
        return {"running": 0, "never": 1}.get(self.outcome.state, 4)

    def words(self) -> str:
        """A sentence for people."""
        if self.outcome.state == "running":
            return f"the VM is here: process {self.pid}, QMP socket {self.qmp}"
        if self.outcome.state == "never":
            return f"no VM was received: {self.outcome.reason}"
        return (
            f"whether the VM runs is not known: {self.outcome.reason}; look at process {self.pid}, "
            f"QMP socket {self.qmp}"
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        status = {"running": "completed", "never": "aborted"}.get(self.outcome.state, "failed")
        return {"status": status, **vars(self.outcome), "pid": self.pid, "qmp": self.qmp}


async def receive(
    address: tuple[str, int],
    vm: str | list[str],
    *,
    keys: str | None,
    peer: str | None,
    say: Callable[[str], None] = lambda _: None,
    patience_s: float = PATIENCE_S,
) -> Received:
    """Receive one VM. A QEMU that was started for it ends, unless the VM runs in it.

    :param address: host and port to listen at
    :param vm: QMP socket of a QEMU that waits, or a command line to start one
    :param keys: directory of this host's keys; ``None``: not secured
    :param peer: who may send; see :func:`migrator.link.tls.check_peer`
    :param say: called with each step, for people
    :param patience_s: the longest that a source may have it wait
    :raise ConfigError: the address or the keys cannot be used
    :raise VmError: QEMU cannot be started, or does not answer
    """
    credentials = load(Path(keys)) if keys is not None else None
    context = credentials.server_context() if credentials is not None else None
    if peer is not None:
        parse_peer(peer)
        if context is None:
            raise ConfigError("expected --tls: without it nobody can show who they are")
    async with AsyncExitStack() as stack:
        task = asyncio.current_task()
        assert task is not None
        interrupted = _Interrupted(task)
        stack.enter_context(on_signals(lambda: interrupted.action()))
        await in_thread(_compile)
        try:
            listener = stack.enter_context(listen(*address))
        except OSError as error:
            raise ConfigError(f"cannot listen at {_text(address)}: {error.strerror}") from error
        run_directory = RunDirectory()
        started: Vm | None = None
        if isinstance(vm, list):
            started = await _start(vm, run_directory, stack)
            vm = started.qmp
        qmp = await Qmp.connect("destination", vm)
        stack.push_async_callback(lambda: settle(qmp.close(), too_late=True))
        try:
            destination = LocalDestination(qmp)
        except OSError as error:
            raise VmError("destination", f"process {qmp.pid}: {error.strerror}") from error
        stack.push_async_callback(destination.close)
        path = os.path.abspath(vm)
        directory = os.path.dirname(path) if started is not None else None
        witness = Witness(Post(path, qmp.pid, directory, keys, peer), listener)
        stack.callback(witness.dismiss)
        receiver = Receiver(
            destination,
            context,
            peer,
            say,
            patience_s=patience_s,
            ours=credentials.fingerprint() if credentials is not None else None,
            witness=witness,
        )

        def keep() -> None:
            """Whatever breaks from *go* on, and ends this: the VM may be nowhere else."""
            if started is not None and receiver.may_run:
                run_directory.keep_for(started.pid)
                started.let_go()

        stack.callback(keep)
        here = listener.getsockname()
        interrupted.action = receiver.stop
        say(f"waiting for a VM at {_text(here[:2])}, to be run by process {qmp.pid}")
        outcome = await receiver.serve(listener)
        return Received(outcome, qmp.pid, path)


async def _start(command: list[str], run_directory: RunDirectory, stack: AsyncExitStack) -> Vm:
    directory = stack.enter_context(run_directory)
    vm = Vm("destination", directory)
    stack.push_async_callback(vm.stop)  # unless it is let go
    values = {"run": str(directory), "console": str(vm.console)}
    if any("{accel}" in argument for argument in command):
        try:
            values["accel"] = (await choose_accel(command[0], "auto")).name
        except OSError as error:
            raise VmError(command[0], f"cannot be started: {error.strerror}") from error
    await vm.start(fill_in(command, values), incoming=True, keep=True)
    return vm


class _Interrupted:
    """What a signal does: at first it cancels this task, once, which takes QEMU along."""

    action: Callable[[], object]

    def __init__(self, task: asyncio.Task[Any]) -> None:
        def cancel() -> None:
            self.action = lambda: None
            task.cancel()

        self.action = cancel


def _text(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _compile() -> None:
    warm_up()
