"""VMs that are recorded: what is in the file is what the guest did, and nothing of it stays."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.simulate.costs import Costs
from bench.simulate.replay import Replay
from bench.simulate.run import migrate
from migrator import Limits
from migrator.errors import MigratorError, TraceError, VmError
from migrator.guest.workload import PAGE_SIZE, Workload
from migrator.policy.downtime import Fixed
from migrator.policy.policies import policy_of
from migrator.watch.record import Options, Recorded, record
from migrator.watch.trace import numbers, read, united
from tests.live.moving import Ram, move
from tests.live.vms import MIB, Machine, Pair
from tests.live.watching import MIGRATOR, OTHER_PAGES, SPOT, STEADY, with_source

pytestmark = pytest.mark.live

BRIEF = Options(seconds=1.5, interval_s=0.05)
WORKING_SET = np.arange(STEADY.start // PAGE_SIZE, STEADY.end // PAGE_SIZE)
Body = Callable[[Pair], Coroutine[Any, Any, None]]


async def recorded(vms: Pair, path: Path, options: Options = BRIEF) -> list[Recorded]:
    shown: list[Recorded] = []
    await record(vms.source.qmp, path, options, shown.append)
    return shown


def test_what_is_recorded_is_what_the_guest_wrote(tmp_path: Path) -> None:
    """Its walk, page after page, at its rate; and what was data, and zeros, before."""
    path = tmp_path / "a.trace"

    async def body(vms: Pair) -> None:
        ram = Ram(vms.source, vms.machine)
        ram.write(SPOT, bytes(3 * PAGE_SIZE))  # three pages of zeros that are no holes
        ram.write(SPOT + PAGE_SIZE, b"x")
        shown = await recorded(vms, path)
        trace = read(path)
        assert shown[-1].records == len(trace.records)
        assert shown[-1].seconds == trace.seconds
        assert shown[-1].file_bytes == path.stat().st_size
        spot = SPOT // PAGE_SIZE
        data, zeros = trace.data["ram0"], trace.zeros["ram0"]
        for offset, empty in ((0, True), (1, False), (2, True)):
            assert _holds(data, spot + offset)
            assert _holds(zeros, spot + offset) is empty
        assert not _holds(data, spot + 64)
        assert data.count() <= ram.allocated() // PAGE_SIZE

        everything = united(r.written["ram0"] for r in trace.records)
        inside = np.intersect1d(numbers(everything), WORKING_SET)
        assert len(everything) - len(inside) <= OTHER_PAGES
        # a page each millisecond, by the guest's own clock, unless it was starved
        assert 0 < len(inside) <= 1.2 * 1000 * trace.seconds
        walk = [np.intersect1d(numbers(r.written["ram0"]), WORKING_SET) for r in trace.records]
        steps = np.concatenate([w for w in walk if len(w)])
        jumps = np.count_nonzero(~np.isin(np.diff(steps), (0, 1)))
        assert jumps <= 1  # where it begins anew

    with_source(body)


def _holds(pages: Any, page: int) -> bool:
    return bool(pages.words[page // 64] >> np.uint64(page % 64) & np.uint64(1))


def test_a_recorded_vm_is_as_it_was_and_can_be_moved(tmp_path: Path) -> None:
    async def run() -> None:
        from tests.live.vms import pair

        async with pair(Machine(workload=STEADY)) as vms:
            await recorded(vms, tmp_path / "a.trace", Options(0.5, 0.05))
            assert vms.traces(vms.source) == []
            assert await vms.state(vms.source) == "running"
            await move(vms)
            await vms.check_heartbeat_unbroken()

    asyncio.run(run())


def test_a_recording_can_be_simulated(tmp_path: Path) -> None:
    """A fast walker, slow links and fast ones: what is sent grows as the link gets slower."""
    path = tmp_path / "a.trace"
    workload = Workload(working_set_bytes=32 * MIB, start=32 * MIB, pages_per_s=2000)

    async def body(vms: Pair) -> None:
        await recorded(vms, path)

    with_source(body, Machine(workload=workload))
    guest = Replay(read(path))
    rate = 2000 * PAGE_SIZE
    sent = []
    for times in (30.0, 5.0, 2.0):
        policy = policy_of("send-all", Limits(1000.0), Fixed())
        outcome = migrate(guest, policy, times * rate, Costs())
        assert outcome.converges, outcome.report.reason
        sent.append(outcome.report.bytes_sent)
    assert sent == sorted(sent)
    assert sent[0] >= (guest.data["ram0"] - guest.zeros["ram0"]).count() * PAGE_SIZE


def command(vms: Pair, path: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [MIGRATOR, "record", "--source", vms.source.qmp, "-o", str(path), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def grows(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a few records are in the file."""
    deadline = asyncio.get_running_loop().time() + 60
    size = -1
    for _ in range(6):
        before = size
        while not path.exists() or (size := path.stat().st_size) <= before:
            assert process.poll() is None, process.communicate()
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_recording_is_whole(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "a.trace"

    async def body(vms: Pair) -> None:
        with command(vms, path, "--json") as process:
            await grows(path, process)
            process.send_signal(number)
            out, err = await asyncio.to_thread(process.communicate)
        assert process.returncode == 0
        assert "the VM goes on" in err
        trace = read(path)
        assert trace.whole
        assert json.loads(out)["records"] == len(trace.records) > 0

    with_source(body)


def test_a_killed_recording_leaves_the_vm_alone_and_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"

    async def body(vms: Pair) -> None:
        with command(vms, path) as process:
            await grows(path, process)
            process.kill()
            await asyncio.to_thread(process.communicate)
        assert read(path).records

    with_source(body)


def test_a_vm_that_ends_ends_the_recording(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"

    async def body(vms: Pair) -> None:
        with command(vms, path, "--json") as process:
            await grows(path, process)
            os.kill(vms.source.pid, signal.SIGKILL)
            out, _ = await asyncio.to_thread(process.communicate)
        assert process.returncode == 1
        assert "has ended" in json.loads(out)["reason"]
        assert read(path).records

    with_source(body)


@pytest.mark.parametrize("where", ["none/a.trace", ""])
def test_a_file_that_cannot_be_written(tmp_path: Path, where: str) -> None:
    async def body(vms: Pair) -> None:
        with pytest.raises(TraceError) as caught:
            await recorded(vms, tmp_path / where)
        assert not isinstance(caught.value, VmError)
        assert vms.traces(vms.source) == []

    with_source(body)


def test_a_full_disk_is_said_to_be_one(tmp_path: Path) -> None:
    async def body(vms: Pair) -> None:
        with pytest.raises(MigratorError, match="No space left"):
            await recorded(vms, Path("/dev/full"))

    with_source(body)
