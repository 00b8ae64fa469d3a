"""A VM that runs on one host, and receivers for it on another: two network namespaces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from migrator import Progress, Report, migrate
from migrator.errors import MigratorError, VmError
from migrator.guest.workload import Workload, boot_image, heartbeats
from migrator.link.session import Link
from migrator.migration.options import Options
from migrator.qemu.process import RunDirectory, Vm
from migrator.qemu.qmp import Qmp
from tests.conftest import require
from tests.live.moving import VERIFIED
from tests.live.twohosts import TwoHosts, two_hosts
from tests.live.vms import MIB, Machine, Pair
from tests.processes import is_running

_T = TypeVar("_T")
MIGRATOR = str(Path(sys.executable).with_name("migrator"))
SMALL = Machine(memory=128 * MIB, workload=Workload(working_set_bytes=16 * MIB, pages_per_s=2000))
"""A guest that leaves something of the processor to others."""
PATIENCE_S = 180.0
_WAITING = re.compile(r"waiting for a VM at (\S+):(\d+), to be run by process (\d+)")


class Received(Vm):
    """A QEMU that a receiver started."""

    def __init__(self, run: Path, pid: int, console: Path) -> None:
        super().__init__("destination", run)
        self.console = console
        self._pid = pid

    @property
    def pid(self) -> int:
        return self._pid

    def check_alive(self) -> None:
        if not is_running(self._pid):
            raise VmError(self.name, "has ended")

    async def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        await eventually(lambda: not is_running(self._pid), "QEMU ends")


@dataclass
class Receiver:
    """A process of ``migrator receive``.

    :ivar directory: its TMPDIR, and where the console of its QEMU is
    :ivar lines: what it said for people
    """

    process: subprocess.Popen[str]
    directory: Path
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    @property
    def said(self) -> str:
        """All of it."""
        return "\n".join(self.lines)

    async def waiting(self) -> None:
        """Return when it can be connected to."""
        await eventually(
            lambda: _WAITING.search(self.said) or self.process.poll() is not None, "it waits"
        )
        found = _WAITING.search(self.said)
        assert found, self.said
        self.port, pid = int(found[2]), int(found[3])
        (run,) = self.directory.glob("migrator-*")
        self.vm = Received(run, pid, self.directory / "console")

    async def ended(self) -> int:
        """Wait until it ends by itself.

        :return: its exit code
        """
        await eventually(lambda: self.process.poll() is not None, f"it ends: {self.said}")
        self._listening.join()
        return int(self.process.returncode)

    async def end(self) -> None:
        """End it, and its QEMU, however they are."""
        self.process.kill()
        self.process.wait()
        self._listening.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        if hasattr(self, "vm"):
            await self.vm.stop()

    def result(self) -> dict[str, Any]:
        """What it printed as JSON, once it has ended."""
        assert self.process.stdout is not None
        found = json.loads(self.process.stdout.read().splitlines()[-1])
        assert isinstance(found, dict)
        return found


class Road:
    """Two hosts, a VM on the first, and the receivers that were started on the second.

    :ivar vm: the VM that runs, as far as is known
    :ivar receiver: the last one that was started
    :ivar destination: its QEMU
    """

    def __init__(self, hosts: TwoHosts, machine: Machine, directory: Path) -> None:
        self.hosts = hosts
        self.machine = machine
        self.directory = directory
        self.image = directory / "guest.img"
        self.image.write_bytes(boot_image(machine.workload))
        self.vm = Vm("source", directory)
        self.receiver: Receiver
        self._ready: list[Receiver] = []
        self._count = 0
        self._consoles = [self.vm.console]

    @property
    def is_used(self) -> bool:
        """Whether anything was received on it."""
        return self._count > 0

    @property
    def destination(self) -> Received:
        return self.receiver.vm

    async def start(self) -> None:
        """Start the VM; return once its guest's heart beats."""
        command = self.machine.arguments(self.image, self.vm.console)
        await self.vm.start([*command, *_second_monitor(self.vm.console)], incoming=False)
        await Pair.beats(self.vm, 3)

    def prepare(
        self, *options: str, insecure: bool = True, program: Sequence[str] = (MIGRATOR,)
    ) -> None:
        """Let a receiver start, for :meth:`next_receiver`.

        :param program: what is run instead of the command
        """
        self._count += 1
        directory = self.directory / str(self._count)
        directory.mkdir()
        console = directory / "console"
        process = self.hosts.b.run(
            [
                *[*program, "receive", "--listen", f"{self.hosts.b.address}:0", "--json"],
                *["--insecure"] * insecure,
                *options,
                "--",
                *self.machine.arguments(self.image, console, destination=True),
                *_second_monitor(console),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(directory)},
        )
        console.touch()
        self._ready.append(Receiver(process, directory))

    async def next_receiver(self, *options: str, insecure: bool = True) -> Receiver:
        """The receiver that was prepared, or a new one, once it waits."""
        if not self._ready:
            self.prepare(*options, insecure=insecure)
        self.receiver = self._ready.pop(0)
        await self.receiver.waiting()
        return self.receiver

    def link(self, **options: Any) -> Link:
        """The way to the receiver."""
        return Link(self.hosts.b.address, self.receiver.port, **options)

    async def send(
        self,
        watch: Callable[[Progress], None] = lambda _: None,
        options: Options = VERIFIED,
        **link: Any,
    ) -> Report:
        """Migrate to the last receiver."""
        return await migrate(self.vm.qmp, self.link(**link), options, watch=watch)

    async def arrived(self) -> None:
        """The VM has moved: end the old one, and the receiver; it may be moved again."""
        await self.vm.stop()
        self.vm = self.destination
        self._consoles.append(self.vm.console)
        self.receiver.process.kill()
        self.receiver.process.wait()

    async def stayed(self) -> None:
        """The VM has not moved: end the receiver."""
        await self.receiver.end()

    async def states(self) -> tuple[str, str]:
        """Run state of the VM and of the destination; ``gone`` if a process has ended."""
        return await state(self.vm), await state(self.destination)

    async def one_runs(self) -> str:
        """Check that exactly one side runs, whose heart beats; go on with that.

        :return: ``source`` or ``destination``
        """
        states = await self.states()
        assert states.count("running") == 1, (states, self.receiver.said)
        if states[0] == "running":
            assert self.destination.console.read_bytes() == b""
            assert Pair.traces(self.vm) == []
            await Pair.beats(self.vm, 2)
            await self.stayed()
            return "source"
        await self.arrived()
        await self.check_heartbeat_unbroken()
        return "destination"

    async def check_heartbeat_unbroken(self) -> None:
        """Check that the guest goes on where it was, wherever it has been."""
        await Pair.beats(self.vm, 2)
        beats = heartbeats(b"".join(console.read_bytes() for console in self._consoles))
        assert beats == list(range(len(beats)))

    async def close(self) -> None:
        """End everything."""
        for receiver in (*self._ready, *([self.receiver] if hasattr(self, "receiver") else [])):
            await receiver.end()
        await self.vm.stop()


