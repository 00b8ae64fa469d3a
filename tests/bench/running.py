"""A guest that is measured, in a real QEMU, and what it is seen to do."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.guests.guests import Guest, GuestError
from bench.guests.pulse import Pulse, Side
from migrator.qemu.process import RunDirectory, Vm
from migrator.qemu.qmp import Qmp
from tests.conftest import require
from tracker.memory.ram import find_block
from tracker.sources.uffd import UffdAsync

TIMEOUT_S = 300.0


class Running:
    """One guest, and the QEMU that it is to be moved to if there is one."""

    def __init__(self, guest: Guest, directory: Path) -> None:
        self.guest = guest
        self.directory = directory
        names = ("source", "destination")
        self.vms = [Vm(name, directory) for name in names]
        self.sides = [
            Side(directory / f"{n}.serial", directory / f"{n}.ram", guest.progress_at)
            for n in names
        ]
        self.pulse = Pulse(*self.sides)

    async def start(self, side: int) -> None:
        console, ram = self.sides[side].console, self.sides[side].ram
        await self.vms[side].start(
            self.guest.command(self.directory, ram, console), incoming=side == 1
        )

    async def until(self, happened: Callable[[], bool]) -> None:
        deadline = asyncio.get_running_loop().time() + TIMEOUT_S
        while not happened():
            for vm in self.vms:
                vm.check_alive()
            assert asyncio.get_running_loop().time() < deadline, self.heard()[-200:]
            await asyncio.sleep(0.005)

    async def beats(self, more: int, side: int = 0) -> None:
        wanted = self.pulse.beats(side) + more
        await self.until(lambda: self.pulse.beats(side) >= wanted)

    def ram(self, side: int = 0) -> NDArray[np.uint8]:
        """Its RAM, as it changes."""
        return np.memmap(self.sides[side].ram, np.uint8, "r")

    @contextmanager
    def tracked(self) -> Iterator[UffdAsync]:
        pid, path = self.vms[0].pid, str(self.sides[0].ram)
        tracker = UffdAsync(pid, [find_block(pid, "ram", self.guest.memory, path)])
        tracker.start()
        try:
            yield tracker
        finally:
            tracker.stop()

    def heard(self) -> bytes:
        """What it has said until now."""
        return bytes(self.pulse.heard[0] + self.pulse.heard[1])

    def work(self) -> int:
        """What a Linux guest has said last of its work."""
        found = re.findall(rb"beat \d+ work (\d+)\r\n", self.heard())
        return int(found[-1]) if found else 0

    async def works(self, more: int) -> None:
        wanted = self.work() + more
        await self.until(lambda: self.work() >= wanted)

    async def stopped(self, side: int = 0) -> NDArray[np.uint8]:
        """Stop it; return its RAM as it is then."""
        await self._tell(side, "stop")
        return np.array(self.ram(side))

    async def go_on(self) -> None:
        await self._tell(0, "cont")

    async def _tell(self, side: int, command: str) -> None:
        qmp = await Qmp.connect(self.vms[side].name, self.vms[side].qmp)
        try:
            await qmp.execute(command)
        finally:
            await qmp.close()


@asynccontextmanager
async def running(guest: Guest, *, destination: bool = False) -> AsyncIterator[Running]:
    with RunDirectory() as directory:
        try:
            guest.prepare(directory)
        except GuestError as error:
            require(str(error))
        it = Running(guest, directory)
        it.pulse.start()
        try:
            if destination:
                await it.start(1)
            await it.start(0)
            await it.beats(3)
            yield it
        finally:
            for vm in it.vms:
                await vm.stop()
            it.pulse.stop()


def run(
    guest: Guest, test: Callable[[Running], Awaitable[None]], destination: bool = False
) -> None:
    async def body() -> None:
        async with running(guest, destination=destination) as it:
            await test(it)

    asyncio.run(body())
