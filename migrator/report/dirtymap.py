"""Where guest memory was dirty, round by round, in a bounded amount of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from migrator.report.report import DirtyMap, MappedBlock, MapRow
from tracker.bits import regions
from tracker.bits.pageset import PageSet
from tracker.memory.ram import RamBlock

REGIONS = 256
"""Into how many ranges all memory is divided, or a few more: each block has one at least."""
ROWS = 128
"""More rounds than this share rows: two adjacent ones become one when there is no room left."""


class Recorder:
    """Counts dirty pages by region of memory, a row a round.

    :param blocks: what is moved
    """

    def __init__(self, blocks: Sequence[RamBlock], *, rows: int = ROWS) -> None:
        total = sum(block.size for block in blocks)
        self._blocks = [
            MappedBlock(
                block.name,
                block.size,
                block.page_size,
                min(block.npages, max(1, round(REGIONS * block.size / total))),
            )
            for block in sorted(blocks, key=lambda block: block.name)
        ]
        self._most = rows
        self._rows: list[MapRow] = []
        self._later: list[_Kept] = []

    def note(self, number: int, began_s: float, dirty: PageSet, *, later: bool) -> None:
        """Add a round.

        :param began_s: since the migration began
        :param dirty: its pages
        :param later: the guest stands: keep the pages, which may not be changed any more, and
            count when the map is asked for
        """
        kept = _Kept(number, began_s, dirty)
        if later:
            self._later.append(kept)
        else:
            self._add(kept, stood=False)

    def dirty_map(self) -> DirtyMap:
        """All that was noted."""
        for kept in self._later:
            self._add(kept, stood=True)
        self._later.clear()
        return DirtyMap(list(self._blocks), list(self._rows))

    def _add(self, kept: _Kept, *, stood: bool) -> None:
        if len(self._rows) >= self._most:
            self._rows = [_joined(self._rows[i : i + 2]) for i in range(0, len(self._rows), 2)]
        counts = [
            regions.by_region(kept.dirty[block.name], block.regions) for block in self._blocks
        ]
        pages: list[int] = np.concatenate(counts).tolist()
        self._rows.append(MapRow(kept.number, kept.number, kept.began_s, stood, pages))


@dataclass(frozen=True)
class _Kept:
    number: int
    began_s: float
    dirty: PageSet


def _joined(rows: Sequence[MapRow]) -> MapRow:
    """One row in place of some that are adjacent."""
    pages = np.max([row.dirty_pages for row in rows], axis=0)
    return MapRow(
        rows[0].first_round,
        rows[-1].last_round,
        rows[0].began_s,
        all(row.guest_stood for row in rows),
        pages.tolist(),
    )
