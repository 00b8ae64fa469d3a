"""The synthetic guests, in a real QEMU: they do what their workload says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.guests import patterns, tableguest
from bench.guests.guests import SYNTHETIC, Guest
from migrator import migrate
from migrator.guest.workload import MIB, PAGE_SIZE
from tests.bench.running import Running, run
from tests.live.moving import VERIFIED
from tests.live.qemus import SYSTEM
from tracker.bits.bitmap import DirtyBitmap

live = pytest.mark.live

NPAGES = 4 * MIB // PAGE_SIZE
FIRST = tableguest.START // PAGE_SIZE

Counts = NDArray[np.int64]


def guest(workload: str, pages_per_s: int = 0) -> Guest:
    (qemu,) = SYSTEM.require()
    return Guest(workload, 64 * MIB, qemu, NPAGES * PAGE_SIZE, pages_per_s)


def changed(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Indices of the pages that differ."""
    differ = before.reshape(-1, PAGE_SIZE) != after.reshape(-1, PAGE_SIZE)
    return np.flatnonzero(differ.any(axis=1))


def increments(guest: Guest, ram: NDArray[np.uint8]) -> Counts:
    pattern = patterns.make(guest.workload, NPAGES, guest.pages_per_s)
    return patterns.increments(pattern, NPAGES, tableguest.accesses(ram))


@live
@pytest.mark.parametrize("workload", SYNTHETIC)
def test_writes_what_its_pattern_says_and_nothing_else(workload: str) -> None:
    it_is = guest(workload)

    async def test(it: Running) -> None:
        before = await it.stopped()
        assert it_is.problem(before) == ""
        await it.go_on()
        await it.beats(70)  # longer than a pause between bursts
        after = await it.stopped()
        assert it_is.problem(after) == ""
        it.pulse.check_beats()
        assert (tableguest.accesses(after) > tableguest.accesses(before)) == (workload != "idle")

        pages = changed(before, after)
        ours = pages[(pages >= FIRST) & (pages < FIRST + NPAGES)] - FIRST
        counted = increments(it_is, after) - increments(it_is, before)
        possible = np.flatnonzero(counted % 256)
        assert len(np.setxor1d(ours, possible)) <= 2  # in flight at either end
        others = set(np.setdiff1d(pages, ours + FIRST).tolist())
        table = range(tableguest.TABLE // PAGE_SIZE, FIRST)  # the ends of the stages
        most = patterns.GROWTH_STEPS if workload == "growing" else 1
        assert len(others & set(table)) <= most
        assert others - set(table) <= {tableguest.COUNTER // PAGE_SIZE}

        few = {"idle": 0, "same-bytes": 0, "read-mostly": NPAGES * 0.05}
        if workload in few:
            assert len(ours) <= few[workload]
            assert (len(ours) > 0) == (workload == "read-mostly")
        elif workload != "growing":  # which has as much only after a while
            assert np.count_nonzero(counted) > (0.8 if workload == "zipf" else 0.99) * NPAGES

    run(it_is, test)


@live
@pytest.mark.parametrize("workload", ["same-bytes", "idle", "read-mostly"])
def test_what_write_protection_sees(workload: str) -> None:
    """A rewritten page is a written page, though nothing changes; a page that is read is not."""

    async def test(it: Running) -> None:
        with it.tracked() as tracker:
            tracker.collect()
            before = np.array(it.ram())
            done = tableguest.accesses(before)
            if workload != "idle":  # twice over all, at least
                await it.until(lambda: tableguest.accesses(it.ram()) > done + 16 * NPAGES)
            await it.beats(5)
            written = tracker.collect()["ram"]
        after = np.array(it.ram())
        whole = DirtyBitmap.empty(written.npages)
        whole.set_range(FIRST, FIRST + NPAGES)
        seen = (written & whole).count()
        differ = len(changed(before, after))
        if workload == "same-bytes":
            assert seen == NPAGES
            assert differ <= 2  # the counter's, and the table's
        elif workload == "idle":
            assert seen == 0
        else:
            assert 0 < seen <= NPAGES * 0.05

    run(guest(workload), test)


@live
@pytest.mark.parametrize("workload", ["zipf", "bursts"])
def test_the_rate_is_obeyed(workload: str) -> None:
    """Of 120 ticks all but 60 are a burst's, and so many accesses are made in each of those."""
    it_is = guest(workload, pages_per_s=20_000)

    async def test(it: Running) -> None:
        done, beats = tableguest.accesses(await it.stopped()), it.pulse.beats(0)
        await it.go_on()
        await it.beats(120)
        done = tableguest.accesses(await it.stopped()) - done
        busy = it.pulse.beats(0) - beats
        if workload == "bursts":
            busy = busy // 60 * 30 + min(busy % 60, 30)
        # one heartbeat more or less at either end; and fewer if the guest got too little CPU
        assert 200 * (busy - 32) / 2 <= done <= 200 * (busy + 2)

    run(it_is, test)


@live
def test_bursts_pause() -> None:
    async def test(it: Running) -> None:
        ram = it.ram()
        since, done = 0, -1

        def paused() -> bool:
            nonlocal since, done
            if tableguest.accesses(ram) != done:
                since, done = it.pulse.beats(0), tableguest.accesses(ram)
            return it.pulse.beats(0) >= since + 15

        for _ in range(2):
            await it.until(paused)
            await it.until(lambda: tableguest.accesses(ram) > done)

    run(guest("bursts"), test)


@live
@pytest.mark.parametrize("workload", ["zipf", "growing", "bursts"])
def test_goes_on_where_it_was_after_a_migration(workload: str) -> None:
    it_is = guest(workload)

    async def test(it: Running) -> None:
        report = await migrate(it.vms[0].qmp, it.vms[1].qmp, VERIFIED)
        assert report.status == "completed"
        await it.beats(70, side=1)
        there = await it.stopped(1)
        assert it_is.problem(there) == ""
        assert tableguest.accesses(there) > tableguest.accesses(it.ram())
        it.pulse.check_beats()
        # and a page that had been lost would show
        there[tableguest.START + 5 * PAGE_SIZE] -= 2
        assert "page 5" in it_is.problem(there)

    run(it_is, test, destination=True)


# -- what is no guest ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("none", 64 * MIB), "'none' is none of idle, "),
        (("zipf", 64 * MIB), "give the VM more memory"),
        (("zipf", 64 * MIB, "qemu", 4097), "working_set_bytes"),
        (("zipf", 64 * MIB, "qemu", PAGE_SIZE), "less than 16 pages"),
        (("zipf", 128 * MIB, "qemu", 64 * MIB, -1), "pages_per_s"),
        (("linux-boot", 511 * MIB), "a Linux guest needs 512 MiB"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: tuple[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Guest(*arguments)


def test_guests_share_a_directory(tmp_path: Path) -> None:
    for workload in SYNTHETIC:
        Guest(workload, 128 * MIB).prepare(tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(files) == 2 * len(SYNTHETIC)
    Guest("zipf", 128 * MIB, pages_per_s=5).prepare(tmp_path)
    for name, content in files.items():
        assert (tmp_path / name).read_bytes() == content
