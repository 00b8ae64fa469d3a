"""Where asynchronous write-protection does not work, write faults are answered instead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from migrator import Refused, migrate
from migrator.tracking import strategies
from tests.live.moving import VERIFIED, check_still_at_source
from tests.live.qemus import Qemu, each_qemu
from tests.live.vms import Machine, pair
from tracker.errors import NotTracking

pytestmark = pytest.mark.live


def fails(reason: str) -> Callable[[], None]:
    def check() -> None:
        raise NotTracking("uffd", reason)

    return check


def test_it_is_chosen_where_the_better_way_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(strategies._TRACKERS, "uffd", fails("as in 6.1"))

    async def body() -> None:
        async with pair() as vms:
            report = await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED)
            assert report.mismatched_pages == 0
            assert report.rounds[1].dirty_pages_by_source["uffd-sync"]
            assert vms.traces(vms.source) == []
            await vms.check_heartbeat_unbroken()

    asyncio.run(body())


@each_qemu
def test_forced(qemu: Qemu) -> None:
    async def body() -> None:
        async with pair(Machine(qemu=qemu.require())) as vms:
            options = replace(VERIFIED, tracker="uffd-sync")
            report = await migrate(vms.source.qmp, vms.destination.qmp, options)
            assert report.mismatched_pages == 0
            assert "uffd" not in report.rounds[1].dirty_pages_by_source
            assert vms.traces(vms.source) == []
            await vms.check_heartbeat_unbroken()

    asyncio.run(body())


def test_refused_where_neither_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("uffd", "uffd-sync"):
        monkeypatch.setitem(strategies._TRACKERS, name, fails("not here"))

    async def body() -> None:
        async with pair() as vms:
            with pytest.raises(Refused, match="not here"):
                await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED)
            await check_still_at_source(vms)

    asyncio.run(body())
