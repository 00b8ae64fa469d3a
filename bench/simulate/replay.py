"""A guest that writes what was recorded of one, in a memory of any size."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from pyroaring import BitMap

from migrator.watch.trace import Trace, numbers, united
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.memory.ram import RamBlock

_GOLDEN = (5**0.5 - 1) / 2


class Replay:
    """A recorded guest; see :class:`bench.simulate.run.Guest`.

    More memory is *tiled*: what was recorded, side by side, all of it at the same pace, so that
    what is hot, what lies together, and what is empty keep their shares. (Stretched, a page that is
    written would become many, all written at once, which no guest does.)

    The recording begins anew when it is over.

    :param memory: bytes of RAM, not less than was recorded; ``None``: as much
    :param scale_writes: every tile writes; otherwise the first one only, and the others hold data
    :raise ValueError: less memory than was recorded, or nothing was recorded
    """

    def __init__(
        self, trace: Trace, memory: int | None = None, *, scale_writes: bool = True
    ) -> None:
        recorded = sum(block.size for block in trace.header.blocks)
        if not trace.records:
            raise ValueError("nothing was recorded")
        if memory is not None and memory < recorded:
            raise ValueError(f"{recorded} bytes of memory were recorded, {memory} are less")
        times = 1.0 if memory is None else memory / recorded
        self._records = trace.records
        self._ends = [record.until_s for record in trace.records]
        self._scale_writes = scale_writes
        self._recorded = {block.name: block.npages for block in trace.header.blocks}
        self.blocks = tuple(
            RamBlock(b.name, round(b.npages * times) * b.page_size, b.page_size, 0, 0, 0)
            for b in trace.header.blocks
        )
        self._npages = {block.name: block.npages for block in self.blocks}
        self.data = PageSet(self.blocks, {n: self._tiled(n, p) for n, p in trace.data.items()})
        self.zeros = PageSet(self.blocks, {n: self._tiled(n, p) for n, p in trace.zeros.items()})

    def written(self, from_s: float, to_s: float) -> PageSet:
        """Pages written in a time; the caller's to change."""
        found = {}
        spans = list(self._spans(from_s, to_s))
        for name, npages in self._recorded.items():
            whole = united(
                self._records[i].written[name] for i, since, until in spans if until - since >= 1
            )
            pages = DirtyBitmap.from_pages(npages, numbers(whole))
            for i, since, until in spans:
                if until - since < 1:
                    pages |= DirtyBitmap.from_pages(npages, self._part(i, name, since, until))
            found[name] = self._tiled(name, pages, writes=True)
        return PageSet(self.blocks, found)

    def _spans(self, from_s: float, to_s: float) -> Iterator[tuple[int, float, float]]:
        """The records of a time, and of each from where to where, 0 to 1."""
        period = self._ends[-1]
        if to_s - from_s >= period:
            yield from ((i, 0.0, 1.0) for i in range(len(self._ends)))
            return
        start = from_s % period
        stop = start + to_s - from_s
        for low, high in ((start, min(stop, period)), (0.0, stop - period)):
            i = bisect_right(self._ends, low)
            while low < high and i < len(self._ends):
                began = self._ends[i - 1] if i else 0.0
                length = self._ends[i] - began
                until = min((high - began) / length, 1.0)
                yield i, (low - began) / length, until
                low, i = self._ends[i], i + 1

    def _part(self, i: int, name: str, since: float, until: float) -> NDArray[np.uint32]:
        """Of a record, what was written in a part of its time.

        When, it does not tell. A page that was also written in the interval before and in the one
        after is taken to be written all the time; the others once each, at times spread evenly.
        """
        pages = self._records[i].written[name]
        before, after = self._records[i - 1], self._records[(i + 1) % len(self._records)]
        always: BitMap = pages & before.written[name] & after.written[name]
        once = numbers(pages - always)
        at = _spread(len(once))
        return np.concatenate([numbers(always), once[(at >= since) & (at < until)]])

    def _tiled(self, name: str, pages: DirtyBitmap, *, writes: bool = False) -> DirtyBitmap:
        npages = self._npages[name]
        if npages == pages.npages:
            return pages
        tiled = DirtyBitmap.empty(npages)
        if writes and not self._scale_writes:
            tiled.words[: len(pages.words)] = pages.words
        elif pages.npages % 64 == 0:
            words = np.resize(pages.words, len(tiled.words))
            if npages % 64:
                words[-1] &= np.uint64((1 << npages % 64) - 1)
            tiled = DirtyBitmap(npages, words)
        else:
            tiled.words.view(np.uint8)[: (npages + 7) // 8] = np.packbits(
                np.resize(pages.mask(), npages), bitorder="little"
            )
        return tiled


def _spread(n: int) -> NDArray[np.float64]:
    """So many numbers from 0 up to 1, as even as can be wherever one cuts (a Weyl sequence)."""
    return np.modf(np.arange(n, dtype=np.float64) * _GOLDEN)[0]


def describe(trace: Trace) -> Mapping[str, float | int]:
    """What a recording says of its guest in few numbers.

    :return: ``seconds``, ``records``, ``guest_bytes``, ``data_bytes`` without zeros,
        ``written_bytes_per_s`` as of its intervals, and ``working_set_bytes`` of all of it
    """
    sizes = {block.name: block.page_size for block in trace.header.blocks}
    written = sum(len(r.written[n]) * size for r in trace.records for n, size in sizes.items())
    ever = sum(len(united(r.written[n] for r in trace.records)) * size for n, size in sizes.items())
    return {
        "seconds": trace.seconds,
        "records": len(trace.records),
        "guest_bytes": sum(block.size for block in trace.header.blocks),
        "data_bytes": (trace.data - trace.zeros).nbytes(),
        "written_bytes_per_s": written / trace.seconds if trace.seconds else 0.0,
        "working_set_bytes": ever,
    }
