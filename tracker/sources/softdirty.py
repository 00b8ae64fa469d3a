"""CPU writes, page by page, where there is no asynchronous write-protection: soft-dirty bits.

A write sets a bit in the page table entry; ``clear_refs`` takes it from all of the process. Between
reading the bits and taking them away a write would be lost, as no call does both: the process
stands still meanwhile (:mod:`tracker.inject.frozen`).

The bit is gone with the page table entry. Shared memory loses its entries when it is swapped out,
written back or made a huge page, and no trace of the write is left when it is mapped again. So the
memory has to be on a tmpfs, without swap and without huge pages; anything else is refused.
Userfaultfd knows no such thing, as it leaves a marker behind (Linux: PTE_MARKER_UFFD_WP).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tracker.abi import pagemap
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.errors import InjectionError, NotTracking, RamError, SourceError
from tracker.inject.frozen import frozen
from tracker.memory.extents import data_pages
from tracker.memory.ram import RamBlock, open_file
from tracker.sources.pagemap import clear_soft_dirty, entries, soft_dirty_missing

SWAPS = Path("/proc/swaps")
SHMEM_HUGE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

_MAPPED = np.uint64(pagemap.PM_PRESENT | pagemap.PM_SWAP)
_DIRTY = np.uint64(pagemap.PM_SOFT_DIRTY)


class SoftDirty:
    """Writes through the page tables of one process, as the soft-dirty bits tell.

    Not seen: what :class:`tracker.sources.uffd.UffdAsync` does not see either. Nobody else may
    clear the bits of the process (CRIU does).

    :cvar exact: reports pages that were written, not a range that they are in; pages that hold
        data which the process does not map are reported each time, as nothing is known of them
    """

    name = "soft-dirty"
    exact = True

    def __init__(self, pid: int, blocks: Sequence[RamBlock], *, timeout_s: float = 5.0) -> None:
        """Prepare; nothing is done to the process yet.

        :param timeout_s: how long the process's threads may take to stop, each time
        """
        self._pid = pid
        self._blocks = tuple(blocks)
        self._timeout_s = timeout_s
        self._pagemap = self._clear = -1
        self._fds: dict[str, int] = {}

    def start(self) -> None:
        """Take the bits from all pages. From the return of this call on, every write is collected.

        :raise NotTracking: the kernel has no soft-dirty bits, or they would be lost with this
            memory
        :raise SourceError: the process cannot be stopped, or is not ours to look at
        """
        if missing := soft_dirty_missing():
            raise NotTracking(self.name, missing)
        try:
            self._check_kept()
            self._pagemap = os.open(f"/proc/{self._pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self._clear = os.open(f"/proc/{self._pid}/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
            for block in self._blocks:
                self._fds[block.name] = open_file(self._pid, block)
            self.collect()
        except BaseException as error:
            self.stop()
            if isinstance(error, (OSError, RamError)):
                raise SourceError(self.name, str(error)) from error
            raise

    def _check_kept(self) -> None:
        """Check that nothing takes page table entries away, with their bits.

        :raise NotTracking: something does
        """
        for block in self._blocks:
            if block.is_hugetlb:
                raise NotTracking(self.name, f"{block.name!r} has huge pages, which have no bits")
            kind, options = _file_system(self._pid, block.device)
            if kind != "tmpfs":
                raise NotTracking(
                    self.name, f"{block.name!r} is on {kind}: written back, a page loses its bit"
                )
            if any(o.startswith("huge=") and o != "huge=never" for o in options.split(",")):
                raise NotTracking(
                    self.name, f"{block.name!r} may be made huge pages ({options}), without bits"
                )
        if _text(SWAPS).count("\n") > 1:
            raise NotTracking(self.name, "there is swap: a page that is swapped out loses its bit")
        if "[force]" in _text(SHMEM_HUGE):
            raise NotTracking(self.name, f"{SHMEM_HUGE} is force: pages lose their bits")

    def collect(self) -> PageSet:
        """Pages written since the last call, whose bits are taken away.

        The process stands still for as long as that takes.

        :raise SourceError: it cannot be stopped, or cannot be asked: nothing is known of any page
        """
        try:
            self._check_kept()
            with frozen(self._pid, timeout_s=self._timeout_s):
                found = [entries(self._pagemap, b.hva, b.npages) for b in self._blocks]
                clear_soft_dirty(self._clear)
            pairs = zip(self._blocks, found, strict=True)
            return PageSet(
                self._blocks, {block.name: self._dirty(block, bits) for block, bits in pairs}
            )
        except (OSError, RamError) as error:
            raise SourceError(self.name, str(error)) from error
        except InjectionError as error:
            raise SourceError(self.name, error.reason) from error

    def _dirty(self, block: RamBlock, bits: NDArray[np.uint64]) -> DirtyBitmap:
        mapped = (bits & _MAPPED) != 0
        dirty = _bitmap(mapped & ((bits & _DIRTY) != 0))
        if not mapped.all():
            unmapped = data_pages(self._pid, block, self._fds[block.name])
            dirty |= unmapped - _bitmap(mapped)
        return dirty

    def stop(self) -> None:
        """Let go of the process; its bits stay. May be called again."""
        while self._fds:
            os.close(self._fds.popitem()[1])
        for fd in (self._pagemap, self._clear):
            if fd >= 0:
                os.close(fd)
        self._pagemap = self._clear = -1


def _bitmap(pages: NDArray[np.bool_]) -> DirtyBitmap:
    """One bool a page, as a bitmap."""
    words = np.zeros((len(pages) + 63) // 64, np.uint64)
    packed = np.packbits(pages, bitorder="little")
    words.view(np.uint8)[: len(packed)] = packed
    return DirtyBitmap(len(pages), words)


def _file_system(pid: int, device: int) -> tuple[str, str]:
    """Type and options of a file system that a process has mounted."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            fields, _, rest = line.partition(" - ")
            if fields.split()[2] == wanted:
                kind, _, options = rest.split()[:3]
                return kind, options
    return "a file system that is not mounted", ""


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # a kernel without it
        return ""
