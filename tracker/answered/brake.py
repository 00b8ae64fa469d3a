"""Slowing those who write: each of their first writes to a page is answered late.

Noted by the kernel alone (:mod:`tracker.sources.uffd`), a write makes nobody wait. Where somebody
answers (:mod:`tracker.answered.uffdsync`) it can, but one mapping has one userfaultfd: so a few
*spans* of RAM that hold what is written most are handed over from the first to the second, and back
again if others are chosen. Between the two nobody notes writes. Hence the rule that no page is lost
by: whoever is handed a span protects it, and from then on **all of it counts as written**, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tracker.answered.hotranges import hot_ranges
from tracker.answered.uffdsync import UffdSync
from tracker.bits.pageset import PageSet
from tracker.bits.rescale import spread
from tracker.memory.ram import RamBlock
from tracker.sources.uffd import UffdAsync

_WELL_CHOSEN = 0.75  # of what is written most is in the spans


class Brake:
    """Tracks spans of RAM, beside the source that tracks the rest.

    Its :meth:`collect` has to be in the union from :meth:`put_on` on.

    :ivar spans: pages; none while nothing is handed over
    """

    name = UffdSync.name

    def __init__(self, pid: int, blocks: Sequence[RamBlock], rest: UffdAsync) -> None:
        self._pid = pid
        self._blocks = tuple(blocks)
        self._rest = rest
        self._sync: UffdSync | None = None
        self.spans = PageSet.empty(self._blocks)
        self._handed_over = PageSet.empty(self._blocks)

    @property
    def is_on(self) -> bool:
        """Whether there is anything to collect."""
        return self._sync is not None or self.handed_over

    @property
    def handed_over(self) -> bool:
        """Whether the next collection has pages in it for no other reason than that."""
        return self._handed_over.any()

    def put_on(self, hot: PageSet) -> None:
        """Choose spans by what is hot, unless those that are there hold most of it.

        :raise TrackerError: it cannot be; the source of the rest tracks everything again, if it
            can be collected from at all
        """
        total = hot.count()
        held = (hot & self.spans).count()
        if not total or (self._sync is not None and held >= _WELL_CHOSEN * total):
            return
        self.take_off()
        self.spans = hot_ranges(hot)
        self._rest.give_up(self.spans)
        self._sync = UffdSync(self._pid, self._parts(), chunk=1)
        try:
            self._sync.start()
        except BaseException:
            self.take_off()
            raise
        self._count_as_written()

    def slow(self, percent: int, longest_ms: float) -> None:
        """See :meth:`tracker.answered.uffdsync.UffdSync.slow`; without spans, of none."""
        if self._sync is not None:
            self._sync.slow(percent, longest_ms)

    def take_off(self) -> None:
        """Hand all spans back.

        :raise SourceError: the other source cannot have them: nothing is known of them
        """
        if self._sync is None:
            return
        self._sync.stop()
        self._rest.take_back(self.spans)
        self._sync = None
        self._count_as_written()
        self.spans = PageSet.empty(self._blocks)

    def collect(self) -> PageSet:
        """See :meth:`tracker.sources.source.DirtySource.collect`; of spans only."""
        found, self._handed_over = self._handed_over, PageSet.empty(self._blocks)
        if self._sync is not None:
            written = self._sync.collect()
            for part, block, offset in self._placed():
                words = found[block.name].words
                size = block.page_size
                spread(written[part.name].words, 0, part.npages, size, words, size, offset)
        return found

    def stop(self) -> None:
        """Leave nothing behind, and nobody waiting. May be called again."""
        if self._sync is not None:
            self._sync.stop()
        self._sync = None

    def _count_as_written(self) -> None:
        self._handed_over |= self.spans

    def _parts(self) -> list[RamBlock]:
        return [part for part, _, _ in self._placed()]

    def _placed(self) -> list[tuple[RamBlock, RamBlock, int]]:
        """Each span as a block, the block that it is in, and where, in bytes."""
        placed = []
        for block in self._blocks:
            for first, npages in zip(*self.spans[block.name].runs(), strict=True):
                offset, size = int(first) * block.page_size, int(npages) * block.page_size
                name = f"{block.name}+{offset:#x}"
                part = replace(block, name=name, hva=block.hva + offset, size=size)
                placed.append((part, block, offset))
        return placed
