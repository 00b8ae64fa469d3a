"""Several dirty sources become one bitmap a block.

The CPU's writes and the devices' writes are seen by different sources, and often the same page by
several: the union is taken of bitmaps, so that each page counts, and is sent, once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from tracker.bits.pageset import Block, PageSet
from tracker.bits.union import unite
from tracker.errors import BitmapError, SourceError, TrackerError


@dataclass
class Merged:
    """What all sources together reported.

    :ivar dirty: pages that exact sources reported; shares nothing with the reports
    :ivar suspects: pages that only other sources reported
    :ivar pages: pages in both together, of all blocks
    :ivar pages_by_source: pages that each source reported
    :ivar only_by_source: of these, the pages that no other source reported
    """

    dirty: PageSet
    suspects: PageSet
    pages: int
    pages_by_source: dict[str, int]
    only_by_source: dict[str, int]

    def add_nothing_of(self, source: str) -> None:
        """Add a source that reported no page."""
        self.pages_by_source[source] = self.only_by_source[source] = 0

    @property
    def pages_by_several(self) -> int:
        """Pages that more than one source reported."""
        return self.pages - sum(self.only_by_source.values())


def merge(
    blocks: Iterable[Block],
    reports: Mapping[str, PageSet],
    inexact: Collection[str] = (),
) -> Merged:
    """Unite the reports of one collect, in one pass through memory.

    :param blocks: every block that is being moved
    :param reports: what each source's ``collect()`` returned, by name of source; one or more, and
        each of them covers every block
    :param inexact: names of the sources that report pages whether they were written or not (see
        :attr:`tracker.sources.source.DirtySource.exact`)
    :raise SourceError: a source left out a block, or reported an unknown one, or another number of
        pages: nothing it says can be trusted, and nothing is clean
    :raise TrackerError: there is no report at all
    """
    blocks = tuple(blocks)
    if not reports:
        raise TrackerError("no dirty source reported: nothing is known about any page")
    for source, report in reports.items():
        try:
            PageSet(blocks, report)
        except BitmapError as error:
            raise SourceError(source, str(error)) from error

    # exact ones first
    order = sorted(reports, key=lambda source: source in inexact)
    nexact = sum(source not in inexact for source in reports)
    counts = np.zeros((len(order), 2), np.int64)
    dirty, suspects, pages = PageSet.empty(blocks), PageSet.empty(blocks), 0
    for name in dirty:
        addresses = [reports[source][name].words.ctypes.data for source in order]
        sources = np.array(addresses, np.uint64)
        pages += int(unite(sources, nexact, dirty[name].words, suspects[name].words, counts))
    pairs = list(zip(order, counts.tolist(), strict=True))
    return Merged(
        dirty,
        suspects,
        pages,
        pages_by_source={source: found for source, (found, _) in pairs},
        only_by_source={source: alone for source, (_, alone) in pairs},
    )
