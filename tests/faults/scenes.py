"""The place of one disturbed migration: two QEMUs, their monitors, the command, the hosts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.hosts.processes import is_running
from bench.hosts.twohosts import TwoHosts
from migrator.guest.workload import Workload, boot_image, check_walk, heartbeats
from migrator.qemu.process import Vm
from tests.faults.commands import TOKEN, Command, processes_of
from tests.faults.kinds import Fault
from tests.faults.monitors import Monitor, running_intervals
from tests.faults.plans import MIB, Plan
from tests.live.vms import Machine

PORT = 7000
_WAITING = "waiting for a VM at"
_SPARE_BYTES = 8 * MIB  # of a file system for RAM, which is to be filled up by some


@dataclass(frozen=True)
class Grounds:
    """Things of the machine that a migration needs, and may share with those before and after.

    :ivar hosts: two hosts that no other migration uses at the same time, or ``None``
    :ivar keys: directory of the hosts' keys
    """

    hosts: TwoHosts | None = None
    keys: Path | None = None


@dataclass
class Side:
    """A QEMU of a migration.

    :ivar qmp: its first QMP socket, the product's
    :ivar before: its settings before the migration
    :ivar began_s: since when its guest runs, or ``None``
    :ivar struck_s: when a fault killed it, in seconds since the epoch; ``None`` if none did
    """

    name: str
    console: Path
    ram_path: Path
    qmp: str
    monitor: Monitor
    before: dict[str, Any] = field(default_factory=dict)
    began_s: float | None = None
    struck_s: float | None = None

    @property
    def pid(self) -> int:
        return self.monitor.pid

    @property
    def is_alive(self) -> bool:
        return is_running(self.pid)

    def beats(self) -> int:
        """How many heartbeats its console has shown."""
        return self.console.read_bytes().count(b"\n")

    async def goes_on(self, more: int = 3, timeout_s: float = 30.0) -> bool:
        """Wait until its console shows so many heartbeats more; false: it does not in time."""
        wanted = self.beats() + more
        deadline = time.monotonic() + timeout_s
        while self.beats() < wanted:
            if time.monotonic() > deadline or not self.is_alive:
                return False
            await asyncio.sleep(0.01)
        return True

    def intervals(self) -> tuple[tuple[float, float], ...]:
        """When its guest ran, in seconds since the epoch."""
        gone = [at for at in (self.monitor.lost_at_s, self.struck_s) if at is not None]
        gone += [event.at_s for event in self.monitor.events if event.name == "SHUTDOWN"]
        return running_intervals(self.began_s, self.monitor.events, min(gone, default=None))

    @property
    def loaded(self) -> bool:
        """Whether QEMU said that it has loaded all of a VM; of a destination only."""
        return self.name == "destination" and any(
            event.name == "MIGRATION" and event.data.get("status") == "completed"
            for event in self.monitor.events
        )

    def kill(self) -> None:
        """End its process at once."""
        self.struck_s = time.time()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class Scene:
    """Source and destination, ready to be migrated.

    :ivar token: in the environment of all processes of the migration
    :ivar receiver: the command that receives, between two hosts only
    :ivar command: the migration, once it was started
    """

    source: Side
    destination: Side
    command: Command

    def __init__(self, plan: Plan, grounds: Grounds, directory: Path) -> None:
        self.plan = plan
        self.hosts = grounds.hosts if plan.two_hosts else None
        self.directory = directory
        self.token = f"{os.getpid()}-{plan.seed}-{directory.name}"
        self.receiver: Command | None = None
        self._keys = grounds.keys
        self._vms: list[Vm] = []
        self._image = directory / "guest.img"
        self._image.write_bytes(boot_image(plan.workload))
        for name in ("runtime", "tmp", "receiver"):
            (directory / name).mkdir(mode=0o700)
        self.machine = Machine(memory=plan.memory_bytes, workload=plan.workload)

    # -- QEMUs ----------------------------------------------------------------------------------

    def _ram_path(self, name: str) -> Path:
        path = self.directory / f"ram-{name}"
        return path if path.is_dir() else Path("/dev/shm")

    def _arguments(self, name: str, console: Path, ram: str) -> list[str]:
        machine = Machine(
            memory=self.plan.memory_bytes,
            workload=self.plan.workload,
            ram_path=str(self._ram_path(ram)),
            extra=["-no-reboot"] if self.plan.fault is Fault.GUEST_ENDS else [],
        )
        monitor = f"unix:{self.directory / name}.monitor,server=on,wait=off"
        return [*machine.arguments(self._image, console), "-qmp", monitor]

    async def _side(self, name: str, console: Path, ram: str, qmp: str) -> Side:
        monitor = await Monitor.connect(f"{self.directory / name}.monitor")
        side = Side(name, console, self._ram_path(ram), qmp, monitor)
        side.before = await monitor.settings()
        return side

    async def start(self, name: str, ram: str, *, incoming: bool) -> Side:
        """Start a QEMU on this host.

        :param ram: name of the file system for its RAM
        """
        vm = Vm(name, self.directory)
        self._vms.append(vm)
        await vm.start(self._arguments(name, vm.console, ram), incoming=incoming)
        return await self._side(name, vm.console, ram, vm.qmp)

    async def start_source(self) -> None:
        began_s = time.time()
        self.source = await self.start("source", "source", incoming=False)
        self.source.began_s = began_s
        assert await self.source.goes_on(), "the guest does not begin"
        if self.plan.paused:
            await self.source.monitor.execute("stop")

    async def start_destination(self) -> None:
        if self.hosts is None:
            self.destination = await self.start("destination", "destination", incoming=True)
            return
        console = self.directory / "destination.console"
        console.touch()
        self.receiver = Command(
            [
                *["receive", "--listen", f"{self.hosts.b.address}:{PORT}", "--json"],
                *self._security(self.hosts.b.address),
                *["--", *self._arguments("destination", console, "destination")],
            ],
            self._environment("receiver"),
            namespace=self.hosts.b.path,
        )
        deadline = time.monotonic() + 60
        while _WAITING not in self.receiver.stderr.text:
            late = time.monotonic() > deadline or self.receiver.exit_code is not None
            assert not late, self.receiver.stderr.text
            await asyncio.sleep(0.01)
        (qmp,) = (self.directory / "receiver").glob("migrator-*/destination.qmp")
        self.destination = await self._side("destination", console, "destination", str(qmp))

    # -- commands -------------------------------------------------------------------------------

    def _environment(self, temporary: str) -> dict[str, str]:
        return {
            **os.environ,
            TOKEN: self.token,
            "XDG_RUNTIME_DIR": str(self.directory / "runtime"),
            "TMPDIR": str(self.directory / temporary),
        }

    def _security(self, host: str) -> list[str]:
        if self.plan.secured and self._keys is not None:
            return ["--tls", str(self._keys / host)]
        return ["--insecure"]

    def link(self) -> list[str]:
        """Options that name the receiver."""
        assert self.hosts is not None
        return ["--to", f"{self.hosts.b.address}:{PORT}", *self._security(self.hosts.a.address)]

    def begin(self) -> None:
        """Start the migration."""
        plan = self.plan
        there = self.link() if self.hosts else ["--destination", self.destination.qmp]
        name = "send" if self.hosts else "migrate"
        held = [plan.moment.phase] if plan.moment.held else []
        held += [plan.moment.interrupt_at] if plan.moment.interrupt_at else []
        self.command = self.run(
            *[name, "--source", self.source.qmp, *there, *plan.options, "--json"],
            held=held,
            full_stdout=plan.fault is Fault.OUTPUT_FULL,
        )

    def run(self, *arguments: str, held: list[str] | None = None, full_stdout: bool = False) -> Any:
        """Start a command on the source's host."""
        return Command(
            arguments,
            self._environment("tmp"),
            namespace=self.hosts.a.path if self.hosts else None,
            held=held or [],
            full_stdout=full_stdout,
        )

    # -- the end ---------------------------------------------------------------------------

    def fill_up(self) -> None:
        """Leave nothing free where the destination's RAM is."""
        path = self.destination.ram_path
        assert path != Path("/dev/shm"), "only a file system of our own is filled"
        with contextlib.suppress(OSError), open(path / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(MIB))

    def make_room(self) -> None:
        """Undo :meth:`fill_up`."""
        (self.destination.ram_path / "filler").unlink(missing_ok=True)

    def walk_problem(self, side: Side, resets: int) -> str:
        """Check the RAM of a guest that stands still, where its own writes tell of a lost page.

        :param resets: how often it may have booted anew, which leaves an edge more
        :return: the fault that was found; empty if there is none
        """
        return walk_problem(_ram_of(side), self.plan.workload, resets)

    async def close(self) -> None:
        """End everything."""
        for name in ("command", "receiver"):
            command = getattr(self, name, None)
            if command is not None:
                await command.close()
        for name in ("source", "destination"):
            side = getattr(self, name, None)
            if side is not None:
                side.kill()
                await side.monitor.close()
        for vm in self._vms:
            await vm.stop()
        for pid in processes_of(self.token):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _ram_of(side: Side) -> NDArray[np.uint8]:
    """A copy of the RAM of a QEMU.

    :raise FileNotFoundError: it has no RAM file where it should be
    """
    for entry in Path(f"/proc/{side.pid}/fd").iterdir():
        target = ""
        with contextlib.suppress(OSError):
            target = os.readlink(entry)
        if target.startswith(f"{side.ram_path}/"):
            return np.fromfile(entry, np.uint8)
    raise FileNotFoundError(f"{side.name}: no RAM file in {side.ram_path}")


