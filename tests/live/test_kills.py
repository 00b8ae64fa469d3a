"""Whoever is killed, and whenever: one side runs, never two, and it can be migrated again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import pytest

from migrator import Aborted, Failed, MigratorError, Options, Progress, Undecided, migrate
from migrator.errors import VmError
from migrator.qemu.process import Vm
from migrator.qemu.qmp import Qmp
from migrator.report.phases import Phase
from tests.live.killed import ORCHESTRATOR, WITH_ITS_GUARD
from tests.live.moving import VERIFIED
from tests.live.vms import Machine, Pair, pair

pytestmark = pytest.mark.live

_NOT_HERE = (Phase.PREFLIGHT, Phase.ROLLBACK, Phase.DRAIN, Phase.COMPARE)
PHASES = [phase.value for phase in Phase if phase not in _NOT_HERE]
BEFORE_THE_POINT = PHASES[: PHASES.index(Phase.RESUME.value)]


async def _state(vm: Vm) -> str:
    """The run state of a VM; ``gone`` if its process ended."""
    with contextlib.suppress(VmError):
        vm.check_alive()
        qmp = await Qmp.connect(vm.name, vm.qmp, timeout_s=10)
        try:
            return await qmp.run_state()
        finally:
            await qmp.close()
    return "gone"


async def _eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 40.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if await condition():
            return True
        await asyncio.sleep(0.05)
    return False


async def _migrates_again(vms: Pair, survivor: Vm) -> None:
    """Check that the surviving VM runs, has nothing of ours in it, and can be moved."""
    await vms.beats(survivor, 3)
    assert vms.traces(survivor) == []
    if survivor is vms.source:
        await vms.start_destination()
        target = vms.destination
    else:
        await vms.source.stop()
        target = Vm("third", vms.directory)
        await target.start(
            vms.machine.arguments(vms.image, target.console, destination=True), incoming=True
        )
    try:
        report = await migrate(survivor.qmp, target.qmp, VERIFIED)
        assert report.mismatched_pages == 0
        await vms.beats(target, 3)
    finally:
        await target.stop()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.one_in(3)
def test_the_orchestrator_is_killed(phase: str) -> None:
    async def body() -> None:
        async with pair() as vms:
            orchestrator = await asyncio.create_subprocess_exec(
                *[sys.executable, "-c", ORCHESTRATOR],
                *[vms.source.qmp, vms.destination.qmp, phase],
                stderr=subprocess.PIPE,
            )
            assert orchestrator.stderr is not None
            # read to the end of file: the guard, which inherits it, is done then too
            said = await asyncio.wait_for(orchestrator.stderr.read(), 120)
            assert await orchestrator.wait() == -signal.SIGKILL, said.decode()

            source, destination = await _state(vms.source), await _state(vms.destination)
            assert [source, destination].count("running") == 1, (source, destination, said)
            if phase in BEFORE_THE_POINT:
                assert source == "running"
            if phase == Phase.FINISH.value:
                assert destination == "running"
            survivor = vms.source if source == "running" else vms.destination
            await _migrates_again(vms, survivor)

    asyncio.run(body())


def test_without_the_guard_a_killed_orchestrator_leaves_the_source_paused() -> None:
    """The other side of the test above: it is the guard that brings the source back."""

    async def body() -> None:
        async with pair() as vms:
            orchestrator = await asyncio.create_subprocess_exec(
                *[sys.executable, "-c", WITH_ITS_GUARD],
                *[vms.source.qmp, vms.destination.qmp],
            )
            assert await asyncio.wait_for(orchestrator.wait(), 120) == -signal.SIGKILL
            await asyncio.sleep(1.0)
            assert await _state(vms.source) in ("finish-migrate", "postmigrate")
            assert await _state(vms.destination) != "running"

    asyncio.run(body())


def _kill_at(phase: str, pid: int) -> Callable[[Progress], None]:
    def watch(progress: Progress) -> None:
        if progress.phase == phase:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    return watch


@pytest.mark.parametrize("phase", PHASES[: PHASES.index(Phase.FINISH.value)])
@pytest.mark.one_in(3)
def test_the_destination_is_killed(phase: str) -> None:
    async def body() -> None:
        async with pair() as vms:
            with pytest.raises(MigratorError) as caught:
                await migrate(
                    vms.source.qmp,
                    vms.destination.qmp,
                    VERIFIED,
                    watch=_kill_at(phase, vms.destination.pid),
                )
            assert isinstance(caught.value, (Failed, VmError)), caught.value
            assert not isinstance(caught.value, Undecided)
            assert await _state(vms.source) == "running"
            await _migrates_again(vms, vms.source)

    asyncio.run(body())


@pytest.mark.parametrize("phase", BEFORE_THE_POINT)
@pytest.mark.one_in(3)
def test_the_source_is_killed(phase: str) -> None:
    """The destination may run only if it got all; otherwise the operator is told what is known."""

    async def body() -> None:
        async with pair() as vms:
            outcome: MigratorError | None = None
            try:
                await migrate(
                    vms.source.qmp,
                    vms.destination.qmp,
                    VERIFIED,
                    watch=_kill_at(phase, vms.source.pid),
                )
            except MigratorError as error:
                outcome = error
            if outcome is None:
                # it had saved everything, and its RAM files outlive it
                assert phase in ("device-state", "last-collect", "verify", "load")
                assert await _state(vms.destination) == "running"
                await vms.check_heartbeat_unbroken()
            else:
                assert isinstance(outcome, Undecided), outcome
                assert outcome.exit_code == 4
                assert any("source" in sentence for sentence in outcome.known)
                assert await _state(vms.destination) != "running"

    asyncio.run(body())


@pytest.mark.parametrize("phase", BEFORE_THE_POINT)
@pytest.mark.one_in(3)
def test_cancelled(phase: str) -> None:
    async def body() -> None:
        async with pair() as vms:
            task: asyncio.Task[object]

            def watch(progress: Progress) -> None:
                if progress.phase == phase:
                    task.cancel()

            task = asyncio.ensure_future(
                migrate(vms.source.qmp, vms.destination.qmp, VERIFIED, watch=watch)
            )
            with pytest.raises(Aborted, match="interrupted") as caught:
                await task
            assert caught.value.phase == phase
            assert caught.value.report is not None
            assert caught.value.report.status == "aborted"
            assert await _state(vms.source) == "running"
            await _migrates_again(vms, vms.source)

    asyncio.run(body())


def test_a_destination_that_refuses_the_stream() -> None:
    """A device more at the source: QEMU finds out while it loads, with the source stopped."""

    async def body() -> None:
        device = ["-device", "virtio-rng-pci"]
        async with pair(Machine(source_extra=device)) as vms:
            with pytest.raises(Failed, match="destination"):
                await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED)
            assert await _state(vms.source) == "running"
            assert await _state(vms.destination) != "running"
            vms.machine = Machine(extra=device)
            await _migrates_again(vms, vms.source)

    asyncio.run(body())


def test_a_stream_without_its_end_never_runs() -> None:
    """What all of this rests on: QEMU does not run without the end, and does with it.

    It does run when only the last byte is missing, which is why more than that is kept back.
    """
    from migrator.qemu import devicestate

    async def outcome(cut: Callable[[bytes], bytes]) -> str:
        async with pair() as vms:
            states: list[str] = []
            whole = devicestate.split_at_end

            def split(stream: bytes) -> tuple[bytes, bytes]:
                head, end = whole(stream)
                return head, cut(end)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("migrator.migration.switchover.split_at_end", split)
                with contextlib.suppress(MigratorError):
                    await migrate(vms.source.qmp, vms.destination.qmp, Options())
            states.append(await _state(vms.destination))
            return states[-1]

    assert asyncio.run(outcome(lambda end: b"")) != "running"
    assert asyncio.run(outcome(lambda end: end[:-1])) == "running"
    assert asyncio.run(outcome(lambda end: end)) == "running"
