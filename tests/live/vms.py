"""Real QEMUs for the live tests, with the built-in guest in them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from migrator.guest.workload import Workload, boot_image, guest_args, heartbeats
from migrator.qemu.process import RunDirectory, Vm
from migrator.qemu.qmp import Qmp
from tests.conftest import require

MIB = 1 << 20
_WORKLOAD = Workload(working_set_bytes=32 * MIB)


@dataclass(frozen=True)
class Machine:
    """What a test VM is made of.

    :ivar memory: bytes of guest RAM, in as many NUMA nodes as ``nodes``
    :ivar ram_path: mem-path of the RAM file: a directory, in which QEMU makes a nameless file
    :ivar extra: more arguments
    :ivar source_extra: more arguments of the source only; likewise ``destination_extra``
    """

    memory: int = 256 * MIB
    workload: Workload = _WORKLOAD
    nodes: int = 1
    ram_path: str = "/dev/shm"
    machine: str = "q35"
    extra: Sequence[str] = ()
    source_extra: Sequence[str] = ()
    destination_extra: Sequence[str] = ()
    qemu: Sequence[str] = ("qemu-system-x86_64",)

    def arguments(self, image: Path, console: Path, *, destination: bool = False) -> list[str]:
        """The command line, without -qmp and -incoming."""
        each = self.memory // self.nodes
        ram = ["-m", f"{self.memory // MIB}M"]
        for node in range(self.nodes):
            ram += [
                "-object",
                f"memory-backend-file,id=ram{node},size={each},share=on,mem-path={self.ram_path}",
            ]
        machine = self.machine
        if self.nodes == 1:
            machine += ",memory-backend=ram0"
        else:
            for node in range(self.nodes):
                ram += ["-numa", f"node,nodeid={node},memdev=ram{node}"]
        return [
            *[*self.qemu, "-accel", "tcg", "-machine", machine, *ram],
            *[*guest_args(image), "-serial", f"file:{console}"],
            *self.extra,
            *(self.destination_extra if destination else self.source_extra),
        ]


class Pair:
    """A source that runs and a destination that waits."""

    def __init__(self, machine: Machine, directory: Path, image: Path) -> None:
        self.machine = machine
        self.directory = directory
        self.image = image
        self.source = Vm("source", directory)
        self.destination = Vm("destination", directory)

    async def start_destination(self) -> None:
        """Start the destination, or another one in place of one that ended."""
        await self.destination.stop()
        Path(self.destination.qmp).unlink(missing_ok=True)
        await self.destination.start(
            self.machine.arguments(self.image, self.destination.console, destination=True),
            incoming=True,
        )

    async def start_source(self) -> None:
        """Start the source; return once its guest's heart beats."""
        await self.source.start(
            self.machine.arguments(self.image, self.source.console), incoming=False
        )
        await self.beats(self.source, 3)

    async def stop(self) -> None:
        """End both, whichever VMs they are by now."""
        await self.destination.stop()
        await self.source.stop()

    @staticmethod
    async def beats(vm: Vm, more: int, timeout_s: float = 30.0) -> None:
        """Wait until the console of a VM has shown so many heartbeats more."""

        def count() -> int:
            return vm.console.read_bytes().count(b"\n")

        wanted = count() + more
        deadline = asyncio.get_running_loop().time() + timeout_s
        while count() < wanted:
            vm.check_alive()
            assert asyncio.get_running_loop().time() < deadline, f"{vm.name}: no heartbeat"
            await asyncio.sleep(0.01)

    async def check_heartbeat_unbroken(self) -> None:
        """Check that the guest goes on at the destination where it stopped at the source."""
        await self.beats(self.destination, 3)
        both = self.source.console.read_bytes() + self.destination.console.read_bytes()
        beats = heartbeats(both)
        assert beats == list(range(len(beats)))

    @staticmethod
    async def state(vm: Vm) -> str:
        """The run state of a VM, over a connection of its own."""
        qmp = await Qmp.connect(vm.name, vm.qmp)
        try:
            return await qmp.run_state()
        finally:
            await qmp.close()

    @staticmethod
    def traces(vm: Vm) -> list[str]:
        """What of ours is still in a QEMU process: userfaultfds, a tracer, protected memory."""
        found = []
        for fd in Path(f"/proc/{vm.pid}/fd").iterdir():
            try:
                target = str(fd.readlink())
            except FileNotFoundError:  # closed meanwhile
                continue
            if "userfaultfd" in target:
                found.append(f"descriptor {fd.name} is {target}")
        for line in Path(f"/proc/{vm.pid}/status").read_text().splitlines():
            if line.startswith("TracerPid:") and line.split()[1] != "0":
                found.append(line)
        # "uw": the mapping is registered for userfaultfd write-protection
        for line in Path(f"/proc/{vm.pid}/smaps").read_text().splitlines():
            if line.startswith("VmFlags:") and {"uw", "um", "ui"} & set(line.split()):
                found.append(line)
        return found


@asynccontextmanager
async def pair(machine: Machine | None = None, *, start: bool = True) -> AsyncIterator[Pair]:
    """Start a source with a running guest, and a destination; end both afterwards."""
    machine = machine or Machine()
    require(None if shutil.which(machine.qemu[0]) else f"{machine.qemu[0]} is not installed")
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(RunDirectory())
        image = directory / "guest.img"
        image.write_bytes(boot_image(machine.workload))
        vms = Pair(machine, directory, image)
        stack.push_async_callback(vms.stop)
        if start:
            await vms.start_destination()
            await vms.start_source()
        yield vms
