"""A guest on its journey: the QEMU that it runs in, and the next one, where it is to arrive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.guests.guests import Guest
from bench.guests.pulse import Pulse, Side
from bench.hosts.twohosts import Host
from bench.moving.ways import GuestBroken
from migrator.aio import in_thread, settle
from migrator.qemu.process import Vm
from migrator.qemu.qmp import Qmp

_BOOT_S = 120.0  # until a Linux beats, on a slow machine
_GOES_ON_S = 20.0


@dataclass(frozen=True)
class Seat:
    """A QEMU: the guest is in it, or may come.

    :ivar host: where it runs
    :ivar number: of the side, to its pulse
    """

    vm: Vm
    host: Host
    side: Side
    number: int

    @asynccontextmanager
    async def qmp(self) -> AsyncIterator[Qmp]:
        """A connection to it; nobody else may have one meanwhile."""
        qmp = await Qmp.connect(self.vm.name, self.vm.qmp)
        try:
            yield qmp
        finally:
            await settle(qmp.close())

    async def leave(self) -> None:
        """End it, and remove its memory."""
        await self.vm.stop()
        self.side.ram.unlink(missing_ok=True)


class Journey:
    """The guest.

    :param directory: on tmpfs, for its memory and all else, and for nobody else
    :ivar here: where it runs now
    :ivar pulse: what it says, wherever it is
    """

    here: Seat

    def __init__(self, guest: Guest, directory: Path) -> None:
        self.guest = guest
        self._directory = directory
        self._seats = 0
        self.pulse = Pulse()

    @asynccontextmanager
    async def begun(self, host: Host) -> AsyncIterator[None]:
        """Boot it there; in the end end it, wherever it is.

        :raise GuestBroken: it does not come up
        """
        await in_thread(self.guest.prepare, self._directory)
        self.pulse.start()
        try:
            self.here = await self._seat(host)
            try:
                await self.beats(3, _BOOT_S)
                if self.guest.progress_at is None:  # it has to make ready before it works
                    await until(self._works, "the guest does nothing", _BOOT_S)
                yield
            finally:
                await settle(self.here.leave())
        finally:
            self.pulse.stop()

    @asynccontextmanager
    async def destination(self, host: Host) -> AsyncIterator[Seat]:
        """A QEMU that waits for the guest; it is ended where the guest did not arrive."""
        seat = await self._seat(host, incoming=True)
        try:
            yield seat
        finally:
            if self.here is not seat:
                await settle(seat.leave())

    async def arrived(self, seat: Seat) -> None:
        """It runs there from now on; what it left is ended."""
        left, self.here = self.here, seat
        await settle(left.leave())

    async def beats(self, more: int, limit_s: float = _GOES_ON_S) -> None:
        """Wait for so many heartbeats more of where it is.

        :raise GuestBroken: they do not come
        """
        wanted = self.pulse.beats(self.here.number) + more
        await until(
            lambda: self.pulse.beats(self.here.number) >= wanted,
            "the guest does not go on",
            limit_s,
        )

    def _works(self) -> bool:
        now = time.monotonic()
        return self.pulse.work_per_s(now - 1, now) > 0

    async def _seat(self, host: Host, *, incoming: bool = False) -> Seat:
        self._seats += 1
        stem = self._directory / str(self._seats)
        side = Side(stem.with_suffix(".serial"), stem.with_suffix(".ram"), self.guest.progress_at)
        seat = Seat(Vm(stem.name, self._directory), host, side, self.pulse.listen(side))
        command = self.guest.command(self._directory, side.ram, side.console)
        try:
            await seat.vm.start(
                ["nsenter", f"--net={host.path}", "--", *command], incoming=incoming
            )
        except BaseException:
            await settle(seat.leave())
            raise
        return seat


async def until(happened: Callable[[], bool], problem: str, limit_s: float) -> None:
    """Wait for something.

    :raise GuestBroken: it does not happen
    """
    deadline = time.monotonic() + limit_s
    while not happened():
        if time.monotonic() > deadline:
            raise GuestBroken(problem)
        await asyncio.sleep(0.01)
