"""What the tests of watched VMs share, here and in the lab."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from migrator.guest.workload import PAGE_SIZE, Workload
from migrator.tracking.strategies import COARSE
from migrator.watch.sample import CELLS, Sight
from migrator.watch.watch import Options, watch
from tests.live.vms import MIB, Machine, Pair, pair
from tests.processes import is_running
from tracker.answered.uffdsync import UffdSync
from tracker.sources.contenthash import ContentHash
from tracker.sources.softdirty import SoftDirty
from tracker.sources.uffd import UffdAsync

MIGRATOR = str(Path(sys.executable).with_name("migrator"))
SPOT = 160 * MIB
"""Offset of RAM that neither the guest nor its firmware writes."""
_EXACT = (UffdAsync.name, SoftDirty.name, ContentHash.name, COARSE)
"""Those that report pages, not chunks."""
OTHER_PAGES = 32
"""As many as firmware and stack may write."""
STEADY = Workload(working_set_bytes=64 * MIB, start=32 * MIB, pages_per_s=1000)
BRIEF = Options(seconds=1.2, interval_s=0.4)
LONGER = Options(seconds=3, interval_s=0.4)
Body = Callable[[Pair], Coroutine[Any, Any, None]]


def with_source(body: Body, machine: Machine | None = None) -> None:
    async def run() -> None:
        async with pair(machine or Machine(workload=STEADY), start=False) as vms:
            await vms.start_source()
            await body(vms)
            if is_running(vms.source.pid):
                await goes_on(vms)

    asyncio.run(run())


async def goes_on(vms: Pair) -> None:
    assert vms.traces(vms.source) == []
    if await vms.state(vms.source) == "running":
        await vms.beats(vms.source, 3)


async def seen(
    vms: Pair, options: Options = BRIEF, each: Callable[[Sight], object] = lambda _: None
) -> list[Sight]:
    """Watch, for longer where the machine is too slow for two looks; everything that was told."""
    found: list[Sight] = []
    seconds = options.seconds

    def show(sight: Sight) -> None:
        found.append(sight)
        each(sight)

    while len(found) < 2:
        found.clear()
        await watch(vms.source.qmp, replace(options, seconds=seconds), show)
        assert seconds is not None
        assert len(found) > 1 or seconds < 60, "not two looks in a minute"
        seconds *= 3
    return found


def cells_of(workload: Workload, memory: int) -> list[int]:
    size = memory // CELLS
    return list(range(workload.start // size, -(-workload.end // size)))


def heat(sight: Sight, block: int = 0) -> NDArray[np.float64]:
    return np.array(sight.to_json()["blocks"][block]["heat"])


def hot(sight: Sight, block: int = 0) -> list[int]:
    """Cells that are clearly warmer than what firmware and stack are written."""
    cells = heat(sight, block)
    return [int(cell) for cell in np.flatnonzero(cells > max(float(cells.max()) / 20, 1e-4))]


def _reported_by(strategy: str, sight: Sight) -> float:
    name = f"{UffdSync.name}, compared" if strategy == COARSE else strategy
    return sight.dirty_pages_per_s[name] * sight.over_s


def sees_the_working_set(strategy: str, machine: Machine | None = None) -> None:
    """At full speed all of it is written, and so found, in each interval; and little else is."""
    workload = Workload(working_set_bytes=8 * MIB, start=128 * MIB)
    machine = replace(machine or Machine(), workload=workload)
    pages = workload.working_set_bytes // PAGE_SIZE

    async def body(vms: Pair) -> None:
        sights = await seen(vms, replace(LONGER, strategy=strategy))
        for sight in sights:
            assert sight.tracker == strategy
            assert pages * 0.9 <= _reported_by(strategy, sight)
        assert hot(sights[-1]) == cells_of(workload, 256 * MIB)
        if strategy in _EXACT:
            assert _reported_by(strategy, sights[-1]) <= pages + OTHER_PAGES

    with_source(body, machine)
