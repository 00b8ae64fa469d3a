"""How a migration ends where the guest, a QEMU, a disk or the guard does not play its part."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import struct
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from migrator import Aborted, Failed, GuestEnded, Progress, Refused, migrate
from migrator.errors import StoodTooLong
from migrator.guest.workload import Workload
from migrator.migration.switchover import Switchover
from migrator.qemu.process import Vm
from migrator.report.phases import Phase
from tests.live.monitors import Monitor
from tests.live.moving import VERIFIED, Ram, check_still_at_source, move, once
from tests.live.qemus import QEMUS, Qemu, each_qemu
from tests.live.reader_guest import Reader
from tests.live.slowdisk import SlowDisk, slow_disk
from tests.live.test_neighbours import beside
from tests.live.vms import MIB, Machine, Pair

pytestmark = pytest.mark.live

SMALL = Machine(memory=128 * MIB, workload=Workload(working_set_bytes=16 * MIB))
UNVERIFIED = replace(VERIFIED, verify=False)


# -- the guest ends -----------------------------------------------------------------------------


@each_qemu
@pytest.mark.parametrize(
    ("how", "phase"),
    [
        *[("quit", p) for p in (Phase.COPY, Phase.ROUNDS, Phase.SWITCHOVER, Phase.FINAL_SEND)],
        # a source that stands is reset, and does not end
        *[("system_reset", p) for p in (Phase.COPY, Phase.ROUNDS, Phase.SWITCHOVER)],
    ],
)
def test_the_guest_ends(how: str, phase: Phase, qemu: Qemu) -> None:
    """With -no-reboot, a reset ends it, too."""

    async def body(vms: Pair, source: Monitor, _: Monitor) -> None:
        def act() -> None:
            source.execute(how)

        with pytest.raises(GuestEnded, match="ended by itself, or was ended") as caught:
            await migrate(
                *(vms.source.qmp, vms.destination.qmp, UNVERIFIED), watch=once(phase, act)
            )
        assert caught.value.exit_code == 5
        assert caught.value.end == f"host-qmp-{how.replace('_', '-')}"
        assert vms.destination.console.read_bytes() == b""
        assert caught.value.report is not None
        assert caught.value.report.status == "failed"

    beside(body, replace(SMALL, qemu=qemu.require(), extra=["-no-reboot"]))


@pytest.mark.parametrize("phase", [Phase.ROUNDS, Phase.SWITCHOVER])
def test_the_guest_ends_and_its_qemu_does_not(phase: Phase) -> None:
    async def body(vms: Pair, source: Monitor, _: Monitor) -> None:
        with pytest.raises(GuestEnded, match="the source is 'shutdown'"):
            await migrate(
                *(vms.source.qmp, vms.destination.qmp, UNVERIFIED),
                watch=once(phase, lambda: _reset_and_wait(source)),
            )
        assert source.state() == "shutdown"
        assert vms.destination.console.read_bytes() == b""

    beside(body, replace(SMALL, extra=["-no-reboot", "-no-shutdown"]))


def _reset_and_wait(source: Monitor) -> None:
    source.execute("system_reset")
    while source.state() != "shutdown":
        pass


# -- the source dies once it has saved everything -----------------------------------------------


def _killed_after_its_state(vm: Vm, first: Callable[[], None]) -> Callable[[Progress], None]:
    def kill() -> None:
        first()
        os.kill(vm.pid, signal.SIGKILL)
        os.waitid(os.P_PID, vm.pid, os.WEXITED | os.WNOWAIT)

    return once(Phase.LAST_COLLECT, kill)


@each_qemu
@pytest.mark.parametrize("options", [VERIFIED, UNVERIFIED], ids=["verified", "unverified"])
def test_a_source_that_dies_with_its_state_saved_lives_on(options: Any, qemu: Qemu) -> None:
    """As QEMU 7.2 does by a failed assertion, where a mirror job writes to an inactive image."""

    async def body(vms: Pair, _: Monitor, destination: Monitor) -> None:
        report = await migrate(
            *(vms.source.qmp, vms.destination.qmp, options),
            watch=_killed_after_its_state(vms.source, lambda: None),
        )
        assert report.status == "completed"
        assert report.mismatched_pages == (0 if options.verify else None)
        assert any("the source's process ended" in said for said in report.warnings)
        assert destination.state() == "running"
        await vms.check_heartbeat_unbroken()

    beside(body, replace(SMALL, qemu=qemu.require()))


def test_pages_written_while_it_was_saved_are_found_by_comparing() -> None:
    """The other side of the test above: the comparison is what delivers them."""

    async def body(vms: Pair, _: Monitor, destination: Monitor) -> None:
        ram = Ram(vms.source, vms.machine)

        def write() -> None:
            ram.write(64 * MIB, b"written last" * 1000)

        await migrate(
            *(vms.source.qmp, vms.destination.qmp, UNVERIFIED),
            watch=_killed_after_its_state(vms.source, write),
        )
        there = Ram(vms.destination, vms.machine)
        assert there.read(64 * MIB, 12_000) == b"written last" * 1000

    beside(body)


# -- images -------------------------------------------------------------------------------------


class Lock:
    """All of QEMU's lock bytes of an image (QEMU: block/file-posix.c), for another process."""

    def __init__(self, image: Path) -> None:
        self._image = image
        self._process: subprocess.Popen[bytes] | None = None

    def take(self) -> None:
        code = (
            "import fcntl, os, struct, sys, time\n"
            "fd = os.open(sys.argv[1], os.O_RDWR)\n"
            f"fcntl.fcntl(fd, {fcntl.F_OFD_SETLK}, "
            f"struct.pack('hhqqi', {fcntl.F_WRLCK}, 0, 100, 300, 0))\n"
            "print('taken', flush=True); time.sleep(600)\n"
        )
        self._process = subprocess.Popen(
            ["/usr/bin/env", "python3", "-c", code, str(self._image)], stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"taken\n"

    def drop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


assert struct.calcsize("hhqqi") >= 28  # struct flock


@each_qemu
def test_an_image_that_the_destination_cannot_have(qemu: Qemu, tmp_path: Path) -> None:
    """The source goes on at once, not after a minute."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    drive = f"if=none,id=disk,format=raw,file={image}"

    async def body(vms: Pair, source: Monitor, _: Monitor) -> None:
        lock = Lock(image)
        take, drop = once(Phase.RESUME, lock.take), once(Phase.ROLLBACK, lock.drop)

        def locked(progress: Progress) -> None:
            """For the destination alone: the source must get its image back."""
            take(progress)
            drop(progress)

        try:
            with pytest.raises(Failed, match="did not run") as caught:
                await migrate(
                    *(vms.source.qmp, vms.destination.qmp, UNVERIFIED),
                    watch=locked,
                )
        finally:
            lock.drop()
        assert "image" in str(caught.value) or "lock" in str(caught.value), caught.value
        report = caught.value.report
        assert report is not None
        assert report.phases["resume"] < 20_000
        await vms.beats(vms.source, 3)
        assert source.state() == "running"
        assert vms.destination.console.read_bytes() == b""

    beside(
        body,
        replace(
            SMALL,
            qemu=qemu.require(),
            extra=["-drive", drive, "-device", "virtio-blk-pci,drive=disk"],
        ),
    )


MIRROR = {"job_id": "copy", "device": "disk", "target": "sink", "sync": "full"}


def _begin_mirror(source: Monitor) -> None:
    source.execute("blockdev-add", driver="null-co", node_name="sink", size=MIB)
    source.execute("blockdev-mirror", **MIRROR)


def _with_a_disk(qemu: Qemu, directory: Path) -> Machine:
    image = directory / "disk.img"
    image.write_bytes(bytes(MIB))
    return replace(
        SMALL,
        qemu=qemu.require(),
        extra=[
            *["-blockdev", f"driver=raw,node-name=disk,file.driver=file,file.filename={image}"],
            *["-device", "virtio-blk-pci,drive=disk,share-rw=on"],
        ],
    )


@each_qemu
def test_a_block_job_is_refused_by_name(qemu: Qemu, tmp_path: Path) -> None:
    async def body(vms: Pair, source: Monitor, _: Monitor) -> None:
        _begin_mirror(source)
        with pytest.raises(Refused, match="a job 'copy' \\(mirror\\)") as caught:
            await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED)
        assert "block-job-cancel device=copy" in caught.value.findings[0].mend
        source.execute("block-job-cancel", device="copy")
        await move(vms)

    beside(body, _with_a_disk(qemu, tmp_path))


@each_qemu
def test_a_block_job_that_begins_meanwhile(qemu: Qemu, tmp_path: Path) -> None:
    async def body(vms: Pair, source: Monitor, _: Monitor) -> None:
        with pytest.raises(Failed, match=r"a job 'copy' \(mirror\) .*block-job-cancel"):
            await migrate(
                *(vms.source.qmp, vms.destination.qmp, VERIFIED),
                watch=once(Phase.ROUNDS, lambda: _begin_mirror(source)),
            )
        await check_still_at_source(vms)
        source.execute("block-job-cancel", device="copy")
        await move(vms)

    beside(body, _with_a_disk(qemu, tmp_path))


def test_a_block_export_is_refused_by_name(tmp_path: Path) -> None:
    async def body(vms: Pair, source: Monitor, _: Monitor) -> None:
        address = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
        source.execute("nbd-server-start", addr=address)
        export = {"type": "nbd", "id": "out", "node_name": "disk", "writable": True}
        source.execute("block-export-add", **export)
        with pytest.raises(Refused, match="exports its disk 'disk' \\(nbd, 'out'\\)"):
            await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED)
        source.execute("block-export-del", id="out")
        await move(vms)

    beside(body, _with_a_disk(QEMUS[0], tmp_path))


@each_qemu
@pytest.mark.parametrize("phase", [Phase.FINAL_SEND, Phase.LAST_COLLECT])
def test_a_guest_that_an_io_error_stopped_stays_stopped(phase: Phase, qemu: Qemu) -> None:
    """The read fails while QEMU drains, for a migration that is then given up."""

    async def body(disk: SlowDisk, vms: Pair, source: Monitor) -> None:
        task: asyncio.Task[object]

        def watch(progress: Progress) -> None:
            if progress.phase == Phase.SWITCHOVER.value:
                disk.hold()
                threading.Timer(0.3, disk.fail).start()
            elif progress.phase == phase.value:
                task.cancel()

        task = asyncio.ensure_future(
            migrate(vms.source.qmp, vms.destination.qmp, UNVERIFIED, watch=watch)
        )
        with pytest.raises((Aborted, Failed), match="was not let run"):
            await task
        assert source.state() not in ("running", "finish-migrate")
        assert vms.destination.console.read_bytes() == b""
        disk.flow()
        source.execute("cont")
        await vms.beats(vms.source, 3)

    with slow_disk() as disk:
        machine = Reader(disk=disk.path, on_error="stop", qemu=qemu.require())
        beside(lambda vms, source, _: body(disk, vms, source), machine)


# -- time, and the guard ------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.FINAL_SEND, Phase.LOAD])
def test_a_guest_stands_no_longer_than_it_may(
    phase: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is that takes its time: here, an endless wait in our own steps, or QEMU's."""

    async def body(vms: Pair, _: Monitor, __: Monitor) -> None:
        def stop_destination() -> None:
            os.kill(vms.destination.pid, signal.SIGSTOP)

        if phase is Phase.FINAL_SEND:
            monkeypatch.setattr(Switchover, "_save_device_state", _for_ever)
        try:
            with pytest.raises(Failed, match="has stood for 2 s") as caught:
                await migrate(
                    *(vms.source.qmp, vms.destination.qmp, replace(UNVERIFIED, standstill_s=2.0)),
                    watch=once(phase, stop_destination if phase is Phase.LOAD else lambda: None),
                )
            assert isinstance(caught.value.__cause__, StoodTooLong)
            assert caught.value.__cause__.limit_s == 2.0
        finally:
            os.kill(vms.destination.pid, signal.SIGCONT)
        await vms.beats(vms.source, 3)
        assert await vms.state(vms.source) == "running"
        assert vms.traces(vms.source) == []
        assert vms.destination.console.read_bytes() == b""

    beside(body)


async def _for_ever(*_: object) -> bytes:
    await asyncio.sleep(3600)
    return b""


@pytest.mark.parametrize("phase", [Phase.ROUNDS, Phase.FINAL_SEND, Phase.LOAD, Phase.RESUME])
def test_without_its_guard_a_migration_is_given_up(
    phase: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(vms: Pair, _: Monitor, __: Monitor) -> None:
        guards: list[int] = []

        class Noted(subprocess.Popen[bytes]):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                if any("migrator.migration.guard" in str(word) for word in args[0]):
                    guards.append(self.pid)

        monkeypatch.setattr("migrator.migration.guard.subprocess.Popen", Noted)

        def kill() -> None:
            os.kill(guards[0], signal.SIGKILL)
            os.waitid(os.P_PID, guards[0], os.WEXITED | os.WNOWAIT)

        with pytest.raises(Failed, match=r"the guard, process .*, has ended"):
            await migrate(
                *(vms.source.qmp, vms.destination.qmp, UNVERIFIED), watch=once(phase, kill)
            )
        await check_still_at_source(vms)
        monkeypatch.undo()
        await vms.start_destination()
        await move(vms)

    beside(body)
