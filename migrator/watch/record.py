"""The tracker alone, on a VM that goes on: which pages it writes, and when, into a file.

What :mod:`migrator.watch.watch` sums up is kept here, interval by interval, so that migrations can
be tried out on it later; see :mod:`migrator.watch.trace` for the file.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from migrator.aio import in_thread
from migrator.errors import TraceError
from migrator.watch.trace import Block, Header, Writer
from migrator.watch.trackable import Tracked, tracked
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.memory.pages import zero_pages
from tracker.memory.ram import RamBlock, open_file
from tracker.warm import warm_up

_BACKENDS_S = 1.0  # asking QEMU for them takes milliseconds
_SHOW_S = 1.0
_CHUNK_PAGES = 4096  # whole words


@dataclass(frozen=True)
class Options:
    """What a caller may choose.

    :ivar seconds: how long to record; ``None``: until cancelled
    :ivar interval_s: how often to look at what was written; as often as can be if that takes longer
    """

    seconds: float | None = None
    interval_s: float = 0.05


@dataclass
class Recorded:
    """How far a recording has come.

    :ivar seconds: how long it is
    :ivar records: intervals in it
    :ivar written_bytes: in all of them; a page counts once in each
    :ivar longest_s: the longest interval
    :ivar file_bytes: size of the file
    """

    seconds: float = 0.0
    records: int = 0
    written_bytes: int = 0
    longest_s: float = 0.0
    file_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Every member under its name."""
        return asdict(self)


async def record(
    source: str, path: Path, options: Options, show: Callable[[Recorded], None]
) -> None:
    """Record what a running VM writes, and leave it as it was.

    :param source: QMP socket of the QEMU that runs it
    :param path: the file; one that is there already is replaced
    :param show: called in the event loop each second, and at the end, however it comes
    :raise Refused: its RAM cannot be found or tracked
    :raise SourceUnreachable: it does not answer
    :raise VmError: it ended, its RAM changed, or somebody else tracks it
    :raise TraceError: the file cannot be written
    """
    await in_thread(warm_up)
    async with tracked(source) as vm:
        try:
            file = path.open("wb")
        except OSError as error:
            raise TraceError(path, str(error.strerror)) from error
        with file:
            recording = _Recording(vm, path, file, options)
            try:
                await recording.begin()
                await recording.run(show)
            finally:
                show(recording.so_far)


class _Recording:
    def __init__(self, vm: Tracked, path: Path, file: BinaryIO, options: Options) -> None:
        self._vm = vm
        self._path = path
        self._file = file
        self._options = options
        self._asked_at = -math.inf
        self.so_far = Recorded()

    async def begin(self) -> None:
        blocks = self._vm.tracking.blocks
        version = (await self._vm.vm.execute("query-version"))["qemu"]
        data = PageSet(
            blocks,
            {
                block.name: self._vm.sources.data[block.name].copy()
                if block.has_file
                else DirtyBitmap.full(block.npages)
                for block in blocks
            },
        )
        zeros = await in_thread(self._zeros, data)
        written, self._began = await self._collect()
        data, zeros = data | written, zeros - written
        header = Header(
            tuple(Block(b.name, b.size, b.page_size) for b in blocks),
            self._options.interval_s,
            self._vm.tracking.tracker,
            f"{version['major']}.{version['minor']}.{version['micro']}",
            self._vm.notes,
        )
        try:
            self._writer = await in_thread(Writer, self._file, header, data, zeros)
        except OSError as error:
            raise TraceError(self._path, str(error.strerror)) from error

    async def run(self, show: Callable[[Recorded], None]) -> None:
        interval_s, shown_at = self._options.interval_s, self._began
        due = last = self._began
        seconds = math.inf if self._options.seconds is None else self._options.seconds
        while last - self._began < seconds - interval_s / 2:
            due = max(due + interval_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            written, at = await self._collect()
            try:
                await in_thread(self._writer.append, at - self._began, written)
            except OSError as error:
                raise TraceError(self._path, str(error.strerror)) from error
            self._count(written, at - self._began, at - last)
            last = at
            if at - shown_at >= _SHOW_S:
                shown_at = at
                show(self.so_far)

    def _count(self, written: PageSet, until_s: float, interval_s: float) -> None:
        so_far = self.so_far
        so_far.seconds = until_s
        so_far.records += 1
        so_far.longest_s = max(so_far.longest_s, interval_s)
        so_far.file_bytes = self._file.tell()
        so_far.written_bytes += written.nbytes()

    async def _collect(self) -> tuple[PageSet, float]:
        """What was written, and when it was looked at: at the beginning, which is what is slow."""
        at = time.monotonic()
        ask = at - self._asked_at >= _BACKENDS_S
        if ask:
            self._asked_at = at
        found = await self._vm.sources.collect(backends_too=ask)
        return found.merged.dirty, at

    def _zeros(self, data: PageSet) -> PageSet:
        return PageSet(
            data.blocks,
            {
                block.name: _zero_pages(self._vm.vm.pid, block, data[block.name])
                if block.has_file and not block.is_hugetlb  # whose pages take long to read
                else DirtyBitmap.empty(block.npages)
                for block in self._vm.tracking.blocks
            },
        )


def _zero_pages(pid: int, block: RamBlock, data: DirtyBitmap) -> DirtyBitmap:
    """Of the pages that hold data, the ones full of zeros.

    They are read, not mapped: what is discarded meanwhile is not filled again.
    """
    zeros = DirtyBitmap.empty(block.npages)
    buffer = np.empty(_CHUNK_PAGES * block.page_size, np.uint8)
    fd = open_file(pid, block)
    try:
        for first in range(0, block.npages, _CHUNK_PAGES):
            words = slice(first // 64, (first + _CHUNK_PAGES) // 64)
            if not data.words[words].any():
                continue
            length = min(_CHUNK_PAGES, block.npages - first) * block.page_size
            got = os.preadv(fd, [buffer[:length].data], first * block.page_size)
            if got == length:  # else nothing is known of them
                zero_pages(buffer[:length], block.page_size, data.words[words], zeros.words[words])
    finally:
        os.close(fd)
    return zeros
