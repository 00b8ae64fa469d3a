"""What happens to pages while they are sent: written, zeroed, discarded, and the guest reset.

And that each of these would be noticed, or lost, without the part that takes care of it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from migrator import Failed, migrate
from migrator.guest.workload import Workload, heartbeats
from migrator.qemu.process import Vm
from migrator.report.phases import Phase
from tests.live.monitors import Monitor
from tests.live.moving import VERIFIED, Ram, check_still_at_source, move, once
from tests.live.qemus import QEMUS, Qemu, each_qemu
from tests.live.vms import MIB, Machine, Pair, pair
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.memory.ram import RamBlock
from tracker.sources.holes import Holes
from tracker.sources.uffd import UffdAsync

pytestmark = pytest.mark.live

SPOT = 64 * MIB
"""Offset of RAM that neither the guest nor its firmware writes."""
LENGTH = 4 * MIB


class Silent(UffdAsync):
    """A tracker that drops what it collected."""

    def _scan_into(
        self, dirty: DirtyBitmap, block: RamBlock, first: int, last: int, *, protect: bool = True
    ) -> None:
        super()._scan_into(DirtyBitmap.empty(dirty.npages), block, first, last, protect=protect)


class SilentHoles(Holes):
    """Reports no page that was discarded."""

    def collect(self, written: PageSet | None = None) -> PageSet:
        return PageSet.empty(super().collect(written).blocks)


def with_pair(
    body: Callable[[Pair, Ram, Ram], Coroutine[Any, Any, None]], machine: Machine | None = None
) -> None:
    """Run a test with the RAM of both sides; the source has data at ``SPOT``."""
    machine = machine or Machine()

    async def run() -> None:
        async with pair(machine) as vms:
            source = Ram(vms.source, machine)
            source.write(SPOT, b"data" * (LENGTH // 4))
            await body(vms, source, Ram(vms.destination, machine))

    asyncio.run(run())


async def fails(vms: Pair, action: Callable[[], object]) -> None:
    """Check that verifying finds differences, and that the VM then goes on where it was."""
    with pytest.raises(Failed, match="pages differ; the destination was not run") as caught:
        await migrate(
            vms.source.qmp,
            vms.destination.qmp,
            VERIFIED,
            watch=once(Phase.ROUNDS, action),
        )
    assert caught.value.exit_code == 1
    assert caught.value.phase == Phase.VERIFY.value
    assert caught.value.report is not None
    assert caught.value.report.status == "failed"
    assert caught.value.report.mismatched_pages
    await check_still_at_source(vms)
    await vms.start_destination()
    await vms.state(vms.destination)  # it answers once its RAM is there


def test_without_the_tracker_verifying_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        with monkeypatch.context() as patched:
            patched.setattr("migrator.tracking.strategies.UffdAsync", Silent)
            await fails(vms, lambda: None)
        await move(vms)
        await vms.check_heartbeat_unbroken()

    with_pair(body)


@each_qemu
def test_pages_discarded_after_they_were_sent(qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        def discard() -> None:
            assert not destination.is_hole(SPOT, LENGTH)
            source.discard(SPOT, LENGTH)

        with monkeypatch.context() as patched:
            patched.setattr("migrator.tracking.sources.Holes", SilentHoles)
            await fails(vms, discard)

        source.write(SPOT, b"more" * (LENGTH // 4))
        destination = Ram(vms.destination, vms.machine)
        await move(vms, once(Phase.ROUNDS, discard))
        assert source.is_hole(SPOT, LENGTH)
        assert destination.is_hole(SPOT, LENGTH)
        assert destination.read(SPOT, LENGTH) == bytes(LENGTH)
        await vms.check_heartbeat_unbroken()

    with_pair(body, Machine(qemu=qemu.require()))


def test_pages_discarded_on_a_disk(disk: Path) -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        await move(vms, once(Phase.ROUNDS, lambda: source.discard(SPOT, LENGTH)))
        assert source.is_hole(SPOT, LENGTH)
        assert destination.is_hole(SPOT, LENGTH)

    with_pair(body, Machine(ram_path=str(disk)))


def test_huge_pages_discarded(hugetlbfs: Path) -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        await vms.beats(vms.source, 20)  # by now the guest has touched all that it ever will
        held = source.allocated()

        def discard() -> None:
            assert destination.allocated() == held
            source.discard(SPOT, LENGTH)

        await move(vms, once(Phase.ROUNDS, discard))
        assert source.allocated() == destination.allocated() == held - LENGTH
        assert destination.read(SPOT, LENGTH) == bytes(LENGTH)

    with_pair(body, Machine(memory=128 * MIB, ram_path=str(hugetlbfs)))


def test_pages_discarded_and_written_again() -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        def discard_and_write() -> None:
            source.discard(SPOT, LENGTH)
            source.write(SPOT + 2 * 4096, b"new")

        await move(vms, once(Phase.ROUNDS, discard_and_write))
        assert destination.is_hole(SPOT, 2 * 4096)
        assert destination.read(SPOT + 2 * 4096, 4096) == b"new".ljust(4096, b"\0")

    with_pair(body)


def test_pages_zeroed_after_they_were_sent() -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        def zero() -> None:
            assert destination.read(SPOT + LENGTH - 4, 4) == b"data"
            source.write(SPOT, bytes(LENGTH))

        await move(vms, once(Phase.ROUNDS, zero))
        assert destination.read(SPOT, LENGTH) == bytes(LENGTH)

    with_pair(body)


def test_pages_discarded_while_as_many_are_filled_by_reading() -> None:
    """The number of pages in the file stays the same, and no page was written."""

    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        def discard_and_read() -> None:
            before = source.allocated()
            source.discard(SPOT, LENGTH)
            assert source.is_hole(SPOT + LENGTH, LENGTH)
            assert source.read(SPOT + LENGTH, LENGTH) == bytes(LENGTH)
            assert source.allocated() == before

        await move(vms, once(Phase.ROUNDS, discard_and_read))
        assert destination.read(SPOT, LENGTH) == bytes(LENGTH)

    with_pair(body)


def test_pages_discarded_and_filled_again_by_reading() -> None:
    """They are zeros in the file, not holes; and reading is not writing."""

    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        def discard_and_read() -> None:
            source.discard(SPOT, LENGTH)
            assert source.read(SPOT, LENGTH) == bytes(LENGTH)

        await move(vms, once(Phase.ROUNDS, discard_and_read))
        assert destination.read(SPOT, LENGTH) == bytes(LENGTH)

    with_pair(body)


FIRST_BEAT = b"00000000\n"

# -- the guest goes through a reset -------------------------------------------------------------


@each_qemu
@pytest.mark.parametrize("phase", [Phase.COPY, Phase.ROUNDS])
def test_a_guest_that_is_reset_meanwhile(qemu: Qemu, phase: Phase) -> None:
    async def body() -> None:
        async with pair(Machine(qemu=qemu.require()), start=False) as vms:
            second = str(vms.directory / "second")
            vms.machine = replace(
                vms.machine, source_extra=["-qmp", f"unix:{second},server=on,wait=off"]
            )
            await vms.start_destination()
            await vms.start_source()
            with Monitor(Path(second)) as administrator:

                def reset() -> None:
                    """It is over before the guest stands, where a reset would be refused.

                    Firmware may reset a second time by itself: the guest is waited for.
                    """
                    administrator.execute("system_reset")
                    deadline = time.monotonic() + 60
                    while vms.source.console.read_bytes().count(FIRST_BEAT) < 2:
                        assert time.monotonic() < deadline, "it does not boot"
                        time.sleep(0.01)

                await move(vms, once(phase, reset))
            await vms.beats(vms.destination, 3)
            consoles = vms.source.console.read_bytes() + vms.destination.console.read_bytes()
            # a line may be cut by the reset; each boot begins with number 0
            assert consoles.count(FIRST_BEAT) == 2
            beats = heartbeats(consoles[consoles.rindex(FIRST_BEAT) :])
            assert beats == list(range(len(beats)))

    asyncio.run(body())


# -- again and again ----------------------------------------------------------------------------


@pytest.mark.thorough
def test_twenty_migrations_in_a_row(tmpfs: Path) -> None:
    """The guest writes as fast as it can, and goes to and fro between old and new QEMUs."""
    machine = Machine(
        memory=128 * MIB,
        workload=Workload(working_set_bytes=8 * MIB),
        ram_path=str(tmpfs),
        machine="pc-q35-7.2",  # old enough for all of them
    )

    async def body() -> None:
        async with pair(machine) as vms, AsyncExitStack() as stack:
            consoles = b""
            open_files = set()
            for number, qemu in zip(range(20), itertools.cycle(QEMUS), strict=False):
                await move(vms)
                open_files.add(len(os.listdir("/proc/self/fd")))
                assert not any(tmpfs.iterdir())
                await vms.source.stop()
                consoles += vms.source.console.read_bytes()
                vms.source = vms.destination
                vms.destination = Vm(f"destination-{number}", vms.directory)
                stack.push_async_callback(vms.destination.stop)
                vms.machine = replace(machine, qemu=qemu.require())
                await vms.start_destination()
            await vms.beats(vms.source, 3)
            beats = heartbeats(consoles + vms.source.console.read_bytes())
            assert beats == list(range(len(beats)))
            assert len(open_files) == 1

    asyncio.run(body())
