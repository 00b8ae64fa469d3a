"""Another client of the same QEMU, in the middle of a hand-over: one side runs, never two."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from migrator import Failed, MigratorError, Report, migrate
from migrator.guest.workload import Workload
from migrator.migration.switchover import Switchover
from migrator.report.phases import Phase
from tests.live.monitors import Monitor, Monitors, with_monitors
from tests.live.moving import VERIFIED, Ram, Watch, check_still_at_source, move, once
from tests.live.qemus import Qemu, each_qemu
from tests.live.test_unseen import stopping_first
from tests.live.vms import MIB, Machine, Pair, pair
from tracker.inject.held import Held

pytestmark = pytest.mark.live

SMALL = Machine(memory=128 * MIB, workload=Workload(working_set_bytes=16 * MIB))
UNVERIFIED = replace(VERIFIED, verify=False)
BOTH = pytest.mark.parametrize("options", [VERIFIED, UNVERIFIED], ids=["verified", "unverified"])


def beside(
    body: Callable[[Pair, Monitor, Monitor], Awaitable[None]], machine: Machine = SMALL
) -> None:
    """Run a test with a running pair, and a second client at each side."""

    async def all_of_it() -> None:
        with with_monitors(machine) as (with_both, paths):
            async with pair(with_both) as vms:
                with Monitor(paths.source) as source, Monitor(paths.destination) as destination:
                    await body(vms, source, destination)

    asyncio.run(all_of_it())


async def fails(vms: Pair, watch: Watch, words: str, **changes: object) -> None:
    """Migrate, in vain; the source runs on, and can be moved."""
    options = replace(VERIFIED, **changes)  # type: ignore[arg-type]
    with pytest.raises(Failed, match=words):
        await migrate(vms.source.qmp, vms.destination.qmp, options, watch=watch)
    await check_still_at_source(vms)
    await vms.start_destination()
    await move(vms)
    await vms.check_heartbeat_unbroken()


# -- the source is resumed ----------------------------------------------------------------------


@each_qemu
@BOTH
@pytest.mark.parametrize("phase", [Phase.LAST_COLLECT, Phase.LOAD])
def test_the_source_is_resumed_once_its_migration_has_completed(
    phase: Phase, options: object, qemu: Qemu
) -> None:
    async def body(vms: Pair, source: Monitor, _: Monitor) -> None:
        verify = options is VERIFIED
        resume = once(phase, lambda: source.execute("cont"))
        await fails(vms, resume, "source: was resumed", verify=verify)

    beside(body, replace(SMALL, qemu=qemu.require()))


@BOTH
@pytest.mark.parametrize("phase", [Phase.FINAL_SEND, Phase.LAST_COLLECT, Phase.LOAD])
def test_a_source_that_was_stopped_first_is_resumed(
    phase: Phase, options: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(vms: Pair, source: Monitor, _: Monitor) -> None:
        stopping_first(monkeypatch)
        resume = once(phase, lambda: source.execute("cont"))
        await fails(vms, resume, "was resumed", verify=options is VERIFIED)

    beside(body)


@pytest.mark.parametrize("phase", [Phase.LAST_COLLECT, Phase.VERIFY])
def test_the_source_is_resumed_in_a_rehearsal(phase: Phase) -> None:
    async def body(vms: Pair, source: Monitor, _: Monitor) -> None:
        resume = once(phase, lambda: source.execute("cont"))
        await fails(vms, resume, "source: was resumed", memory_only=True)

    beside(body)


def test_the_source_is_resumed_and_stopped_again() -> None:
    """Its run state tells nothing by then; the events do."""

    async def body(vms: Pair, source: Monitor, _: Monitor) -> None:
        def resume_and_stop() -> None:
            source.execute("cont")
            source.execute("stop")

        with pytest.raises(Failed, match="source: was resumed"):
            await migrate(
                *(vms.source.qmp, vms.destination.qmp, UNVERIFIED),
                watch=once(Phase.LOAD, resume_and_stop),
            )
        assert source.state() == "paused"  # as the other client left it
        assert vms.destination.console.read_bytes() == b""

    beside(body)


@each_qemu
def test_the_source_is_reset_while_it_is_handed_over(qemu: Qemu) -> None:
    async def body(vms: Pair, source: Monitor, _: Monitor) -> None:
        with pytest.raises(Failed, match="source: was reset"):
            await migrate(
                *(vms.source.qmp, vms.destination.qmp, UNVERIFIED),
                watch=once(Phase.LAST_COLLECT, lambda: source.execute("system_reset")),
            )
        assert source.state() == "running"
        assert vms.destination.console.read_bytes() == b""

    beside(body, replace(SMALL, qemu=qemu.require()))


# -- the source is resumed at the last moment ---------------------------------------------------


def resumed_at_the_word(source: Monitor) -> Watch:
    """The last look at the source is over; the destination is not told to go yet."""
    return once(Phase.RESUME, lambda: source.execute("cont"))


async def _checksum(ram: Ram) -> int:
    with ram.file() as fd:
        import mmap

        with mmap.mmap(fd, ram.block.size, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
            return zlib.crc32(mapped)


async def _moved_and_resumed(vms: Pair, source: Monitor) -> tuple[Report, bool]:
    """Migrate, with the source resumed at the last moment; return whether it has written since."""
    ram = Ram(vms.source, vms.machine)
    sums: list[int] = []

    async def note() -> None:
        sums.append(await _checksum(ram))

    check = Switchover._check_stood

    async def check_and_note(self: Switchover) -> None:
        await check(self)
        await note()  # the last one is after the last look

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Switchover, "_check_stood", check_and_note)
        report = await migrate(
            *(vms.source.qmp, vms.destination.qmp, VERIFIED), watch=resumed_at_the_word(source)
        )
    await note()
    return report, sums[-1] != sums[-2]


@each_qemu
def test_a_source_that_is_resumed_after_the_last_look_executes_nothing(qemu: Qemu) -> None:
    async def body(vms: Pair, source: Monitor, _: Monitor) -> None:
        report, wrote = await _moved_and_resumed(vms, source)
        assert not wrote
        assert source.state() == "paused"
        assert any("another client resumed the source" in said for said in report.warnings)
        await vms.check_heartbeat_unbroken()

    beside(body, replace(SMALL, qemu=qemu.require()))


def test_without_being_held_it_runs_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side of the test above: it is the holding that keeps the guest from running."""

    async def body(vms: Pair, source: Monitor, _: Monitor) -> None:
        monkeypatch.setattr(Held, "hold", lambda self, timeout_s: None)
        report, wrote = await _moved_and_resumed(vms, source)
        assert wrote
        assert source.state() == "paused"  # it was answered with stop, all the same
        assert report.warnings

    beside(body)


