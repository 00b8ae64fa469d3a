"""VMs that are watched: what is told is what the guest does, and nothing of it stays behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from numpy.typing import NDArray

from migrator import Failed, MigratorError, Refused, migrate
from migrator.cli.watch import watch as watch_command
from migrator.errors import QmpUnreachable, VmError
from migrator.guest.workload import PAGE_SIZE, Workload
from migrator.policy.judge import Limits
from migrator.qemu.qmp import Qmp
from migrator.tracking.strategies import COARSE, STRATEGIES
from migrator.watch.sample import CELLS, Sight
from migrator.watch.watch import Options, watch
from tests.live.moving import Ram, move
from tests.live.vms import MIB, Machine, Pair, pair
from tests.live.watching import (
    BRIEF,
    LONGER,
    MIGRATOR,
    OTHER_PAGES,
    SPOT,
    STEADY,
    Body,
    cells_of,
    goes_on,
    heat,
    hot,
    seen,
    sees_the_working_set,
    with_source,
)
from tests.tracker.mapper import Mapper
from tracker.answered.uffdsync import UffdSync
from tracker.memory.address import find_block_at
from tracker.memory.ram import RamBlock
from tracker.sources.contenthash import ContentHash
from tracker.sources.pagemap import soft_dirty_missing
from tracker.sources.softdirty import SoftDirty
from tracker.sources.uffd import UffdAsync

pytestmark = pytest.mark.live

KEYS = {
    *("at_s", "over_s", "state", "tracker", "notes", "dirty_pages_per_s", "dirty_bytes_per_s"),
    *("working_set_bytes", "blocks", "forecast"),
}


@dataclass(frozen=True)
class Otherwise(Machine):
    """A machine with its RAM said in other words.

    :ivar ram: all arguments that say so, of 256 MiB
    """

    ram: str = ""

    def arguments(self, image: Path, console: Path, *, destination: bool = False) -> list[str]:
        usual = Machine.arguments(self, image, console, destination=destination)
        start, stop = usual.index("-machine"), usual.index("-nodefaults")
        return [*usual[:start], *self.ram.split(), *usual[stop:]]


def first(action: Callable[[], object]) -> Callable[[Sight], None]:
    """Do something once, when the first interval is over."""
    done: list[bool] = []

    def each(_: Sight) -> None:
        if not done:
            done.append(True)
            action()

    return each


class Written:
    """How often the guest has written each page of its working set, whoever tells what.

    :ivar counts: modulo 256, each time it was looked at
    """

    def __init__(self, pid: int, workload: Workload) -> None:
        self._pid = pid
        self._workload = workload
        self.counts: list[NDArray[np.uint8]] = []

    def look(self, block: RamBlock, offset: int = 0) -> None:
        """Read through QEMU's page tables.

        :param offset: guest-physical address of the block's first byte
        """
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
            memory.seek(block.hva + self._workload.start - offset)
            content = memory.read(self._workload.working_set_bytes)
        self.counts.append(np.frombuffer(content, np.uint8)[::PAGE_SIZE])

    def writes(self, since: int, until: int = -1) -> int:
        return int((self.counts[until] - self.counts[since]).astype(np.int64).sum())

    def pages(self, since: int, until: int = -1) -> int:
        return int(np.count_nonzero(self.counts[until] - self.counts[since]))

    def check_rate(self, sights: Sequence[Sight]) -> None:
        """Check the rates that were told against the looks, one at the end of each interval.

        However busy the machine is: an interval ends a little before its look.
        """
        told = sum(sight.dirty_pages_per_s["uffd"] * sight.over_s for sight in sights[1:])
        steps = [self.writes(i, i + 1) for i in range(len(self.counts) - 1)]
        assert sum(steps) > 100
        assert sum(steps[:-1]) <= told <= sum(steps) + max(steps) + OTHER_PAGES * len(sights)


# -- what is told is so -------------------------------------------------------------------------


@pytest.mark.thorough
def test_rate_and_working_sets() -> None:
    async def body(vms: Pair) -> None:
        written = Written(vms.source.pid, STEADY)
        sights = await seen(
            vms,
            Options(seconds=14, interval_s=1.0),
            lambda sight: written.look(sight.blocks[0].block),
        )
        written.check_rate(sights)
        told = sum(sight.dirty_pages_per_s["uffd"] * sight.over_s for sight in sights[1:])
        in_bytes = sum(sight.dirty_bytes_per_s * sight.over_s for sight in sights[1:])
        assert in_bytes == pytest.approx(told * PAGE_SIZE, rel=0.05)

        for sight in sights:  # each second is an interval, and each page is written once in it
            pages = sight.dirty_bytes_per_s * sight.over_s
            assert sight.working_set_bytes[1] == pytest.approx(pages, rel=0.01)
        last = sights[-1]
        gaps = [abs(last.at_s - sight.at_s - 10) for sight in sights[:-1]]
        since = gaps.index(min(gaps))
        told_bytes = last.working_set_bytes[10]
        assert told_bytes is not None
        pages = told_bytes / PAGE_SIZE
        assert written.pages(since, -2) <= pages <= written.pages(since - 1) + OTHER_PAGES
        assert last.working_set_bytes[60] is None
        assert sights[0].working_set_bytes[10] is None

    with_source(body)


def test_a_page_that_is_written_twice_is_one_page() -> None:
    """At full speed, each page of a small working set is written many times a second."""
    workload = Workload(working_set_bytes=4 * MIB)

    async def body(vms: Pair) -> None:
        for sight in await seen(vms, Options(seconds=3, interval_s=1.0)):
            told = sight.working_set_bytes[1]
            assert told == pytest.approx(4 * MIB, rel=0.1)
            assert sight.dirty_bytes_per_s * sight.over_s == pytest.approx(4 * MIB, rel=0.1)

    with_source(body, Machine(workload=workload))


@pytest.mark.parametrize("start", [32 * MIB, 128 * MIB])
def test_the_strip_is_hot_where_the_guest_writes(start: int) -> None:
    workload = Workload(working_set_bytes=16 * MIB, start=start)

    async def body(vms: Pair) -> None:
        last = (await seen(vms))[-1]
        assert hot(last) == cells_of(workload, 256 * MIB)
        cells = heat(last)
        for cell in set(range(CELLS)).difference(hot(last)):
            assert cells[cell] < cells[hot(last)].min() / 20

    with_source(body, Machine(workload=workload))


def test_huge_pages(hugetlbfs: Path) -> None:
    """As many of them as there are cells."""
    workload = Workload(working_set_bytes=8 * MIB, start=32 * MIB)

    async def body(vms: Pair) -> None:
        last = (await seen(vms))[-1]
        assert last.blocks[0].block.page_size == 2 * MIB
        assert hot(last) == [0, *cells_of(workload, 128 * MIB)]
        assert (heat(last)[16:20] > 0.9).all()

    machine = Machine(memory=128 * MIB, ram_path=str(hugetlbfs), workload=workload)
    with_source(body, machine)


# -- strategies ---------------------------------------------------------------------------------


def test_the_command_has_all_of_them() -> None:
    (option,) = [p for p in watch_command.params if p.name == "strategy"]
    assert isinstance(option.type, click.Choice)
    assert set(option.type.choices) == {"auto", *STRATEGIES}


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != SoftDirty.name])
def test_each_sees_the_working_set(strategy: str) -> None:
    """Soft-dirty, which not every kernel has, does so in the lab."""
    sees_the_working_set(strategy)


@pytest.mark.parametrize("strategy", [UffdAsync.name, ContentHash.name])
def test_a_write_that_changes_nothing(strategy: str) -> None:
    """Only who compares does not count it. (Where faults are answered, we cannot write here.)"""

    async def body(vms: Pair) -> None:
        ram = Ram(vms.source, vms.machine)
        ram.write(SPOT, b"x" * PAGE_SIZE)
        warmth = []

        def each(sight: Sight) -> None:
            warmth.append(float(heat(sight)[SPOT // (4 * MIB)]))
            if len(warmth) == 1:
                ram.write(SPOT, b"x" * PAGE_SIZE)
            if len(warmth) == 3:
                ram.write(SPOT, b"y" * PAGE_SIZE)

        sights = await seen(vms, replace(LONGER, strategy=strategy), each)
        assert len(sights) > 3
        assert warmth[0] == 0
        assert (warmth[1] > 0) is (strategy == UffdAsync.name)
        assert warmth[3] > warmth[2]

    with_source(body)


def test_those_that_read_memory_say_so() -> None:
    async def body(vms: Pair) -> None:
        for strategy in (ContentHash.name, COARSE):
            told = (await seen(vms, replace(BRIEF, strategy=strategy)))[0]
            assert any(f"{strategy} reads all memory" in note for note in told.notes)
        told = (await seen(vms, replace(BRIEF, strategy=UffdSync.name)))[0]
        assert not any("reads all memory" in note for note in told.notes)

    with_source(body)


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != UffdAsync.name])
def test_what_needs_a_file_says_so(strategy: str) -> None:
    async def body(vms: Pair) -> None:
        with pytest.raises(Refused, match=rf"{strategy} needs RAM .* shared file.*--strategy uffd"):
            await seen(vms, replace(BRIEF, strategy=strategy))

    with_source(body, Otherwise(workload=STEADY, ram=OTHER_RAM["memory-backend-ram"]))


def test_a_kernel_without_soft_dirty_says_so() -> None:
    if not soft_dirty_missing():
        pytest.skip("this kernel has soft-dirty bits")

    async def body(vms: Pair) -> None:
        process = await command(vms, "--json", "--strategy", SoftDirty.name)
        out, err = await asyncio.wait_for(process.communicate(), 120)
        assert process.returncode != 0
        reason = json.loads(out)["reason"]
        assert "soft-dirty: not in this kernel" in reason
        assert "--strategy uffd" in reason
        assert "Traceback" not in err.decode()

    with_source(body)


# -- and what else is told ----------------------------------------------------------------------


def test_what_was_written_once_cools() -> None:
    async def body(vms: Pair) -> None:
        ram = Ram(vms.source, vms.machine)
        data = b"x" * (4 * MIB)
        write = first(lambda: ram.write(SPOT, data))
        warmth = []

        def each(sight: Sight) -> None:
            warmth.append(heat(sight)[SPOT // (4 * MIB)])
            write(sight)

        sights = await seen(vms, LONGER, each)
        assert warmth[0] == 0
        assert warmth[1] > 0
        assert warmth[-1] < warmth[1]
        told = sights[1].dirty_pages_per_s["uffd"] * sights[1].over_s
        assert told > len(data) // PAGE_SIZE

    with_source(body)


def test_discards_are_told_and_zeros_are_not() -> None:
    npages = 512

    async def body(vms: Pair) -> None:
        ram = Ram(vms.source, vms.machine)
        ram.write(SPOT, b"x" * npages * PAGE_SIZE)
        ram.write(SPOT + 32 * MIB, bytes(npages * PAGE_SIZE))  # data, though zeros
        sights = await seen(vms, LONGER, first(lambda: ram.discard(SPOT, npages * PAGE_SIZE)))
        told = [round(sight.dirty_pages_per_s["holes"] * sight.over_s) for sight in sights]
        assert told == [0, npages, *[0] * (len(sights) - 2)]
        assert heat(sights[-1])[SPOT // (4 * MIB)] > 0
        data = [sight.blocks[0].data_bytes for sight in sights]
        grown = [sight.dirty_pages_per_s["uffd"] * sight.over_s * PAGE_SIZE for sight in sights]
        assert data[1] - data[0] < grown[1] - npages * PAGE_SIZE + MIB

    with_source(body)


def test_a_vm_that_stands_still() -> None:
    async def body(vms: Pair) -> None:
        qmp = await Qmp.connect("source", vms.source.qmp)
        await qmp.execute("stop")
        await qmp.close()
        last = (await seen(vms))[-1]
        assert last.state == "paused"
        assert last.dirty_bytes_per_s < 10 * PAGE_SIZE
        assert last.forecast.converges
        assert await vms.state(vms.source) == "paused"

    with_source(body)


@pytest.mark.parametrize(("mib_per_s", "converges"), [(2.0, False), (4000.0, True)])
def test_the_forecast(mib_per_s: float, converges: bool) -> None:
    """At full speed all of the working set is dirty again after the shortest time."""

    async def body(vms: Pair) -> None:
        limits = Limits(downtime_ms=100.0)
        last = (await seen(vms, Options(1.2, 0.4, mib_per_s * MIB, limits)))[-1]
        assert last.forecast.converges is converges
        copied_s = last.blocks[0].data_bytes / (mib_per_s * MIB)
        assert last.forecast.total_s > copied_s
        if not converges:
            assert "does not converge" in last.forecast.reason
            assert last.forecast.downtime_ms > 16 / mib_per_s * 1000 * 0.7

    with_source(body, Machine(workload=Workload(working_set_bytes=16 * MIB)))


# -- private memory -----------------------------------------------------------------------------

OTHER_RAM = {
    "no backend": "-machine q35 -m 256M",
    "memory-backend-ram": "-machine q35,memory-backend=ram0 -m 256M "
    "-object memory-backend-ram,id=ram0,size=256M",
    "mostly above 4 GiB": "-machine q35,memory-backend=ram0,max-ram-below-4g=96M -m 256M "
    "-object memory-backend-ram,id=ram0,size=256M",
    "private file": "-machine q35,memory-backend=ram0 -m 256M "
    "-object memory-backend-file,id=ram0,size=256M,share=off,mem-path=/dev/shm",
    "shared ram": "-machine q35,memory-backend=ram0 -m 256M "
    "-object memory-backend-ram,id=ram0,size=256M,share=on",
    "memfd": "-machine q35,memory-backend=ram0 -m 256M "
    "-object memory-backend-memfd,id=ram0,size=256M,share=on",
}


@pytest.mark.parametrize("ram", list(OTHER_RAM))
def test_ram_that_cannot_be_moved(ram: str) -> None:
    workload = Workload(working_set_bytes=32 * MIB, start=32 * MIB, pages_per_s=4000)

    async def body(vms: Pair) -> None:
        written = Written(vms.source.pid, workload)
        sights = await seen(
            vms,
            Options(seconds=4, interval_s=0.4),
            lambda sight: written.look(sight.blocks[0].block),
        )
        written.check_rate(sights)
        assert set(hot(sights[-1])) <= set(cells_of(workload, 256 * MIB))
        assert sights[-1].blocks[0].block.has_file is (ram == "memfd")
        assert any("not moved" in note for note in sights[0].notes) is (ram != "memfd")

    with_source(body, Otherwise(workload=workload, ram=OTHER_RAM[ram]))


@pytest.mark.parametrize("node", [0, 1])
def test_private_nodes_of_one_size_are_told_apart(node: int) -> None:
    """By QEMU, who says where each of them is: their sizes do not."""
    nodes = "-machine q35 -m 256M"
    for number in range(2):
        nodes += f" -object memory-backend-ram,id=ram{number},size=128M"
        nodes += f" -numa node,nodeid={number},memdev=ram{number}"
    workload = Workload(working_set_bytes=8 * MIB, start=(32 + 128 * node) * MIB)

    async def body(vms: Pair) -> None:
        last = (await seen(vms))[-1]
        assert [one.block.name for one in last.blocks] == ["ram0", "ram1"]
        size = 128 * MIB // CELLS
        wanted = list(range(32 * MIB // size, 40 * MIB // size))
        assert hot(last, node) == wanted
        assert not heat(last, 1 - node)[wanted].any()

    with_source(body, Otherwise(workload=workload, ram=nodes))


def test_what_is_given_back_of_private_memory_counts_as_written() -> None:
    npages = 16
    with Mapper() as mapper:
        hva = int(mapper(f"reserve({npages * PAGE_SIZE})"))
        mapper(f"protect({hva}, {npages * PAGE_SIZE}, 3)")
        mapper(f"write({hva}, 7, {npages * PAGE_SIZE})")
        block = find_block_at(mapper.pid, "ram", npages * PAGE_SIZE, hva)
        source = UffdAsync(mapper.pid, [block])
        source.start()
        try:
            mapper(f"advise({hva + 3 * PAGE_SIZE}, {2 * PAGE_SIZE}, 4)")  # MADV_DONTNEED
            assert [array.tolist() for array in source.collect()["ram"].runs()] == [[3], [2]]
            assert not source.collect()["ram"].any()
        finally:
            source.stop()


def test_private_ram_that_the_guest_does_not_see_is_refused() -> None:
    async def body(vms: Pair) -> None:
        with pytest.raises(Refused, match=r"'spare'.*the guest does not see it"):
            await seen(vms)

    with_source(
        body, Machine(workload=STEADY, extra=["-object", "memory-backend-ram,id=spare,size=256M"])
    )


# -- how it ends --------------------------------------------------------------------------------


async def command(vms: Pair, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *[MIGRATOR, "watch", "--source", vms.source.qmp, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


async def first_line(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), 120)
    said = json.loads(line)
    assert isinstance(said, dict)
    return said


def test_json() -> None:
    async def body(vms: Pair) -> None:
        process = await command(vms, "--json", "--seconds", "3")
        out, err = await asyncio.wait_for(process.communicate(), 120)
        assert process.returncode == 0, err.decode()
        said = [json.loads(line) for line in out.splitlines()]
        assert 1 <= len(said) <= 3  # fewer on a busy machine
        for number, one in enumerate(said, 1):
            assert one.keys() == KEYS
            assert one["over_s"] > 0.9
            assert one["at_s"] == pytest.approx(sum(o["over_s"] for o in said[:number]), abs=0.1)
            assert one["working_set_bytes"].keys() == {"1", "10", "60"}
            assert one["dirty_pages_per_s"].keys() == {"uffd", "holes"}
            (block,) = one["blocks"]
            assert len(block["heat"]) == CELLS
            assert (block["name"], block["bytes"], block["file"]) == ("ram0", 256 * MIB, True)
            assert one["forecast"]["converges"] in (True, False)
        assert "working set" in err.decode()

    with_source(body)


def test_people_are_told_on_stderr_only() -> None:
    async def body(vms: Pair) -> None:
        process = await command(vms, "--seconds", "1")
        out, err = await asyncio.wait_for(process.communicate(), 120)
        assert (process.returncode, out) == (0, b"")
        assert "ram0, 256.0 MiB" in err.decode()
        assert set("▁▂▃▄▅▆▇█") & set(err.decode().splitlines()[-1])

    with_source(body)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGKILL, -9)]
)
def test_interrupted(number: signal.Signals, code: int) -> None:
    async def body(vms: Pair) -> None:
        process = await command(vms, "--json", "--interval", "0.2")
        await first_line(process)
        assert vms.traces(vms.source) != []
        process.send_signal(number)
        _, err = await asyncio.wait_for(process.communicate(), 120)
        assert process.returncode == code
        assert "Traceback" not in err.decode()
        assert ("the VM goes on" in err.decode()) is (code == 0)

    with_source(body)


def test_a_reader_that_has_read_enough() -> None:
    async def body(vms: Pair) -> None:
        done = await asyncio.create_subprocess_shell(
            f"{MIGRATOR} watch --source {vms.source.qmp} --json --interval 0.2 | head -n 1",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(done.communicate(), 120)
        assert len(out.splitlines()) == 1
        assert "Traceback" not in err.decode()

    with_source(body)


@pytest.mark.parametrize("how", ["killed", "quit"])
def test_the_vm_ends(how: str) -> None:
    async def body(vms: Pair) -> None:
        process = await command(vms, "--json", "--interval", "0.2")
        await first_line(process)
        if how == "killed":
            os.kill(vms.source.pid, signal.SIGKILL)
        else:
            os.kill(vms.source.pid, signal.SIGTERM)
        out, err = await asyncio.wait_for(process.communicate(), 120)
        assert process.returncode == 1
        said = json.loads(out.splitlines()[-1])
        assert said == {
            "status": "failed",
            "reason": f"source: QEMU, process {vms.source.pid}, has ended",
        }
        assert "has ended" in err.decode()
        assert "Traceback" not in err.decode()

    with_source(body)


def test_ram_that_is_plugged_meanwhile() -> None:
    async def body(vms: Pair) -> None:
        second = vms.directory / "second.qmp"

        async def plug() -> None:
            qmp = await Qmp.connect("source", str(second))
            arguments = {"qom-type": "memory-backend-ram", "id": "more", "size": 16 * MIB}
            await qmp.execute("object-add", **arguments)
            await qmp.close()

        tasks: list[asyncio.Task[None]] = []
        with pytest.raises(VmError, match="its memory backends changed"):
            await seen(
                vms,
                Options(seconds=60, interval_s=0.2),
                first(lambda: tasks.append(asyncio.ensure_future(plug()))),
            )
        await tasks[0]

    with_second_socket(body)


# -- two at once --------------------------------------------------------------------------------


def with_second_socket(body: Body) -> None:
    """One whose name is known only when the run directory is."""

    async def run() -> None:
        async with pair(Machine(workload=STEADY), start=False) as vms:
            arguments = vms.machine.arguments(vms.image, vms.source.console)
            arguments += ["-qmp", f"unix:{vms.directory / 'second.qmp'},server=on,wait=off"]
            await vms.start_destination()
            await vms.source.start(arguments, incoming=False)
            await vms.beats(vms.source, 3)
            await body(vms)

    asyncio.run(run())


def test_two_at_once() -> None:
    async def body(vms: Pair) -> None:
        process = await command(vms, "--json", "--interval", "0.2")
        await first_line(process)
        second = str(vms.directory / "second.qmp")
        with pytest.raises(VmError, match="somebody else has a userfaultfd on it"):
            await watch(second, BRIEF, lambda _: None)
        with pytest.raises(Failed, match="somebody else has a userfaultfd on it"):
            await migrate(second, vms.destination.qmp)
        with pytest.raises(QmpUnreachable, match="is another client connected"):
            await watch(vms.source.qmp, BRIEF, lambda _: None)
        assert vms.traces(vms.source) != []  # still watched
        await first_line(process)
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.communicate(), 120)
        assert process.returncode == 0
        await goes_on(vms)
        await move(vms)

    with_second_socket(body)


def test_nobody_listens() -> None:
    with pytest.raises(MigratorError, match="No such file"):
        asyncio.run(watch("/no/such", BRIEF, lambda _: None))
