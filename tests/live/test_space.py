"""File systems that fill up while RAM on them is migrated: no guest dies of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from migrator import Aborted, Limits, Options, migrate
from migrator.errors import MigrationError, Refused
from migrator.guest.workload import Workload
from migrator.report.phases import Phase
from tests.live.conftest import mounted
from tests.live.moving import VERIFIED, Ram, TwoKinds, Watch, check_still_at_source, move, once
from tests.live.sending import Road, eventually, on_a_road
from tests.live.vms import MIB, Machine, Pair, pair

pytestmark = pytest.mark.live

TOUCHED_BYTES = 200 * MIB
TOUCHER = Machine(
    memory=256 * MIB,
    # for five seconds it touches memory that it has not touched before
    workload=Workload(working_set_bytes=TOUCHED_BYTES, pages_per_s=10_000),
)
ENDLESS = Options(limits=Limits(downtime_ms=0.001, max_rounds=1_000_000, max_seconds=60.0))
"""A migration that goes on until something else ends it."""
SMALL = Machine(memory=128 * MIB, workload=Workload(working_set_bytes=16 * MIB, pages_per_s=2000))


async def touches_all(vms: Pair, ram: Ram, nbytes: int) -> None:
    """Wait until the guest at the source has touched so much memory, and lives."""
    for _ in range(600):
        if ram.allocated() >= nbytes:
            break
        await vms.beats(vms.source, 3)
    assert ram.allocated() >= nbytes
    await check_still_at_source(vms)


# -- one file system for both sides -------------------------------------------------------------


def test_a_source_that_needs_the_space_gets_it() -> None:
    """Without the copy the guest fits, with it it does not."""

    async def body() -> None:
        with mounted("tmpfs", "size=400M") as shared:
            machine = replace(TOUCHER, ram_path=str(shared))
            async with pair(machine) as vms:
                source, destination = Ram(vms.source, machine), Ram(vms.destination, machine)
                with pytest.raises(Aborted, match=r"share a file system.*MiB are missing") as error:
                    await migrate(vms.source.qmp, vms.destination.qmp, ENDLESS)
                assert error.value.report is not None
                assert error.value.report.status == "aborted"
                assert destination.allocated() == 0
                await touches_all(vms, source, TOUCHED_BYTES)
                await vms.state(vms.destination)  # it still waits, or answers at least

    asyncio.run(body())


def test_two_sides_that_fit_one_file_system() -> None:
    async def body() -> None:
        with mounted("tmpfs", "size=600M") as shared:
            machine = replace(TOUCHER, ram_path=str(shared))
            async with pair(machine) as vms:
                await move(vms)
                await vms.check_heartbeat_unbroken()

    asyncio.run(body())


def test_a_rehearsal_leaves_no_copy_behind() -> None:
    async def body() -> None:
        with mounted("tmpfs", "size=400M") as shared:
            machine = replace(TOUCHER, ram_path=str(shared))
            async with pair(machine) as vms:
                source, destination = Ram(vms.source, machine), Ram(vms.destination, machine)
                rehearsal = replace(VERIFIED, memory_only=True)
                report = await migrate(vms.source.qmp, vms.destination.qmp, rehearsal)
                assert report.mismatched_pages == 0
                assert destination.allocated() == 0
                await touches_all(vms, source, TOUCHED_BYTES)

    asyncio.run(body())


def test_no_room_for_both_is_refused() -> None:
    async def body() -> None:
        with mounted("tmpfs", "size=64M") as shared:
            machine = replace(SMALL, ram_path=str(shared))
            async with pair(machine) as vms:
                await vms.beats(vms.source, 300)  # it has touched all of its working set
                with pytest.raises(Refused, match="share a file system"):
                    await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED)
                await check_still_at_source(vms)

    asyncio.run(body())


# -- the destination's file system fills up -----------------------------------------------------


def filling(directory: Path, left_bytes: int = 0) -> Callable[[], None]:
    """Write a file that takes all of a file system, but for so many bytes."""

    def fill() -> None:
        path = directory / "filler"
        fd = os.open(path, os.O_CREAT | os.O_WRONLY)
        try:
            space = os.fstatvfs(fd)
            os.posix_fallocate(fd, 0, space.f_bavail * space.f_frsize - left_bytes)
        finally:
            os.close(fd)

    return fill


async def ends_well(vms: Pair, destination: Ram, watch: Watch) -> bool:
    """Migrate; check that the guest lives where it ends up, and may touch all of its memory.

    :return: whether it was moved
    """
    failure = ""
    try:
        report = await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED, watch=watch)
    except MigrationError as error:
        failure = str(error)
    if failure:
        assert "MiB are missing" in failure or "No space left" in failure
        await check_still_at_source(vms)
        return False
    assert report.mismatched_pages == 0
    for offset in range(0, destination.block.size, MIB):
        destination.read(offset, MIB)  # which allocates it, or fails where the guest would die
    await vms.beats(vms.destination, 3)
    return True


@pytest.mark.parametrize("left_bytes", [0, 8 * MIB])
@pytest.mark.parametrize("phase", [Phase.ATTACH, Phase.COPY, Phase.ROUNDS, Phase.SWITCHOVER])
@pytest.mark.one_in(3)
def test_a_destination_that_fills_up(phase: Phase, left_bytes: int) -> None:
    """A guest that has not touched all of its memory yet; QEMU itself touches a little to load."""

    async def body() -> None:
        with mounted("tmpfs", "size=300M") as there:
            machine = TwoKinds(
                memory=SMALL.memory, workload=SMALL.workload, destination_ram_path=str(there)
            )
            async with pair(machine) as vms:
                await vms.beats(vms.source, 300)  # it has touched all of its working set
                destination = Ram(vms.destination, replace(machine, ram_path=str(there)))
                watch = once(phase, filling(there, left_bytes))
                assert not await ends_well(vms, destination, watch)
                (there / "filler").unlink()
                assert await vms.state(vms.source) == "running"

    asyncio.run(body())


def test_reserved_memory_is_enough_for_a_guest_that_has_touched_all() -> None:
    """The file system fills up once everything is reserved, and before anything is copied."""

    async def body() -> None:
        with mounted("tmpfs", "size=160M") as there:
            machine = TwoKinds(
                memory=SMALL.memory, workload=SMALL.workload, destination_ram_path=str(there)
            )
            async with pair(machine) as vms:
                source = Ram(vms.source, machine)
                for offset in range(0, SMALL.memory, 4096):
                    if not source.read(offset, 1)[0]:
                        source.write(offset, b"\1")
                destination = Ram(vms.destination, replace(machine, ram_path=str(there)))
                assert await ends_well(vms, destination, once(Phase.COPY, filling(there)))
                await vms.check_heartbeat_unbroken()

    asyncio.run(body())


def test_a_destination_too_small_for_what_the_guest_may_touch() -> None:
    async def body() -> None:
        with mounted("tmpfs", "size=100M") as there:
            machine = TwoKinds(
                memory=SMALL.memory, workload=SMALL.workload, destination_ram_path=str(there)
            )
            async with pair(machine) as vms:
                with pytest.raises(Refused, match=r"has not touched yet.*MiB are missing"):
                    await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED)
                await check_still_at_source(vms)

    asyncio.run(body())


# -- on another host ----------------------------------------------------------------------------


def received_on(there: Path) -> TwoKinds:
    return TwoKinds(memory=SMALL.memory, workload=SMALL.workload, destination_ram_path=str(there))


def touched_there(road: Road, machine: TwoKinds) -> Ram:
    """The destination's RAM."""
    return Ram(road.destination, replace(machine, ram_path=machine.destination_ram_path))


