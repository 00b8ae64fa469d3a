"""Everything but the hand-over: the source goes on, whatever happens, and can still be moved."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from migrator import Aborted, Failed, Progress, Refused, Report, migrate
from migrator.guest.workload import Workload, heartbeats
from migrator.qemu.qmp import Qmp
from migrator.report.phases import Phase
from tests.live.moving import VERIFIED, Ram, Watch, check_still_at_source, move, once
from tests.live.test_pages import with_pair
from tests.live.test_unseen import PAGES, write_unseen
from tests.live.vms import MIB, Machine, Pair

pytestmark = pytest.mark.live

SMALL = Machine(memory=128 * MIB, workload=Workload(working_set_bytes=16 * MIB))
REHEARSAL = replace(VERIFIED, memory_only=True)
STANDING = [Phase.STOP, Phase.FINAL_SEND, Phase.LAST_COLLECT, Phase.VERIFY, Phase.RESUME]
UNMIGRATABLE = [
    *["-object", "memory-backend-file,id=shared,size=1M,share=on,mem-path=/dev/shm"],
    *["-device", "ivshmem-plain,memdev=shared,master=off"],
]


async def rehearse(vms: Pair, watch: Watch = lambda _: None) -> Report:
    report = await migrate(vms.source.qmp, vms.destination.qmp, REHEARSAL, watch=watch)
    assert report.status == "completed"
    assert report.memory_only
    assert report.mismatched_pages == 0
    assert report.verified_pages
    assert report.stopped_by == "stop"
    assert await vms.state(vms.destination) == "inmigrate"
    return report


async def goes_on(vms: Pair) -> None:
    await check_still_at_source(vms)
    beats = heartbeats(vms.source.console.read_bytes())
    assert beats == list(range(len(beats)))


def test_the_source_goes_on_and_can_be_moved() -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        for _ in range(2):
            report = await rehearse(vms)
            assert report.device_state_bytes is None
            assert report.qemu_ram_transferred is None
            assert report.downtime_ms
            spent = sum(report.phases[name] for name in report.downtime_phases)
            assert spent == pytest.approx(report.downtime_ms, abs=5)
            await goes_on(vms)
        await move(vms)  # into the same destination, whose RAM has gone stale
        await vms.check_heartbeat_unbroken()

    with_pair(body)


def test_what_was_lost_is_found() -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        with pytest.raises(Failed, match=f"{PAGES} of .* pages differ"):
            await rehearse(vms, once(Phase.ROUNDS, lambda: write_unseen(source)))
        await goes_on(vms)

    with_pair(body)


def test_a_vm_that_qemu_cannot_migrate() -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        with pytest.raises(Refused, match="ivshmem") as refused:
            await migrate(vms.source.qmp, vms.destination.qmp)
        assert "--memory-only" in refused.value.findings[0].mend
        await rehearse(vms)
        await goes_on(vms)

    with_pair(body, replace(SMALL, extra=UNMIGRATABLE))


def test_a_paused_vm_stays_paused() -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        qmp = await Qmp.connect("source", vms.source.qmp)
        await qmp.execute("stop")
        await qmp.close()
        report = await rehearse(vms)
        assert report.downtime_ms is None
        assert await vms.state(vms.source) == "paused"
        assert vms.traces(vms.source) == []

    with_pair(body, SMALL)


@pytest.mark.parametrize("phase", STANDING, ids=lambda phase: phase.value)
@pytest.mark.one_in(3)
def test_cancelled_while_the_guest_stands(phase: Phase) -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        task: asyncio.Task[Report]

        def watch(progress: Progress) -> None:
            if progress.phase == phase.value:
                task.cancel()

        task = asyncio.ensure_future(
            migrate(vms.source.qmp, vms.destination.qmp, REHEARSAL, watch=watch)
        )
        with pytest.raises(Aborted, match="interrupted"):
            await task
        await goes_on(vms)
        await move(vms)

    with_pair(body, SMALL)


_ORCHESTRATOR = """
import asyncio, os, signal, sys
from migrator import Limits, Options, migrate
source, destination, phase = sys.argv[1:]
def watch(progress):
    if progress.phase == phase:
        os.kill(os.getpid(), signal.SIGKILL)
options = Options(limits=Limits(on_limit="force"), memory_only=True)
asyncio.run(migrate(source, destination, options, watch=watch))
"""


@pytest.mark.parametrize("phase", [*STANDING, Phase.FINISH], ids=lambda phase: phase.value)
@pytest.mark.one_in(3)
def test_the_orchestrator_is_killed(phase: Phase) -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        orchestrator = await asyncio.create_subprocess_exec(
            *[sys.executable, "-c", _ORCHESTRATOR],
            *[vms.source.qmp, vms.destination.qmp, phase.value],
            stderr=subprocess.PIPE,
        )
        assert orchestrator.stderr is not None
        # to the end of file: the guard, which inherits it, is done then too
        said = await asyncio.wait_for(orchestrator.stderr.read(), 120)
        assert await orchestrator.wait() == -signal.SIGKILL, said.decode()
        await goes_on(vms)
        await move(vms)

    with_pair(body, SMALL)
