"""A guest reads a disk past the page cache, while its RAM is tracked and copied.

Its page is marked when the read pins it, and the data arrive later: whoever collects and copies the
page in between has lost them, as nobody reports it again. Two things find them, and here is that
both are needed: what was reported is compared again once nothing is in flight any more, and the
copying begins only when what was in flight before the tracking began has ended.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from migrator.guest.workload import MIB, heartbeats
from migrator.qemu.qmp import Qmp
from tests.conftest import require
from tests.live.qemus import SYSTEM, Qemu, each_qemu
from tests.live.reader_guest import Reader, Reading, boot_image, listing
from tests.live.slowdisk import Read, SlowDisk, content, slow_disk
from tests.live.tracked import NAME, PAGE, pages
from tests.live.vms import Pair, pair
from tracker.memory.ram import find_block, open_file
from tracker.sources.uffd import UffdAsync
from tracker.warm import warm_up

pytestmark = pytest.mark.live


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    warm_up()


class Copy:
    """What a migration has sent of a VM's RAM so far, kept as a migration keeps it."""

    def __init__(self, vms: Pair) -> None:
        pid, machine = vms.source.pid, vms.machine
        self.block = find_block(pid, NAME, machine.memory, machine.ram_path)
        self._fd = open_file(pid, self.block)
        self._tracker = UffdAsync(pid, [self.block])
        self._copy = np.zeros((self.block.npages, PAGE), np.uint8)

    def start(self) -> None:
        self._tracker.start()

    def collect(self) -> set[int]:
        """Collect, and only then copy what was collected; return that."""
        reported = set(pages(self._tracker.collect()[NAME]).tolist())
        self.take(reported)
        return reported

    def take(self, numbers: set[int]) -> None:
        for page in numbers:
            assert os.preadv(self._fd, [self._copy[page]], page * PAGE) == PAGE

    def take_everything(self) -> None:
        self._copy[:] = self.now()

    def now(self) -> NDArray[np.uint8]:
        """Every byte of the RAM; shape (npages, PAGE)."""
        now = np.empty_like(self._copy)
        view, at = now.data.cast("B"), 0
        while at < len(view):
            n = os.preadv(self._fd, [view[at:]], at)
            assert n > 0
            at += n
        return now

    def differing(self) -> set[int]:
        return set(np.flatnonzero((self._copy != self.now()).any(axis=1)).tolist())

    def brought_by(self, read: Read) -> set[int]:
        """Pages that hold what a read has brought."""
        return set(np.flatnonzero(self.now().view("<u8")[:, 0] == read.number).tolist())

    def close(self) -> None:
        self._tracker.stop()
        os.close(self._fd)


class Reads:
    """A running QEMU whose guest reads a slow disk.

    :ivar ram: its RAM, and a copy of it
    """

    def __init__(self, disk: SlowDisk, vms: Pair, machine: Reader, qmp: Qmp) -> None:
        self.disk, self.vms, self.reading = disk, vms, machine.reading
        self.ram = Copy(vms)
        self._qmp = qmp

    def hold(self) -> Read:
        """Let the guest's next read stay in flight; return once it is."""
        self.disk.hold()
        return self.disk.await_read()

    async def stop(self) -> None:
        """Let QEMU stop the guest; it has done so once nothing is in flight any more."""
        # slowly: the guest must not come round to the same memory again meanwhile
        self.disk.flow(each_ms=20)
        await self._qmp.execute("stop")
        assert self.disk.state.in_flight == ()

    async def cont(self) -> None:
        await self._qmp.execute("cont")

    def brought_by(self, read: Read) -> set[int]:
        """Pages that hold what a read has brought; all of it is there."""
        found = self.ram.brought_by(read)
        assert len(found) == self.reading.read_bytes // PAGE
        return found


def with_reads(
    qemu: Qemu, body: Callable[[Reads], Coroutine[Any, Any, None]], **changes: Any
) -> None:
    machine = replace(Reader(qemu=qemu.require()), **changes)

    async def run() -> None:
        async with AsyncExitStack() as stack:
            disk = stack.enter_context(slow_disk(machine.reading.disk_bytes))
            vms = await stack.enter_async_context(
                pair(replace(machine, disk=disk.path), start=False)
            )
            await vms.start_source()
            qmp = await Qmp.connect("source", vms.source.qmp)
            stack.push_async_callback(qmp.close)
            reads = Reads(disk, vms, machine, qmp)
            stack.callback(reads.ram.close)
            stack.callback(disk.flow)
            await body(reads)

    asyncio.run(run())


