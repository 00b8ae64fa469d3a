"""The workload guest with an emulated ``edu`` device that writes RAM by DMA, under TCG."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from migrator.guest.edu import BAR, NO_DEVICE, SOURCE
from migrator.guest.workload import MIB, PAGE_SIZE, Workload, check_dma, check_walk, heartbeats
from tests.live.dma import Guest, execute, started
from tests.live.moving import Ram, TwoKinds, move
from tests.live.qemus import Qemu, each_qemu
from tests.live.tracked import pages
from tests.live.vms import Machine, pair
from tracker.sources.uffd import UffdAsync

pytestmark = pytest.mark.live

WORKLOAD = Workload(working_set_bytes=8 * MIB, dma_pages=4)
RAM_BYTES = 128 * MIB
EDU = ("-device", "edu")
STACK = BAR // PAGE_SIZE


async def stopped(guest: Guest) -> int:
    """Stop it, and its device with it; check it; return how many pages the device has written."""
    await guest.execute("stop")
    return guest.check()


def with_guest(
    tmpfs: Path, body: Callable[[Guest], Coroutine[Any, Any, None]], **fields: Any
) -> None:
    defaults: dict[str, Any] = {"memory": RAM_BYTES, "workload": WORKLOAD, "extra": EDU}
    machine = Machine(**{**defaults, "ram_path": str(tmpfs / "ram"), **fields})

    async def run() -> None:
        async with started(machine) as guest:
            await body(guest)

    asyncio.run(run())


@pytest.mark.parametrize("machine", ["q35", "pc"])
@each_qemu
def test_device_writes_beside_the_walk(tmpfs: Path, qemu: Qemu, machine: str) -> None:
    async def body(guest: Guest) -> None:
        seen = 0
        for _ in range(2):
            await guest.until_written(WORKLOAD.dma_pages + 1)
            await guest.until_beats(5)
            written = await stopped(guest)
            assert written > seen + WORKLOAD.dma_pages
            assert check_walk(guest.ram, WORKLOAD).edges == 1
            seen = written
            await guest.execute("cont")
        for page in (WORKLOAD.dma_start - PAGE_SIZE, WORKLOAD.dma_end):
            assert not guest.ram[page : page + PAGE_SIZE].any()

    with_guest(tmpfs, body, qemu=qemu.require(), machine=machine)


def test_it_is_the_device_that_writes(tmpfs: Path) -> None:
    """One with 24 address lines wraps at 16 MiB, where no CPU would."""
    workload = Workload(MIB, start=40 * MIB, dma_pages=2, dma_start=24 * MIB)

    async def body(guest: Guest) -> None:
        wrapped = guest.ram[8 * MIB : 8 * MIB + 2 * PAGE_SIZE]
        await guest.until(lambda: bool(wrapped[PAGE_SIZE]), "a page 16 MiB lower")
        await guest.execute("stop")
        assert wrapped[: 2 * PAGE_SIZE : PAGE_SIZE].all()
        assert not guest.region.any()

    with_guest(tmpfs, body, workload=workload, extra=("-device", "edu,dma_mask=0xffffff"))


@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_a_guest_without_the_device_says_so(tmpfs: Path, machine: str) -> None:
    async def body(guest: Guest) -> None:
        await guest.until(lambda: b"\n" in guest.console, "a line on the console")
        assert guest.console == NO_DEVICE + b"\n"
        with pytest.raises(ValueError, match="found no edu device"):
            heartbeats(guest.console)
        await guest.execute("stop")
        assert not guest.region.any()
        assert not guest.ram[WORKLOAD.start : WORKLOAD.end].any()

    with_guest(tmpfs, body, machine=machine, extra=())


def test_nothing_is_written_unasked(tmpfs: Path) -> None:
    """The device is there, but the guest is not to use it: only its walk and stack are written."""
    workload = Workload(working_set_bytes=8 * MIB)

    async def body(guest: Guest) -> None:
        await guest.until_beats(10)
        await guest.execute("stop")
        before = np.array(guest.ram).reshape(-1, PAGE_SIZE)
        await guest.execute("cont")
        await guest.until_beats(50)
        await guest.execute("stop")
        after = np.array(guest.ram).reshape(-1, PAGE_SIZE)
        changed = set(np.flatnonzero((before != after).any(axis=1)).tolist())
        assert changed
        assert changed <= {STACK, *range(workload.start // PAGE_SIZE, workload.end // PAGE_SIZE)}

    with_guest(tmpfs, body, workload=workload)


def test_all_that_is_written_is_the_walk_the_region_and_the_driver(tmpfs: Path) -> None:
    async def body(guest: Guest) -> None:
        await guest.until_written(1)
        await stopped(guest)
        before = np.array(guest.ram).reshape(-1, PAGE_SIZE)
        await guest.execute("cont")
        await guest.until_written(2 * WORKLOAD.dma_pages)
        await stopped(guest)
        after = np.array(guest.ram).reshape(-1, PAGE_SIZE)
        changed = set(np.flatnonzero((before != after).any(axis=1)).tolist())
        region = set(range(WORKLOAD.dma_start // PAGE_SIZE, WORKLOAD.dma_end // PAGE_SIZE))
        working_set = range(WORKLOAD.start // PAGE_SIZE, WORKLOAD.end // PAGE_SIZE)
        own = {STACK, SOURCE // PAGE_SIZE}
        assert region | own <= changed
        assert changed <= {*region, *own, *working_set}

    with_guest(tmpfs, body)


def test_a_reset_finds_the_device_busy_and_starts_again(tmpfs: Path) -> None:
    workload = Workload(working_set_bytes=MIB, dma_pages=2)

    async def body(guest: Guest) -> None:
        await guest.until(lambda: guest.passes[0] >= 4, "pass 4")
        await guest.execute("system_reset")
        await guest.until(lambda: guest.passes == [2, 1], "pass 2 after the reset")
        await guest.execute("stop")
        assert check_dma(guest.ram, workload) >= 3

    with_guest(tmpfs, body, workload=workload)


def test_write_protection_sees_what_an_emulated_device_writes(tmpfs: Path) -> None:
    """QEMU writes for it, through its own page tables; a device passed through needs no QEMU."""

    async def body(guest: Guest) -> None:
        await guest.until_written(1)
        block = Ram(guest.vms.source, guest.vms.machine).block
        uffd = UffdAsync(guest.vms.source.pid, [block])
        first = await stopped(guest)
        uffd.start()
        try:
            await guest.execute("cont")
            await guest.until_written(WORKLOAD.dma_pages - 1)
            last = await stopped(guest)
            dirty = pages(uffd.collect()[block.name])
            assert last > first
            written = {number % WORKLOAD.dma_pages for number in range(first, last)}
            at = WORKLOAD.dma_start // PAGE_SIZE
            assert {page - at for page in dirty.tolist()} & set(
                range(WORKLOAD.dma_pages)
            ) == written
            assert not uffd.collect()[block.name].any()
        finally:
            uffd.stop()

    with_guest(tmpfs, body)


def test_ram_moves_while_an_emulated_device_writes_it(tmpfs: Path) -> None:
    """QEMU does not migrate an ``edu``: the guest's heart and walk go on, its device is gone."""
    ram, arrived = tmpfs / "ram", tmpfs / "arrived"
    machine = TwoKinds(
        memory=RAM_BYTES,
        workload=WORKLOAD,
        extra=EDU,
        ram_path=str(ram),
        destination_ram_path=str(arrived),
    )

    async def body() -> None:
        async with pair(machine) as vms:
            guest = Guest(vms, ram)
            await guest.until_written(WORKLOAD.dma_pages)
            await move(vms)
            await vms.check_heartbeat_unbroken()
            destination = np.memmap(arrived, dtype=np.uint8, mode="r")
            await execute(vms.destination, "stop")
            check = check_walk(destination, WORKLOAD)
            assert check.ok, check.problem
            written = check_dma(guest.ram, WORKLOAD)
            assert written >= WORKLOAD.dma_pages
            assert check_dma(destination, WORKLOAD) == written

    asyncio.run(body())
