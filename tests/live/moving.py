"""What the live tests share: moving a pair's VM, and reaching into a QEMU's RAM meanwhile."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from migrator import Limits, Options, Progress, Report, migrate
from migrator.qemu.process import Vm
from migrator.report.phases import Phase
from tests.live.vms import Machine, Pair
from tracker.memory.ram import RamBlock, find_block, open_file

Watch = Callable[[Progress], None]

VERIFIED = Options(limits=Limits(on_limit="force"), verify=True)
"""A busy machine may be too slow for the guest, and what is tested is not how fast it is."""


@dataclass(frozen=True)
class TwoKinds(Machine):
    """A machine whose two sides are not started alike.

    :ivar destination_ram_path: ``ram_path`` of the destination, where not the same
    :ivar destination_qemu: likewise ``qemu``
    :ivar destination_machine: likewise ``machine``
    """

    destination_ram_path: str = ""
    destination_qemu: Sequence[str] = ()
    destination_machine: str = ""

    def arguments(self, image: Path, console: Path, *, destination: bool = False) -> list[str]:
        side = self
        if destination:
            side = replace(
                self,
                ram_path=self.destination_ram_path or self.ram_path,
                qemu=self.destination_qemu or self.qemu,
                machine=self.destination_machine or self.machine,
            )
        return Machine.arguments(side, image, console, destination=destination)


def once(phase: Phase, action: Callable[[], object]) -> Watch:
    """Do something when a migration enters a phase, before it does anything in it.

    At ``ROUNDS``, everything has been sent once, and nothing was collected since.
    """
    done: list[bool] = []

    def watch(progress: Progress) -> None:
        if progress.phase == phase.value and not done:
            done.append(True)
            action()

    return watch


async def move(vms: Pair, watch: Watch = lambda _: None, options: Options = VERIFIED) -> Report:
    """Migrate the VM, verifying it; check all that holds for every migration of a running one."""
    report = await migrate(vms.source.qmp, vms.destination.qmp, options, watch=watch)
    assert report.status == "completed"
    assert report.mismatched_pages == 0
    assert report.verified_pages
    assert await vms.state(vms.source) == "postmigrate"
    assert await vms.state(vms.destination) == "running"
    assert vms.traces(vms.source) == vms.traces(vms.destination) == []
    assert report.qemu_ram_transferred is not None
    assert report.qemu_ram_transferred < vms.machine.memory // vms.machine.nodes
    return report


async def check_still_at_source(vms: Pair) -> None:
    """Check that the source runs with nothing of ours in it, and the destination never ran."""
    assert await vms.state(vms.source) == "running"
    assert vms.traces(vms.source) == []
    await vms.beats(vms.source, 3)
    assert vms.destination.console.read_bytes() == b""


class Ram:
    """A RAM block of a QEMU, written as QEMU itself writes it: through its own page tables."""

    def __init__(self, vm: Vm, machine: Machine, node: int = 0) -> None:
        self._pid = vm.pid
        size = machine.memory // machine.nodes
        self.block: RamBlock = find_block(vm.pid, f"ram{node}", size, machine.ram_path)

    def write(self, offset: int, data: bytes) -> None:
        with open(f"/proc/{self._pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(self.block.hva + offset)
            assert memory.write(data) == len(data)

    def read(self, offset: int, length: int) -> bytes:
        """Read through QEMU's page tables; a hole is filled by that."""
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
            memory.seek(self.block.hva + offset)
            return memory.read(length)

    def discard(self, offset: int, length: int) -> None:
        """Punch a hole, as a balloon or free page reporting does."""
        with self.file() as fd, mmap.mmap(fd, self.block.size) as mapped:
            mapped.madvise(mmap.MADV_REMOVE, offset, length)

    def is_hole(self, offset: int, length: int) -> bool:
        """Whether the file has nothing at all there; not on hugetlbfs, which does not tell."""
        with self.file() as fd:
            try:
                return os.lseek(fd, offset, os.SEEK_DATA) >= offset + length
            except OSError:  # no data from there to the end
                return True

    def allocated(self) -> int:
        """Bytes that the file holds."""
        with self.file() as fd:
            return os.fstat(fd).st_blocks * 512

    @contextmanager
    def file(self) -> Iterator[int]:
        """A descriptor of the file: what is written to it passes by QEMU's page tables."""
        fd = open_file(self._pid, self.block)
        try:
            yield fd
        finally:
            os.close(fd)