# -- the destination ----------------------------------------------------------------------------


@each_qemu
@pytest.mark.parametrize("phase", [Phase.LAST_COLLECT, Phase.LOAD, Phase.RESUME])
def test_the_destination_is_resumed_before_it_is_told_to_go(phase: Phase, qemu: Qemu) -> None:
    """It lacks the end of its state: it waits, as it did, and runs when it has all of it."""

    async def body(vms: Pair, _: Monitor, destination: Monitor) -> None:
        await move(vms, once(phase, lambda: destination.execute("cont")))
        await vms.check_heartbeat_unbroken()

    beside(body, replace(SMALL, qemu=qemu.require()))


@each_qemu
def test_the_destination_is_reset_when_it_has_loaded(qemu: Qemu) -> None:
    """Its devices have lost the state that they had loaded: it must not run."""

    async def body(vms: Pair, _: Monitor, destination: Monitor) -> None:
        reset = once(Phase.RESUME, lambda: destination.execute("system_reset"))
        await fails(vms, reset, "destination: was reset")

    beside(body, replace(SMALL, qemu=qemu.require()))


@pytest.mark.parametrize("command", ["quit", "migrate_cancel", "stop", "cont", "system_reset"])
@pytest.mark.parametrize("phase", [Phase.STOP, Phase.FINAL_SEND, Phase.DEVICE_STATE])
@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.one_in(4)
def test_one_side_runs_whatever_another_client_does(side: str, phase: Phase, command: str) -> None:
    async def body(vms: Pair, source: Monitor, destination: Monitor) -> None:
        monitor = source if side == "source" else destination

        def act() -> None:
            monitor.send(command)
            if command != "quit":
                monitor.answer()  # refused or not

        report: Report | None = None
        error: MigratorError | None = None
        try:
            report = await migrate(
                vms.source.qmp, vms.destination.qmp, UNVERIFIED, watch=once(phase, act)
            )
        except MigratorError as failed:
            error = failed
        if report is not None:
            await vms.beats(vms.destination, 3)
            if not (side == "source" and command == "quit"):
                assert source.state() != "running"
        elif side == "source" and command == "quit":
            assert error is not None
            assert error.exit_code == 5, error
            assert vms.destination.console.read_bytes() == b""
        else:
            assert isinstance(error, Failed), error
            await vms.beats(vms.source, 3)
            assert vms.destination.console.read_bytes() == b""

    beside(body)


def test_paths_of_monitors_are_two() -> None:
    with with_monitors(SMALL) as (machine, paths):
        assert isinstance(paths, Monitors)
        assert paths.source != paths.destination
        assert machine.source_extra != machine.destination_extra
