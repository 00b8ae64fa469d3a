"""Whole migrations of a real QEMU whose write faults are answered, page by page or in chunks."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence

import pytest

from migrator import Failed, migrate
from migrator.report.phases import Phase
from migrator.tracking import strategies
from tests.live.moving import VERIFIED, check_still_at_source, move, once
from tests.live.qemus import Qemu, each_qemu
from tests.live.vms import Machine, pair
from tracker.answered.uffdsync import UffdSync
from tracker.bits.pageset import PageSet
from tracker.errors import NotTracking
from tracker.memory.ram import RamBlock

pytestmark = pytest.mark.live


@pytest.fixture(autouse=True)
def _nothing_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own way fails its probe."""

    def check() -> None:
        raise NotTracking("uffd", "as in Linux 6.1")

    monkeypatch.setitem(strategies._TRACKERS, "uffd", check)


@each_qemu
@pytest.mark.parametrize("chunk", [4 << 10, 64 << 10])
def test_a_whole_migration(chunk: int, qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    class Chunked(UffdSync):
        def __init__(self, pid: int, blocks: Sequence[RamBlock], **_: int) -> None:
            super().__init__(pid, blocks, chunk=chunk)

    monkeypatch.setattr("migrator.tracking.strategies.UffdSync", Chunked)

    async def run() -> None:
        async with pair(Machine(qemu=qemu.require())) as vms:
            report = await move(vms)
            print(f"{chunk >> 10} KiB: {len(report.rounds)} rounds, {report.downtime_ms} ms down")
            await vms.check_heartbeat_unbroken()

    asyncio.run(run())


def test_one_that_says_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(UffdSync):
        def collect(self) -> PageSet:
            return PageSet.empty(super().collect().blocks)

    monkeypatch.setattr("migrator.tracking.strategies.UffdSync", Silent)

    async def run() -> None:
        async with pair() as vms:
            with pytest.raises(Failed, match="pages differ; the destination was not run"):
                await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED)
            await check_still_at_source(vms)

    asyncio.run(run())


def test_a_server_that_is_killed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(UffdSync):
        def start(self) -> None:
            super().start()
            assert self._server is not None
            servers.append(self._server.pid)

    servers: list[int] = []
    monkeypatch.setattr("migrator.tracking.strategies.UffdSync", Killed)

    async def run() -> None:
        async with pair() as vms:
            watch = once(Phase.ROUNDS, lambda: os.kill(servers[0], signal.SIGKILL))
            with pytest.raises(Failed, match="nobody answers write faults"):
                await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED, watch=watch)
            await check_still_at_source(vms)
            monkeypatch.setattr("migrator.tracking.strategies.UffdSync", UffdSync)
            await move(vms)
            await vms.check_heartbeat_unbroken()

    asyncio.run(run())
