"""The built-in workload guest: what it is asked to do, its disk image, and its oracles.

The guest (:mod:`migrator.guest.bootsector`) needs no operating system. It shows whether a migration
lost anything, in two independent ways:

- its **RAM**: it adds one to the first byte of each page of its working set, in order, for ever.
  Whenever it is stopped, at most one edge (a page at v + 1 followed by one at v) may show over the
  working set, as in QEMU's ``tests/qtest/migration/framework.c:check_guests_ram``. A page that was
  not sent, or sent too early, is a second edge or a step of more than one: :func:`check_walk`.
- its **serial port**: numbered heartbeats. What source and destination wrote, one after the other,
  counts up without gap or repetition: :func:`heartbeats`.

It can also let a device write RAM meanwhile, by DMA (:mod:`migrator.guest.edu`), with an oracle of
its own: :func:`check_dma`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from migrator.guest import edu
from migrator.guest.bootsector import FULL_SPEED, PIT_HZ, Parameters, assemble

PAGE_SIZE = 4096
MIB = 1 << 20

LOWEST_START = MIB
"""Below lie the BIOS's data, this guest's code and stack, and the VGA and ROM windows."""

PCI_HOLE = 3 << 30
"""No machine has RAM between here and 4 GiB."""

FIRMWARE_BYTES = 18 * MIB
"""The end of low RAM: SeaBIOS keeps its tables in the last 16 MiB, and works just below them while
booting (0.2 MiB with a dozen PCI devices)."""

IMAGE_BYTES = MIB
"""SeaBIOS cannot read a disk of less than one cylinder (16 heads of 63 sectors)."""

_LONGEST_TICK_MS = 50  # the PIT's 16 bits reach 54.9 ms
_HEARTBEAT = re.compile(rb"[0-9a-f]{8}")


@dataclass(frozen=True)
class Workload:
    """What the guest does.

    :ivar working_set_bytes: how much it writes, over and over; whole pages
    :ivar start: guest-physical address of the first page
    :ivar pages_per_s: how fast it writes; 0 is as fast as it can. A guest that cannot keep up
        does not catch up later.
    :ivar heartbeat_ms: guest time between two heartbeats. One that a starved guest misses is not
        made up for, so they may come later, but their numbers never skip.
    :ivar dma_pages: how many pages an ``edu`` device writes, over and over, one every 100 ms; with
        0 the guest does not even look for the device
    :ivar dma_start: guest-physical address of the first of them
    :raise ValueError: one of them makes no sense; the text says what would
    """

    working_set_bytes: int = 64 * MIB
    start: int = 16 * MIB
    pages_per_s: int = 0
    heartbeat_ms: int = 10
    dma_pages: int = 0
    dma_start: int = 8 * MIB

    def __post_init__(self) -> None:
        for name in ("working_set_bytes", "start", "dma_start"):
            value = getattr(self, name)
            if value <= 0 or value % PAGE_SIZE:
                raise ValueError(
                    f"{name} is {value}: it must be a positive multiple of the page size, "
                    f"{PAGE_SIZE}"
                )
            if name.endswith("start") and value < LOWEST_START:
                raise ValueError(
                    f"{name} is {value:#x}: choose {LOWEST_START:#x} or more, the first MiB "
                    "belongs to the BIOS"
                )
        if self.end > PCI_HOLE:
            raise ValueError(
                f"the working set ends at {self.end:#x}, beyond the last low RAM a PC can have, "
                f"{PCI_HOLE:#x}: make working_set_bytes at most {PCI_HOLE - self.start} or start "
                "smaller"
            )
        if not 0 <= self.pages_per_s < 1 << 31:
            raise ValueError(
                f"pages_per_s is {self.pages_per_s}: choose 1 to {(1 << 31) - 1}, or 0 for full "
                "speed"
            )
        if not 1 <= self.heartbeat_ms <= 60_000:
            raise ValueError(f"heartbeat_ms is {self.heartbeat_ms}: choose 1 to 60000")
        if self.dma_pages < 0:
            raise ValueError(f"dma_pages is {self.dma_pages}: choose 0 or more")
        if self.dma_pages and self.dma_end > edu.DMA_LIMIT:
            raise ValueError(
                f"the device is to write up to {self.dma_end:#x}, but reaches {edu.DMA_LIMIT:#x} "
                "at most: make dma_pages or dma_start smaller"
            )
        if self.dma_pages and self.dma_start < self.end and self.start < self.dma_end:
            raise ValueError(
                f"the device is to write {self.dma_start:#x} to {self.dma_end:#x}, within the "
                f"working set, {self.start:#x} to {self.end:#x}: move dma_start or start"
            )

    @property
    def end(self) -> int:
        """Guest-physical address after the last page."""
        return self.start + self.working_set_bytes

    @property
    def npages(self) -> int:
        """Pages in the working set."""
        return self.working_set_bytes // PAGE_SIZE

    @property
    def dma_end(self) -> int:
        """Guest-physical address after the last page that the device writes."""
        return self.dma_start + self.dma_pages * PAGE_SIZE

    def check_fits(self, ram_bytes: int, machine: str) -> None:
        """Check that a VM has RAM for it, below the PCI hole, that its firmware leaves alone.

        :param ram_bytes: the VM's ``-m``
        :param machine: its ``-machine`` type, e.g. ``q35`` or ``pc-i440fx-7.2``
        :raise ValueError: it has not
        """
        usable = low_ram_bytes(ram_bytes, machine) - FIRMWARE_BYTES
        if self.end > usable:
            raise ValueError(
                f"the working set ends at {self.end:#x}, but a {machine} with "
                f"{ram_bytes // MIB} MiB of RAM has room for it only up to {max(usable, 0):#x}: "
                "give the VM more memory, or make working_set_bytes smaller by "
                f"{self.end - usable}"
            )
        if self.dma_pages and self.dma_end > usable:
            raise ValueError(
                f"the device is to write up to {self.dma_end:#x}, but a {machine} with "
                f"{ram_bytes // MIB} MiB of RAM has room only up to {max(usable, 0):#x}: give the "
                "VM more memory, or make dma_pages or dma_start smaller"
            )

    @property
    def parameters(self) -> Parameters:
        """The same in the units of the machine code."""
        ticks = -(-self.heartbeat_ms // _LONGEST_TICK_MS)
        divisor = round(PIT_HZ * self.heartbeat_ms / (1000 * ticks))
        # In 2**-32ths of a page, so that any rate comes out even over time.
        budget = (
            (self.pages_per_s * divisor << 32) // PIT_HZ if self.pages_per_s else FULL_SPEED << 32
        )
        return Parameters(
            start=self.start,
            end=self.end,
            pit_divisor=divisor,
            ticks_per_heartbeat=ticks,
            budget=budget >> 32,
            budget_fraction=budget & 0xFFFF_FFFF,
            dma=edu.Region(self.dma_start, self.dma_end) if self.dma_pages else None,
        )


def low_ram_bytes(ram_bytes: int, machine: str) -> int:
    """How much of a PC's RAM lies below the PCI hole, at the RAM's own beginning.

    As of QEMU's ``hw/i386/pc_q35.c`` and ``hw/i386/pc_piix.c`` with ``max-ram-below-4g`` unset.

    :param ram_bytes: the VM's ``-m``
    :param machine: its ``-machine`` type; anything that does not say ``q35`` is taken as i440fx
    """
    if "q35" in machine:
        return 2 << 30 if ram_bytes >= 0xB000_0000 else ram_bytes
    return 3 << 30 if ram_bytes >= 0xE000_0000 else ram_bytes


def boot_image(workload: Workload) -> bytes:
    """Make the guest's disk: its code, and nothing up to the smallest size that boots.

    :return: :data:`IMAGE_BYTES` bytes, a raw image
    """
    return assemble(workload.parameters).ljust(IMAGE_BYTES, b"\0")


def drive_args(path: str | os.PathLike[str]) -> list[str]:
    """Give the QEMU arguments that attach the image, and boot from it.

    A virtio disk, as that may be read-only (an IDE disk may not) on every PC machine type.
    Source and destination have the same file open at once: hence read-only, and no locks.

    :param path: the file with :func:`boot_image` in it
    """
    file = os.fspath(path).replace(",", ",,")
    return [
        "-drive",
        f"if=none,id=workload,format=raw,readonly=on,file.locking=off,file={file}",
        "-device",
        "virtio-blk-pci,drive=workload,bootindex=0",
    ]


def guest_args(path: str | os.PathLike[str]) -> list[str]:
    """Give all QEMU arguments of this guest but machine, RAM and the serial port.

    No default devices, no display, no boot menu: the first heartbeat comes a fraction of a second
    after QEMU starts.

    :param path: the file with :func:`boot_image` in it
    """
    return [
        *["-nodefaults", "-display", "none", "-vga", "none", "-boot", "menu=off,strict=on"],
        *drive_args(path),
    ]


def heartbeats(serial: bytes) -> list[int]:
    """Read the heartbeats' numbers.

    A VM can be stopped in the middle of a line, and the destination then writes the line's rest:
    parse what the source wrote followed by what the destination wrote, not each alone.

    :param serial: lines of eight lowercase hex digits; the last may be unfinished, and is ignored
    :raise ValueError: anything else is there; the text says at which byte. A guest that has no
        ``edu`` device to let write says so there, and never beats.
    """
    *lines, rest = serial.split(b"\n")
    at = 0
    for line in lines:
        if line == edu.NO_DEVICE:
            raise ValueError("the guest found no edu device on its PCI bus 0 that could do DMA")
        if not _HEARTBEAT.fullmatch(line):
            raise ValueError(f"not a heartbeat at byte {at} of the serial output: {line[:40]!r}")
        at += len(line) + 1
    if not re.fullmatch(rb"[0-9a-f]{0,8}", rest):
        raise ValueError(f"not a heartbeat at byte {at} of the serial output: {rest[:40]!r}")
    return [int(line, 16) for line in lines]


@dataclass(frozen=True)
class WalkCheck:
    """What :func:`check_walk` saw.

    :ivar edges: how many neighbouring pages differ; a walk leaves one, or none at the very end
    :ivar position: index in the working set of the page that is written next; 0 if there is no
        edge, and meaningless if the walk is not ok
    :ivar value: first byte of the first page: the number of passes begun, modulo 256. A guest that
        never ran shows 0 and no edge: demand more than ``ok`` where that matters.
    :ivar problem: what is wrong, empty if nothing is
    """

    edges: int
    position: int
    value: int
    problem: str

    @property
    def ok(self) -> bool:
        """Whether RAM is what an uninterrupted walk leaves."""
        return not self.problem


def check_walk(ram: NDArray[np.uint8], workload: Workload) -> WalkCheck:
    """Look for anything in a stopped guest's RAM that an uninterrupted walk does not leave.

    A lost write of the very last page written looks like a walk that is one page behind. Once the
    guest has walked past that page again it shows: check again after it has run for a while.

    :param ram: shape (bytes,), the RAM from guest-physical address 0 on, e.g. a memory map of the
        backing file. It is read at one byte a page; holes in a mapped tmpfs file get allocated.
    :param workload: what the guest was started with
    :raise ValueError: the RAM ends before the working set does
    """
    if len(ram) < workload.end:
        raise ValueError(
            f"{len(ram)} bytes of RAM do not hold a working set that ends at {workload.end}"
        )
    values = ram[workload.start : workload.end : PAGE_SIZE]
    steps = values[:-1] - values[1:]  # modulo 256: a step from 255 to 0 is 1 too
    edges = np.flatnonzero(steps)
    wrong = edges[steps[edges] != 1]
    problem = ""
    if len(wrong):
        page = int(wrong[0])
        problem = f"page {page} is at {values[page]}, but page {page + 1} at {values[page + 1]}"
    elif len(edges) > 1:
        first = ", ".join(str(page) for page in edges[:8])
        problem = f"{len(edges)} edges, after pages {first}{', ...' if len(edges) > 8 else ''}"
    return WalkCheck(
        edges=len(edges),
        position=int(edges[0]) + 1 if len(edges) else 0,
        value=int(values[0]),
        problem=problem,
    )


def check_dma(ram: NDArray[np.uint8], workload: Workload) -> int:
    """Count the pages that the device has written since the guest began, and look for a lost one.

    Each of them is filled with the number of the pass, and they are written in order: the pages up
    to where the device has come are at n, the others at n - 1. A page whose last write is missing
    breaks that order; again but for the very last one, as in :func:`check_walk`.

    A device that is passed through does not stop with the guest: what it has begun arrives up to
    100 ms later. Until then a page may be seen half written, which is an error here.

    :param ram: shape (bytes,), the RAM from guest-physical address 0 on. Of the pages of the
        region every byte is read that the device writes; holes in a mapped tmpfs file get
        allocated.
    :param workload: what the guest was started with
    :return: how many writes of a page; 0 if there was none yet
    :raise ValueError: the RAM ends before the region does, the device was to write nothing, or
        there is something that it does not leave; the text says in which page of the region
    """
    if not workload.dma_pages:
        raise ValueError("the device was to write nothing")
    if len(ram) < workload.dma_end:
        raise ValueError(f"{len(ram)} bytes of RAM do not hold a region up to {workload.dma_end}")
    region = np.ascontiguousarray(ram[workload.dma_start : workload.dma_end]).view("<u4")
    pages = region.reshape(workload.dma_pages, PAGE_SIZE // 4)[:, : edu.WORDS]
    passes = pages[:, 0].astype(np.int64)
    torn = np.flatnonzero((pages != pages[:, :1]).any(axis=1))
    if len(torn):
        raise ValueError(f"page {torn[0]} of the device's is not all of one pass")
    newest = int(passes[0])
    position = int(np.count_nonzero(passes == newest))
    expected = np.where(np.arange(len(passes)) < position, newest, max(newest - 1, 0))
    wrong = np.flatnonzero(passes != expected)
    if len(wrong):
        page = int(wrong[0])
        raise ValueError(
            f"page {page} of the device's is at pass {passes[page]}, not at {expected[page]} as "
            f"after {position} pages of pass {newest}"
        )
    return max(newest - 1, 0) * workload.dma_pages + position * (newest > 0)
