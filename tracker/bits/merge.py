"""Several dirty sources become one bitmap a block.

The CPU's writes and the devices' writes are seen by different sources, and often the same page by
several: the union is taken of bitmaps, so that each page counts, and is sent, once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.union import unite
from tracker.errors import SourceError, TrackerError


@dataclass
class Merged:
    """What all sources together reported.

    :ivar bitmaps: pages that exact sources reported, by block; shares nothing with the reports
    :ivar suspects: pages that only other sources reported, by block
    :ivar pages: pages in both together, of all blocks
    :ivar pages_by_source: pages that each source reported
    :ivar only_by_source: of these, the pages that no other source reported
    """

    bitmaps: dict[str, DirtyBitmap]
    suspects: dict[str, DirtyBitmap]
    pages: int
    pages_by_source: dict[str, int]
    only_by_source: dict[str, int]

    @property
    def pages_by_several(self) -> int:
        """Pages that more than one source reported."""
        return self.pages - sum(self.only_by_source.values())


def merge(
    npages: Mapping[str, int],
    reports: Mapping[str, Mapping[str, DirtyBitmap]],
    inexact: Collection[str] = (),
) -> Merged:
    """Unite the reports of one collect, in one pass through memory.

    :param npages: number of pages of every block that is being moved
    :param reports: what each source's ``collect()`` returned, by name of source; one or more, and
        each of them covers every block
    :param inexact: names of the sources that report pages whether they were written or not (see
        :attr:`tracker.sources.source.DirtySource.exact`)
    :raise SourceError: a source left out a block, or reported an unknown one, or another number of
        pages: nothing it says can be trusted, and nothing is clean
    :raise TrackerError: there is no report at all
    """
    if not reports:
        raise TrackerError("no dirty source reported: nothing is known about any page")
    for source, report in reports.items():
        _check(npages, source, report)

    # exact ones first
    order = sorted(reports, key=lambda source: source in inexact)
    nexact = sum(source not in inexact for source in reports)
    counts = np.zeros((len(order), 2), np.int64)
    bitmaps, suspects, pages = {}, {}, 0
    for block, n in npages.items():
        exact, rest = bitmaps[block], suspects[block] = DirtyBitmap.empty(n), DirtyBitmap.empty(n)
        addresses = [reports[source][block].words.ctypes.data for source in order]
        sources = np.array(addresses, np.uint64)
        pages += int(unite(sources, nexact, exact.words, rest.words, counts))
    pairs = list(zip(order, counts.tolist(), strict=True))
    return Merged(
        bitmaps,
        suspects,
        pages,
        pages_by_source={source: found for source, (found, _) in pairs},
        only_by_source={source: alone for source, (_, alone) in pairs},
    )


def _check(npages: Mapping[str, int], source: str, report: Mapping[str, DirtyBitmap]) -> None:
    if missing := npages.keys() - report.keys():
        raise SourceError(source, f"says nothing about {sorted(missing)}")
    if unknown := report.keys() - npages.keys():
        raise SourceError(source, f"reports blocks that nobody knows: {sorted(unknown)}")
    for block, bitmap in report.items():
        if bitmap.npages != npages[block]:
            raise SourceError(
                source, f"reports {bitmap.npages} pages of {block!r}, which has {npages[block]}"
            )