@each_qemu
def test_what_arrives_after_it_was_copied_is_lost_unless_compared(qemu: Qemu) -> None:
    async def body(reads: Reads) -> None:
        ram = reads.ram
        ram.start()
        await reads.stop()
        await reads.cont()
        ram.take_everything()
        read = reads.hold()
        reported = ram.collect()
        later = ram.collect()
        await reads.stop()
        later |= ram.collect()

        lost = reads.brought_by(read)
        assert lost <= reported
        assert not lost & later
        assert ram.differing() == lost
        ram.take(ram.differing() & reported)  # what comparing does
        assert ram.differing() == set()

    with_reads(qemu, body)


@each_qemu
def test_what_was_in_flight_when_tracking_began_is_never_reported(qemu: Qemu) -> None:
    async def body(reads: Reads) -> None:
        ram = reads.ram
        read = reads.hold()
        ram.start()
        ram.take_everything()
        await reads.stop()
        reported = ram.collect()

        lost = reads.brought_by(read)
        assert not lost & reported  # comparing what was reported does not find it
        assert ram.differing() == lost

    with_reads(qemu, body)


@each_qemu
def test_what_was_in_flight_when_tracking_began_is_awaited(qemu: Qemu) -> None:
    async def body(reads: Reads) -> None:
        ram = reads.ram
        read = reads.hold()
        ram.start()
        await reads.stop()
        await reads.cont()
        ram.take_everything()
        await reads.stop()
        ram.collect()

        assert reads.brought_by(read)
        assert ram.differing() == set()

    with_reads(qemu, body)


def test_through_the_page_cache_nothing_is_lost() -> None:
    async def body(reads: Reads) -> None:
        ram = reads.ram
        ram.start()
        ram.take_everything()
        # Opening it empties the file's page cache, which otherwise has it all (Linux:
        # fs/fuse/file.c), and waits for whoever reads meanwhile: nothing is held yet, and the guest
        # takes seconds to fill the cache again.
        reads.disk.delay(200)
        os.close(os.open(reads.disk.path, os.O_RDONLY))
        reads.disk.hold()
        reads.disk.await_read()
        ram.collect()
        await reads.stop()
        assert ram.differing()
        ram.collect()
        assert ram.differing() == set()

    with_reads(SYSTEM, body, direct=False)


# --- the guest ------------------------------------------------------------------------------------


@each_qemu
def test_the_guest_reads_one_place_after_the_other(qemu: Qemu) -> None:
    reading = Reading(length=MIB, disk_bytes=MIB // 2, reads_per_heartbeat=2)
    places = reading.length // reading.read_bytes

    async def body(reads: Reads) -> None:
        await reads.vms.beats(reads.vms.source, 2 * places // reading.reads_per_heartbeat)
        await reads.stop()
        beats = heartbeats(reads.vms.source.console.read_bytes())
        assert beats == list(range(len(beats)))
        ram = reads.ram.now().reshape(-1)[reading.start : reading.end]
        numbers, offsets = [], []
        for brought in ram.reshape(places, reading.read_bytes):
            number, offset = brought[:16].view("<u8").tolist()
            assert brought.tobytes() == content(number, offset, reading.read_bytes)
            numbers.append(number)
            offsets.append(offset)
        newest = numbers.index(max(numbers))
        assert np.roll(numbers, -1 - newest).tolist() == list(
            range(max(numbers) - places + 1, max(numbers) + 1)
        )
        assert offsets == [
            place * reading.read_bytes % reading.disk_bytes for place in range(places)
        ]
        assert max(numbers) == reads.disk.state.reads

    with_reads(qemu, body, reading=reading)


def test_bytes_and_mnemonics_agree(tmp_path: Path) -> None:
    for tool in ("as", "ld"):
        require(None if shutil.which(tool) else f"no {tool} (binutils)")
    # numbers too wide for a sign-extended byte
    reading = Reading(
        start=0x0123_8000,
        length=0x0100_0000,
        read_bytes=0x8000,
        disk_bytes=0x0034_0000,
        reads_per_heartbeat=0x1234,
    )
    source, elf, binary = (tmp_path / name for name in ("boot.s", "boot.o", "boot.bin"))
    source.write_text(listing(reading))
    subprocess.run(["as", "--32", "-o", elf, source], check=True)
    link = ["ld", "-m", "elf_i386", "-Ttext=0x7c00", "-e", "0x7c00", "--oformat", "binary"]
    subprocess.run([*link, "-o", binary, elf], check=True)
    code = binary.read_bytes()
    assert len(code.rstrip(b"\0")) > 300
    assert boot_image(reading) == code.ljust(MIB, b"\0")
