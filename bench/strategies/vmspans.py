"""A guest that runs for a span at a time, and stands in between."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from math import inf, isnan
from pathlib import Path
from typing import Any

import numpy as np

from bench.guests.guests import Guest
from bench.guests.pulse import Pulse, Side
from migrator.errors import VmError
from migrator.qemu.process import Vm
from migrator.qemu.qmp import Qmp
from tracker.memory.ram import RamBlock, find_block

_START_S = 180.0  # until a Linux has made ready, on a slow machine
_EVENT_S = 30.0
_BEATS = 3
_COUNTER = struct.Struct("<Q")


@dataclass(frozen=True)
class Span:
    """What a guest did while it ran.

    :ivar s: from the moment QEMU let it go on to the moment QEMU stopped it, by QEMU's clock
    :ivar work: units of its work; ``None`` if it told too little
    :ivar longest_silence_ms: without a heartbeat
    """

    s: float
    work: float | None
    longest_silence_ms: float

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return dict(vars(self))


class Spans:
    """The guest; it runs at first.

    :ivar pid: QEMU's process
    :ivar block: the RAM
    """

    def __init__(self, qmp: Qmp, block: RamBlock, ram: Path, guest: Guest, pulse: Pulse) -> None:
        self.pid, self.block = qmp.pid, block
        self._qmp, self._ram, self._guest, self._pulse = qmp, ram, guest, pulse

    async def run(self) -> float:
        """Let it run; return when it did, by QEMU's clock, in seconds."""
        return await self._turn("cont", "RESUME")

    async def halt(self) -> float:
        """Let it stand: neither it nor its devices write any more; return since when."""
        return await self._turn("stop", "STOP")

    async def _turn(self, command: str, event: str) -> float:
        since = self._qmp.mark()
        await self._qmp.execute(command)
        found = await self._qmp.wait_for(lambda e: e.name == event, since=since, timeout_s=_EVENT_S)
        return found.at

    async def span(self, meanwhile: Callable[[], Awaitable[None]]) -> Span:
        """Let a guest that stands run, and stand again when ``meanwhile`` has returned."""
        before = self._counter()
        since = await self.run()
        await meanwhile()
        until = await self.halt()
        after = self._counter()
        if before is None or after is None:
            rate = self._pulse.work_per_s(since, until)
            work = None if isnan(rate) else rate * (until - since)
        else:
            work = after - before
        silence_s = self._pulse.longest_silence_s(since, until)
        return Span(until - since, work, silence_s * 1000)

    def check(self) -> None:
        """Check that the guest, which stands, is what it would be if nobody had looked at it.

        :raise BeatsBroken, VmError: it is not
        """
        self._pulse.check_beats()
        ram = np.memmap(self._ram, np.uint8, "r")
        if problem := self._guest.problem(ram, bytes(self._pulse.heard[0])):
            raise VmError("guest", problem)

    def _counter(self) -> int | None:
        """The guest's own counter of work, exact as long as it stands."""
        if self._guest.progress_at is None:
            return None
        with self._ram.open("rb") as ram:
            ram.seek(self._guest.progress_at)
            return int(_COUNTER.unpack(ram.read(_COUNTER.size))[0])


@asynccontextmanager
async def running(guest: Guest, directory: Path, prepared: Path) -> AsyncIterator[Spans]:
    """Start a guest; end it afterwards.

    :param directory: an empty one, on tmpfs
    :param prepared: where the guest's images are
    :raise VmError: it does not start
    """
    console, ram = directory / "console", directory / "ram"
    async with AsyncExitStack() as stack:
        pulse = Pulse(Side(console, ram, guest.progress_at))
        pulse.start()
        stack.callback(pulse.stop)
        vm = Vm("guest", directory)
        stack.push_async_callback(vm.stop)
        await vm.start(guest.command(prepared, ram, console), incoming=False)
        await _until(lambda: pulse.beats(0) >= _BEATS, vm, "no heartbeat")
        if guest.progress_at is None:  # it has to make ready, and then says what it has done
            await _until(lambda: pulse.work_per_s(0, inf) > 0, vm, "nothing done")
        qmp = await Qmp.connect(vm.name, vm.qmp)
        stack.push_async_callback(qmp.close)
        (backend,) = await qmp.memory_backends()
        block = find_block(qmp.pid, backend.name, backend.size, backend.mem_path)
        yield Spans(qmp, block, ram, guest, pulse)


async def _until(happened: Callable[[], bool], vm: Vm, problem: str) -> None:
    deadline = time.monotonic() + _START_S
    while not happened():
        vm.check_alive()
        if time.monotonic() > deadline:
            raise VmError(vm.name, f"{problem} in {_START_S:g} s")
        await asyncio.sleep(0.02)
