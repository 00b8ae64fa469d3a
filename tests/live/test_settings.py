"""Migration capabilities and parameters are as they were before, after every end, on both sides."""

from __future__ import annotations

import asyncio
import json
import mmap
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from migrator import Aborted, Failed, Progress, migrate
from migrator.guest.workload import Workload
from migrator.qemu.process import Vm
from migrator.qemu.settings import SOURCE_PARAMETERS
from migrator.receiver.resolution import resolve
from migrator.report.phases import Phase
from tests.live.killed import ORCHESTRATOR, WITH_ITS_GUARD
from tests.live.monitors import Monitor
from tests.live.moving import VERIFIED, Ram, check_still_at_source, move
from tests.live.qemus import QEMUS, Qemu, each_qemu
from tests.live.test_neighbours import beside
from tests.live.vms import MIB, Machine, Pair

pytestmark = pytest.mark.live

SMALL = Machine(memory=128 * MIB, workload=Workload(working_set_bytes=16 * MIB))
OF_ITS_OWNER = {"max-bandwidth": 50 << 20}
Body = Callable[[Pair, Monitor, Monitor], Awaitable[None]]


def unchanged(body: Body, machine: Machine = SMALL) -> None:
    """Run a test; check that every QEMU that it leaves alive has the settings of before."""

    async def checked(vms: Pair, source: Monitor, destination: Monitor) -> None:
        source.execute("migrate-set-parameters", **OF_ITS_OWNER)
        before = {monitor: monitor.settings() for monitor in (source, destination)}
        assert before[source]["max-bandwidth"] == OF_ITS_OWNER["max-bandwidth"]
        await body(vms, source, destination)
        for monitor, vm in ((source, vms.source), (destination, vms.destination)):
            if Path(f"/proc/{vm.pid}/fd").exists() and _is_alive(vm):
                assert monitor.settings() == before[monitor], vm.name

    beside(checked, machine)