def walk_problem(ram: NDArray[np.uint8], workload: Workload, resets: int) -> str:
    """Tell where RAM is not as the guest's own writes leave it; see :func:`check_walk`.

    :param ram: all of it
    :param resets: how often the guest may have booted anew: each leaves a step of one more, where
        its walk was, and the walk begins again at the first page
    :return: the fault that was found; empty if there is none
    """
    found = check_walk(ram, workload)
    if not resets:
        return found.problem
    values = ram[workload.start : workload.end : 4096]
    steps = (values[:-1] - values[1:]).astype(int)  # modulo 256: a step up by one counts as 255
    if steps.sum() > 1 + resets:
        return f"after {resets} resets, the steps between pages add up to {steps.sum()}"
    return ""


@asynccontextmanager
async def staged(plan: Plan, grounds: Grounds) -> AsyncIterator[Scene]:
    """Start both QEMUs; end all that there is afterwards."""
    async with AsyncExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="faults-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        if os.geteuid() == 0:
            for name in ("ram-source", "ram-destination"):
                await asyncio.to_thread(_mount, directory / name, plan.memory_bytes)
                stack.push_async_callback(asyncio.to_thread, _unmount, directory / name)
        scene = Scene(plan, grounds, directory)
        stack.push_async_callback(scene.close)
        await asyncio.gather(scene.start_destination(), scene.start_source())
        yield scene


def _mount(path: Path, memory_bytes: int) -> None:
    path.mkdir()
    size = f"size={memory_bytes + _SPARE_BYTES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", path], check=True)


def _unmount(path: Path) -> None:
    subprocess.run(["umount", "-l", path], check=True)


def beats_problem(*consoles: bytes) -> str:
    """Check that heartbeats count up from 0, from console to console.

    :return: the fault that was found; empty if there is none
    """
    try:
        beats = heartbeats(b"".join(consoles))
    except ValueError as error:
        return str(error)
    for position, beat in enumerate(beats):
        if beat != position:
            return f"heartbeat {beat} where {position} was expected, of {len(beats)}"
    return ""
