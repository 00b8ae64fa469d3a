"""The guests that are measured: what each does, its files, and its QEMU command line.

Most are synthetic (:mod:`bench.guests.tableguest`): a boot sector walks over its working set in the
order of a pattern (:mod:`bench.guests.patterns`). Two are Linux (:mod:`bench.guests.linuxguest`).

===============  ===================================================================================
``idle``         has a heartbeat, and a working set that it leaves alone
``sequential``   writes its pages in order
``random``       writes any page, all as likely
``zipf``         writes any page, some far more likely than others
``bursts``       as ``random``, for :data:`BURST_MS`; then nothing for :data:`PAUSE_MS`
``read-mostly``  reads any page, and now and then writes one of a few
``growing``      writes the first sixteenth of its pages, in order; after a while two of them; ...
``same-bytes``   writes its pages in order, each as it is
``linux-boot``   does what a Linux does while it boots, again and again
``linux-sqlite`` books to accounts in an sqlite database in memory, one transaction after the other
===============  ===================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.guests import linuxguest, patterns, tableguest
from bench.guests.linuxguest import GuestError
from migrator.guest.workload import IMAGE_BYTES, MIB, Workload, guest_args

IDLE = "idle"
"""Changes nothing."""

SYNTHETIC = (
    IDLE,
    "sequential",
    "random",
    "zipf",
    "bursts",
    "read-mostly",
    "growing",
    "same-bytes",
)
LINUX = ("linux-boot", "linux-sqlite")
WORKLOADS = (*SYNTHETIC, *LINUX)

LINUX_BYTES = 512 * MIB
"""A Linux guest has no room in less RAM."""

HEARTBEAT_MS = 10
"""Of the synthetic guests; those of Linux are 50 ms apart, or more where it is slow."""

BURST_MS, PAUSE_MS = 300, 300

_MACHINE = "q35"

__all__ = ["LINUX", "SYNTHETIC", "WORKLOADS", "Guest", "GuestError"]


@dataclass(frozen=True)
class Guest:
    """What is run.

    :ivar workload: one of :data:`WORKLOADS`
    :ivar memory: bytes of RAM
    :ivar qemu: the QEMU that runs it
    :ivar working_set: bytes that a synthetic guest works on
    :ivar pages_per_s: how many it reads or writes; 0: as fast as it can
    :raise ValueError: one of them makes no sense; the text says what would
    """

    workload: str
    memory: int
    qemu: str = "qemu-system-x86_64"
    working_set: int = 64 * MIB
    pages_per_s: int = 0

    def __post_init__(self) -> None:
        if self.workload not in WORKLOADS:
            raise ValueError(f"{self.workload!r} is none of {', '.join(WORKLOADS)}")
        if self._linux:
            if self.memory < LINUX_BYTES:
                raise ValueError(f"a Linux guest needs {LINUX_BYTES // MIB} MiB of RAM")
            return
        self._walk.check_fits(self.memory, _MACHINE)
        if self._walk.npages < patterns.GROWTH_STEPS:
            raise ValueError(f"the working set is less than {patterns.GROWTH_STEPS} pages")

    def prepare(self, directory: Path) -> None:
        """Make its files. Guests that differ may have the same directory.

        :raise GuestError: they cannot be made; the text says what to do
        """
        if self._linux:
            linuxguest.prepare(directory)
            return
        image, table = self._files(directory)
        table.write_bytes(tableguest.table(self._pattern))
        image.write_bytes(tableguest.assemble(self._program).ljust(IMAGE_BYTES, b"\0"))

    def command(self, directory: Path, ram: Path, console: Path) -> list[str]:
        """Give QEMU's command line, without -qmp and -incoming.

        :param directory: with what :meth:`prepare` has made; source and destination share it
        :param ram: the file that is to be its RAM
        :param console: a file or FIFO for its first serial port
        """
        ram_args = f"size={self.memory}B,share=on,mem-path={_escaped(ram)}"
        return [
            *[self.qemu, "-accel", "tcg", "-m", f"{self.memory}B"],
            *["-machine", f"{_MACHINE},memory-backend=ram"],
            *["-object", f"memory-backend-file,id=ram,{ram_args}"],
            *["-serial", f"file:{_escaped(console)}"],
            *self._arguments(directory),
        ]

    def _arguments(self, directory: Path) -> list[str]:
        if self._linux:
            return linuxguest.arguments(directory, self.workload.removeprefix("linux-"))
        image, table = self._files(directory)
        loader = f"file={_escaped(table)},addr={tableguest.TABLE:#x},force-raw=on"
        return [*guest_args(image), "-device", f"loader,{loader}"]

    @property
    def progress_at(self) -> int | None:
        """Where its RAM file has a little-endian u64 that counts what it has done.

        In pages read or written; an idle guest's stays 0. ``None``: the heartbeats say it.
        """
        return None if self._linux else tableguest.COUNTER

    def problem(self, ram: NDArray[np.uint8], console: bytes = b"") -> str:
        """Look for anything in a stopped guest's RAM that it has not left there.

        A Linux guest looks for itself: at what it says of that.

        :param ram: shape (bytes,), all of its RAM
        :param console: what it has said, at the source and then at the destination
        :return: what is wrong; empty if nothing is
        """
        if self._linux:
            return linuxguest.problem(console)
        return tableguest.problem(ram, self._pattern, self._walk.npages)

    @property
    def _linux(self) -> bool:
        return self.workload in LINUX

    def _files(self, directory: Path) -> tuple[Path, Path]:
        name = f"{self.workload}-{self.working_set}-{self.pages_per_s}"
        return directory / f"{name}.img", directory / f"{name}.table"

    @property
    def _walk(self) -> Workload:
        return Workload(
            working_set_bytes=self.working_set,
            start=tableguest.START,
            pages_per_s=self.pages_per_s,
            heartbeat_ms=HEARTBEAT_MS,
        )

    @cached_property
    def _pattern(self) -> patterns.Pattern:
        return patterns.make(self.workload, self._walk.npages, self.pages_per_s)

    @property
    def _program(self) -> tableguest.Program:
        pace = self._walk.parameters
        if self.workload == IDLE:
            return tableguest.Program(replace(pace, budget=0, budget_fraction=0))
        if self.workload == "bursts":
            return tableguest.Program(pace, BURST_MS // HEARTBEAT_MS, PAUSE_MS // HEARTBEAT_MS)
        return tableguest.Program(pace)


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")