@pytest.mark.parametrize("left_bytes", [0, 8 * MIB])
@pytest.mark.parametrize("phase", [Phase.COPY, Phase.ROUNDS, Phase.SWITCHOVER])
@pytest.mark.one_in(3)
def test_a_host_whose_file_system_fills_up(phase: Phase, left_bytes: int) -> None:
    with mounted("tmpfs", "size=300M") as there:
        machine = received_on(there)

        async def body(road: Road) -> None:
            await Pair.beats(road.vm, 300)  # it has touched all of its working set
            await road.next_receiver()
            with pytest.raises(MigrationError, match=r"MiB are missing|No space left"):
                await road.send(once(phase, filling(there, left_bytes)))
            assert await road.receiver.ended() == 1, road.receiver.said
            assert await road.one_runs() == "source"

        on_a_road(body, machine)


@pytest.mark.thorough
def test_a_host_with_enough_reserved() -> None:
    """A guest that has touched all of its memory; the rest is taken before anything is copied."""
    with mounted("tmpfs", "size=160M") as there:
        machine = received_on(there)

        async def body(road: Road) -> None:
            source = Ram(road.vm, machine)
            for offset in range(0, SMALL.memory, 4096):
                if not source.read(offset, 1)[0]:
                    source.write(offset, b"\1")
            await road.next_receiver()
            report = await road.send(once(Phase.COPY, filling(there)))
            assert (report.status, report.mismatched_pages) == ("completed", 0)
            destination = touched_there(road, machine)
            for offset in range(0, SMALL.memory, MIB):
                destination.read(offset, MIB)
            assert await road.receiver.ended() == 0, road.receiver.said
            assert await road.one_runs() == "destination"

        on_a_road(body, machine)


def test_a_host_that_is_too_small() -> None:
    with mounted("tmpfs", "size=100M") as there:

        async def body(road: Road) -> None:
            await road.next_receiver()
            with pytest.raises(Refused, match=r"has not touched yet.*MiB are missing"):
                await road.send()
            await road.stayed()

        on_a_road(body, received_on(there))


def test_a_host_gives_back_what_it_took() -> None:
    """While its QEMU lives: the other VMs on that host need the space."""
    with mounted("tmpfs", "size=300M") as there:
        machine = received_on(there)

        async def body(road: Road) -> None:
            await road.next_receiver()
            destination = touched_there(road, machine)
            held: list[int] = []
            with destination.file() as fd:
                sending = asyncio.ensure_future(
                    road.send(
                        lambda p: held.append(os.fstat(fd).st_blocks * 512),
                        ENDLESS,
                    )
                )
                await eventually(lambda: any(held), "pages arrive")
                sending.cancel()
                with pytest.raises(Aborted, match="interrupted"):
                    await sending
                assert await road.receiver.ended() == 1, road.receiver.said
                assert max(held) > 0
                assert os.fstat(fd).st_blocks == 0
            assert await road.one_runs() == "source"

        on_a_road(body, machine)
