"""Disks that are read past the page cache: the guest stands for a moment when tracking begins.

That what arrives late is found, and lost without the comparison, is shown in
:mod:`tests.live.test_late_reads`.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from migrator import Aborted, Progress, Report, migrate
from migrator.guest.workload import Workload
from migrator.qemu.qmp import Qmp
from migrator.report.phases import Phase
from tests.live.moving import VERIFIED, Ram, check_still_at_source, move
from tests.live.test_pages import with_pair
from tests.live.vms import MIB, Machine, Pair

pytestmark = pytest.mark.live

Body = Callable[[Pair, Ram, Ram], Coroutine[Any, Any, None]]


def with_direct_disk(disk: Path, body: Body, **changes: object) -> None:
    (disk / "image").write_bytes(bytes(MIB))
    drive = f"if=none,id=disk,format=raw,cache=none,file.locking=off,file={disk}/image"
    machine = Machine(
        memory=128 * MIB,
        # so slow that not all of it is written again by the end, and sent: the rest is compared
        workload=Workload(working_set_bytes=16 * MIB, pages_per_s=5000),
        extra=["-drive", drive, "-device", "virtio-blk-pci,drive=disk"],
    )
    with_pair(body, replace(machine, **changes))  # type: ignore[arg-type]


def test_the_guest_stands_for_a_moment(disk: Path) -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        report = await move(vms)
        assert report.phases[Phase.DRAIN.value] > 0
        assert Phase.DRAIN.value not in report.downtime_phases
        assert report.stopped_by == "migrate"
        # what was written in the rounds is compared, as it may have been read into
        assert report.compared_pages
        assert report.differing_pages == 0
        await vms.check_heartbeat_unbroken()

    with_direct_disk(disk, body)


def test_below_the_format(disk: Path) -> None:
    """Only the node that reads the file is direct, not the one that the device sees."""
    extra = [
        "-blockdev",
        f"file,node-name=file,cache.direct=on,locking=off,filename={disk}/image",
        *["-blockdev", "raw,node-name=disk,file=file", "-device", "virtio-blk-pci,drive=disk"],
    ]

    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        report = await move(vms)
        assert Phase.DRAIN.value in report.phases

    with_direct_disk(disk, body, extra=extra)


def test_a_paused_guest_is_not_let_run(disk: Path) -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        qmp = await Qmp.connect("source", vms.source.qmp)
        await qmp.execute("stop")
        await qmp.close()
        report = await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED)
        assert report.mismatched_pages == 0
        assert await vms.state(vms.destination) == "paused"

    with_direct_disk(disk, body)


@pytest.mark.parametrize("phase", [Phase.DRAIN, Phase.COMPARE], ids=lambda phase: phase.value)
def test_cancelled(phase: Phase, disk: Path) -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        task: asyncio.Task[Report]

        def watch(progress: Progress) -> None:
            if progress.phase == phase.value:
                task.cancel()

        task = asyncio.ensure_future(
            migrate(vms.source.qmp, vms.destination.qmp, VERIFIED, watch=watch)
        )
        with pytest.raises(Aborted, match="interrupted"):
            await task
        await check_still_at_source(vms)
        await vms.start_destination()
        await move(vms)

    with_direct_disk(disk, body)


_KILLED_AT = """
import asyncio, os, signal, sys
from migrator import Limits, Options, migrate
source, destination, phase = sys.argv[1:]
def watch(progress):
    if progress.phase == phase:
        os.kill(os.getpid(), signal.SIGKILL)
options = Options(limits=Limits(on_limit="force"))
asyncio.run(migrate(source, destination, options, watch=watch))
"""
_KILLED_WHILE_IT_STANDS = _KILLED_AT.replace(
    "def watch",
    """from migrator.migration import attempt
really = attempt.stop_guest
async def stop_guest(source):
    assert await really(source)
    assert await source.run_state() == "paused"
    os.kill(os.getpid(), signal.SIGKILL)
attempt.stop_guest = stop_guest
def watch""",
)


@pytest.mark.parametrize(
    ("program", "phase"),
    [
        (_KILLED_WHILE_IT_STANDS, Phase.FINISH),
        (_KILLED_AT, Phase.DRAIN),
        (_KILLED_AT, Phase.COPY),
        (_KILLED_AT, Phase.COMPARE),
    ],
    ids=["while it stands", "drain", "copy", "compare"],
)
def test_the_orchestrator_is_killed(program: str, phase: Phase, disk: Path) -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        orchestrator = await asyncio.create_subprocess_exec(
            *[sys.executable, "-c", program],
            *[vms.source.qmp, vms.destination.qmp, phase.value],
            stderr=subprocess.PIPE,
        )
        assert orchestrator.stderr is not None
        # to the end of file: the guard, which inherits it, is done then too
        said = await asyncio.wait_for(orchestrator.stderr.read(), 120)
        assert await orchestrator.wait() == -signal.SIGKILL, said.decode()
        await check_still_at_source(vms)
        await vms.start_destination()
        await move(vms)

    with_direct_disk(disk, body)
