"""A VM whose guest lets an ``edu`` device write its RAM by DMA, and what can be seen of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from migrator.errors import QmpUnreachable
from migrator.guest.edu import PAGE_SIZE
from migrator.guest.workload import Workload, check_dma, check_walk, heartbeats
from migrator.qemu.process import Vm
from migrator.qemu.qmp import Qmp
from tests.live.vms import Machine, Pair, pair

TIMEOUT_S = 300.0


class Guest:
    """A guest that has been started, and its RAM as a file of a known name.

    :ivar vms: its VM is the source of these; nobody is connected to it between two calls
    :ivar ram: shape (bytes,), from guest-physical address 0 on
    """

    def __init__(self, vms: Pair, ram: Path) -> None:
        self.vms = vms
        self.ram: NDArray[np.uint8] = np.memmap(ram, dtype=np.uint8, mode="r")

    @property
    def workload(self) -> Workload:
        return self.vms.machine.workload

    @property
    def console(self) -> bytes:
        return self.vms.source.console.read_bytes()

    @property
    def region(self) -> NDArray[np.uint8]:
        """What the device is to write."""
        return self.ram[self.workload.dma_start : self.workload.dma_end]

    @property
    def passes(self) -> list[int]:
        """The first word of each page of the region, unchecked: the guest may run."""
        return [int(word) for word in self.region.view("<u4")[:: PAGE_SIZE // 4]]

    async def execute(self, command: str, **arguments: Any) -> Any:
        return await execute(self.vms.source, command, **arguments)

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            self.vms.source.check_alive()
            assert time.monotonic() < deadline, f"not in {TIMEOUT_S:g} s: {what}"
            await asyncio.sleep(0.01)

    async def until_beats(self, more: int) -> None:
        """Wait for so many heartbeats more; fail if the guest says anything else."""
        wanted = len(heartbeats(self.console)) + more
        await self.until(lambda: len(heartbeats(self.console)) >= wanted, f"{more} heartbeats")

    async def until_written(self, more: int) -> None:
        """Wait until the device has written so many pages more."""
        wanted = sum(self.passes) + more
        await self.until(lambda: sum(self.passes) >= wanted, f"{more} pages of the device's")

    def check(self) -> int:
        """Check all that holds while guest and device rest; return how many pages it has written.

        The guest must have beaten, walked, and not been reset.
        """
        numbers = heartbeats(self.console)
        assert numbers
        assert numbers == list(range(len(numbers)))
        walk = check_walk(self.ram, self.workload)
        assert walk.ok, walk.problem
        assert walk.edges or walk.value
        return check_dma(self.ram, self.workload)


async def execute(vm: Vm, command: str, **arguments: Any) -> Any:
    qmp = await Qmp.connect(vm.name, vm.qmp, timeout_s=TIMEOUT_S)
    try:
        return await qmp.execute(command, **arguments)
    finally:
        await qmp.close()


@asynccontextmanager
async def started(machine: Machine) -> AsyncIterator[Guest]:
    """Start a VM, but do not wait for its guest; end it afterwards.

    :param machine: with a file as ``ram_path``
    """
    async with pair(machine, start=False) as vms:
        arguments = machine.arguments(vms.image, vms.source.console)
        await vms.source.start(arguments, incoming=False, timeout_s=TIMEOUT_S)
        try:
            await execute(vms.source, "query-status")  # no answer before there is RAM
        except QmpUnreachable:
            await asyncio.sleep(1)  # a QEMU that hangs up is about to end, and has said why
            vms.source.check_alive()
            raise
        yield Guest(vms, Path(machine.ram_path))