def _second_monitor(console: Path) -> list[str]:
    return ["-qmp", f"unix:{console}.qmp,server=on,wait=off"]


def monitor(vm: Vm) -> str:
    """Another QMP socket of a VM: the first one serves one client, which may be busy with it."""
    return f"{vm.console}.qmp"


async def state(vm: Vm) -> str:
    """The run state of a VM; ``gone`` if its process has ended."""
    with contextlib.suppress(VmError):
        vm.check_alive()
        qmp = await Qmp.connect(vm.name, monitor(vm), timeout_s=10)
        try:
            return await qmp.run_state()
        finally:
            await qmp.close()
    return "gone"


async def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


async def comes_to(vm: Vm, *wanted: str) -> str:
    """Wait until a VM is in one of these states."""
    deadline = time.monotonic() + PATIENCE_S
    while (found := await state(vm)) not in wanted:
        assert time.monotonic() < deadline, (vm.name, found)
        await asyncio.sleep(0.1)
    return found


@contextlib.asynccontextmanager
async def _on(road: Road) -> Any:
    try:
        await road.start()
        yield road
    finally:
        road.hosts.mend()
        await road.close()


def on_a_road(
    body: Callable[[Road], Awaitable[_T]], machine: Machine = SMALL, *, start: bool = True
) -> _T:
    """Run a test whose every connection is made on the first host."""
    require(None if shutil.which(machine.qemu[0]) else f"{machine.qemu[0]} is not installed")
    with two_hosts() as hosts, RunDirectory() as directory:

        async def run() -> _T:
            road = Road(hosts, machine, directory)
            async with _on(road):
                return await body(road)

        # sockets, and threads, which make some, begin in the namespace of this thread
        with hosts.a.inside():
            return asyncio.run(run())


@dataclass(frozen=True)
class Case:
    """Something to be done on a road that others have used before."""

    name: str
    body: Callable[[Road], Coroutine[Any, Any, None]]


def on_several_roads(cases: Sequence[Case], lanes: int = 4, machine: Machine = SMALL) -> None:
    """Do many things, most of which wait for something, on a few roads at the same time.

    A road on which something went wrong is not used again.
    """
    left: SimpleQueue[Case] = SimpleQueue()
    for case in cases:
        left.put(case)
    failures: dict[str, str] = {}

    async def use(road: Road) -> None:
        while not left.empty():
            case = left.get()
            road.hosts.mend()
            try:
                await case.body(road)
            except Exception as error:
                failures[case.name] = f"{type(error).__name__}: {error}"
                raise

    def lane() -> None:
        while not left.empty():
            with contextlib.suppress(Exception):
                on_a_road(use, machine)

    with ThreadPoolExecutor(lanes) as pool:
        working: list[Future[None]] = [pool.submit(lane) for _ in range(lanes)]
    for each in working:
        each.result()
    assert not failures, "\n".join(f"{name}: {why}" for name, why in failures.items())


@contextlib.contextmanager
def expecting(*kinds: type[MigratorError]) -> Iterator[list[MigratorError]]:
    """Like ``pytest.raises``, where an ending without an error is told by an empty list."""
    caught: list[MigratorError] = []
    try:
        yield caught
    except kinds as error:
        caught.append(error)