def _is_alive(vm: Vm) -> bool:
    return Path(f"/proc/{vm.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"


@each_qemu
def test_completed(qemu: Qemu) -> None:
    async def body(vms: Pair, source: Monitor, destination: Monitor) -> None:
        await move(vms)

    unchanged(body, replace(SMALL, qemu=qemu.require()))


PHASES = [Phase.SWITCHOVER, Phase.STOP, Phase.FINAL_SEND, Phase.LAST_COLLECT, Phase.LOAD]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.one_in(4)
def test_cancelled(phase: Phase) -> None:
    async def body(vms: Pair, source: Monitor, destination: Monitor) -> None:
        task: asyncio.Task[object]

        def watch(progress: Progress) -> None:
            if progress.phase == phase.value:
                task.cancel()

        task = asyncio.ensure_future(
            migrate(vms.source.qmp, vms.destination.qmp, VERIFIED, watch=watch)
        )
        with pytest.raises(Aborted):
            await task
        await check_still_at_source(vms)

    unchanged(body)


async def _killed(vms: Pair, program: str, *phase: str) -> None:
    """Migrate with a program that kills itself; return once its guard has ended, too."""
    orchestrator = await asyncio.create_subprocess_exec(
        *[sys.executable, "-c", program, vms.source.qmp, vms.destination.qmp, *phase],
        stderr=subprocess.PIPE,
    )
    assert orchestrator.stderr is not None
    said = await asyncio.wait_for(orchestrator.stderr.read(), 120)
    assert await orchestrator.wait() == -signal.SIGKILL, said.decode()


@pytest.mark.parametrize("phase", [*PHASES, Phase.RESUME, Phase.FINISH])
@pytest.mark.one_in(4)
def test_killed(phase: Phase) -> None:
    """The guard knows all that is to be put back before anything is changed."""

    async def body(vms: Pair, source: Monitor, destination: Monitor) -> None:
        await _killed(vms, ORCHESTRATOR, phase.value)
        assert "running" in (source.state(), await _state_or_gone(vms, destination))

    unchanged(body)


async def _state_or_gone(vms: Pair, monitor: Monitor) -> str:
    return monitor.state() if _is_alive(vms.destination) else "gone"


@each_qemu
def test_killed_with_its_guard(qemu: Qemu) -> None:
    """Nothing puts the settings back, then; the next migration tells, and resolve does it."""

    async def body(vms: Pair, source: Monitor, destination: Monitor) -> None:
        capabilities = [{"capability": "events", "state": True}]
        source.execute("migrate-set-capabilities", capabilities=capabilities)
        source.execute("migrate-set-parameters", **{"max-bandwidth": 128 << 20})
        before = source.settings()
        await _killed(vms, WITH_ITS_GUARD)
        left = source.settings()
        assert left["x-ignore-shared"]
        assert left["max-bandwidth"] == SOURCE_PARAMETERS["max-bandwidth"]
        assert "not finalized" in source.refuses("cont")
        found = await resolve(vms.source.qmp, None, None)
        assert (found.source, found.decided, found.exit_code) == ("running", True, 0)
        assert any("no destination can run" in sentence for sentence in found.sentences)
        assert source.settings() == before
        await check_still_at_source(vms)
        await vms.start_destination()
        await move(vms)

    beside(body, replace(SMALL, qemu=qemu.require()))


def test_leftovers_of_a_source_that_runs_are_told_and_put_back() -> None:
    async def body(vms: Pair, source: Monitor, destination: Monitor) -> None:
        before = source.settings()
        ours = {"x-ignore-shared": True, "pause-before-switchover": True}
        capabilities = [{"capability": name, "state": state} for name, state in ours.items()]
        source.execute("migrate-set-capabilities", capabilities=capabilities)
        source.execute("migrate-set-parameters", **SOURCE_PARAMETERS)
        rehearsal = replace(VERIFIED, memory_only=True)
        report = await migrate(vms.source.qmp, vms.destination.qmp, rehearsal)
        assert any("x-ignore-shared" in said for said in report.warnings)
        found = await resolve(vms.source.qmp, None, None)
        assert any("were put back" in sentence for sentence in found.sentences)
        assert source.settings() == before
        assert (found.source, found.exit_code) == ("running", 0)

    beside(body)


def test_the_leftover_of_a_receiver_that_was_killed_is_put_back() -> None:
    async def body(vms: Pair, source: Monitor, destination: Monitor) -> None:
        before = source.settings()
        capabilities = [{"capability": "x-ignore-shared", "state": True}]
        source.execute("migrate-set-capabilities", capabilities=capabilities)
        found = await resolve(vms.source.qmp, None, None)
        assert any("were put back" in sentence for sentence in found.sentences)
        assert source.settings() == before

    beside(body)


# -- why it matters -----------------------------------------------------------------------------


@contextmanager
def _stopped(monitor: Monitor) -> Any:
    monitor.execute("stop")
    yield
    monitor.execute("cont")


def _contents(vm: Vm, machine: Machine) -> bytes:
    ram = Ram(vm, machine)
    with ram.file() as fd, mmap.mmap(fd, ram.block.size, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        return bytes(mapped)


async def _snapshot_holds_ram(vms: Pair, vm: Vm, monitor: Monitor) -> bool:
    """Take a snapshot, let the guest write on, go back to it, and compare all of RAM."""
    with _stopped(monitor):
        then = _contents(vm, vms.machine)
        said = monitor.execute("human-monitor-command", command_line="savevm then")
        assert said == "", said
    await vms.beats(vm, 2)
    with _stopped(monitor):
        assert _contents(vm, vms.machine) != then
        said = monitor.execute("human-monitor-command", command_line="loadvm then")
        return _contents(vm, vms.machine) == then and said == ""


def _with_disks(directory: Path, qemu: str) -> Machine:
    """A disk for snapshots at each side."""
    drive = "if=none,id=disk,format=qcow2,file={}"
    machine = SMALL
    for side in ("source", "destination"):
        image = directory / f"{side}.qcow2"
        _make_image(qemu, image)
        extra = ["-drive", drive.format(image), "-device", "virtio-blk-pci,drive=disk"]
        machine = replace(machine, **{f"{side}_extra": extra}, qemu=(qemu,))  # type: ignore[arg-type]
    return machine


def _make_image(qemu: str, path: Path) -> None:
    """By a QEMU without a machine, as its tools need not be installed."""
    size = 256 * MIB
    commands: list[dict[str, Any]] = [
        {"execute": "qmp_capabilities"},
        _job("file", {"driver": "file", "filename": str(path), "size": 0}),
        {"execute": "blockdev-add", "arguments": _node(path)},
        _job("image", {"driver": "qcow2", "file": "node", "size": size}),
    ]
    process = subprocess.Popen(
        [qemu, "-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        for command in commands:
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
            wanted = "concluded" if command["execute"] == "blockdev-create" else '"return"'
            while wanted not in (line := process.stdout.readline()):
                assert line, "QEMU has ended"
                assert "error" not in line, line
        process.stdin.write('{"execute": "quit"}\n')
        process.stdin.flush()
    assert path.stat().st_size > 0


def _job(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"execute": "blockdev-create", "arguments": {"job-id": name, "options": options}}


def _node(path: Path) -> dict[str, Any]:
    return {"driver": "file", "node-name": "node", "filename": str(path)}


@each_qemu
@pytest.mark.parametrize("end", ["completed", "failed", "killed"])
@pytest.mark.one_in(2)
def test_a_snapshot_holds_ram(end: str, qemu: Qemu, tmp_path: Path) -> None:
    async def body(vms: Pair, source: Monitor, destination: Monitor) -> None:
        survivor, monitor = vms.source, source
        if end == "completed":
            await move(vms)
            survivor, monitor = vms.destination, destination
        elif end == "killed":
            await _killed(vms, ORCHESTRATOR, Phase.FINAL_SEND.value)
        else:
            ram = Ram(vms.source, vms.machine)
            with pytest.raises(Failed, match="differ"):
                await migrate(
                    *(vms.source.qmp, vms.destination.qmp, VERIFIED),
                    watch=_write_past_the_tracker(ram),
                )
        assert await _snapshot_holds_ram(vms, survivor, monitor)

    beside(body, _with_disks(tmp_path, qemu.require()[0]))


def _write_past_the_tracker(ram: Ram) -> Callable[[Progress], None]:
    import os

    def watch(progress: Progress) -> None:
        if progress.phase == Phase.FINAL_SEND.value:
            with ram.file() as fd:
                os.pwrite(fd, b"unseen", 64 * MIB)

    return watch


def test_with_the_capability_left_on_a_snapshot_holds_no_ram(tmp_path: Path) -> None:
    """The other side of the test above."""

    async def body(vms: Pair, source: Monitor, destination: Monitor) -> None:
        capabilities = [{"capability": "x-ignore-shared", "state": True}]
        source.execute("migrate-set-capabilities", capabilities=capabilities)
        assert not await _snapshot_holds_ram(vms, vms.source, source)

    beside(body, _with_disks(tmp_path, QEMUS[0].require()[0]))
