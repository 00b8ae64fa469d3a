"""Which pages wait for the end, because they will be written again. No input, no output.

A page that was written in each of so many last looks is *hot*; at first, in one. Hot pages wait,
and need no protection while they do, as long as sending them takes no more than a part of the
downtime. All but a sixteenth, each time another one, are left unprotected: by that sample it is
known how many of them are still written, at a sixteenth of the faults. If too few are, none waits,
and twice as many looks are asked for from then on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracker.bits import history
from tracker.bits.bitmap import DirtyBitmap

Counts = NDArray[np.int64]

_SHARE = 0.8  # of the downtime's room; the rest is for what is written last
_STRIPES = 16
_STILL = 0.9  # of a sample is written still: what it stands for goes on waiting
_WORTH_LEAVING = 2048  # pages; their faults take some 2 ms
_LOOKS = 8  # in a history


@dataclass(frozen=True)
class Choice:
    """Which pages are hot enough.

    :ivar least: the least history byte of a hot page
    :ivar limit: the most pages to take among those whose history is exactly ``least``
    """

    least: int
    limit: int


def room(limit_ms: float, fixed_ms: float, bytes_per_s: float) -> int:
    """How many bytes may wait.

    :param limit_ms: the downtime that is allowed
    :param fixed_ms: the part of it that does not depend on pages
    """
    return int(max(limit_ms - fixed_ms, 0.0) / 1000 * bytes_per_s * _SHARE)


def hottest(counts: Counts, pages: int, least: int = history.WRITTEN) -> Choice:
    """Choose the hottest pages.

    :param counts: pages that were written, by history; shape ``(256,)``
    :param pages: no more than this
    :param least: least history
    """
    left = max(pages, 0)
    for heat in range(255, least - 1, -1):
        if counts[heat] >= left:
            return Choice(heat, left)
        left -= int(counts[heat])
    return Choice(least, int(counts[least]))


class Heat:
    """The history of all pages: in which of the last looks each was written.

    After each look, the pages that it found are either *asked*, which is to say protected again, so
    that the next look tells whether they were written, or *left*: unprotected, as they wait for the
    end and are taken to be written all the time.

    :param npages: number of pages by block
    :param page_sizes: likewise, in bytes
    """

    def __init__(self, npages: Mapping[str, int], page_sizes: Mapping[str, int]) -> None:
        self._history = {name: np.zeros(n, np.uint8) for name, n in npages.items()}
        self._unit = min(page_sizes.values())
        self._units = {name: size // self._unit for name, size in page_sizes.items()}
        self._intervals_s: deque[float] = deque(maxlen=_LOOKS)
        self._by_history: Counts = np.zeros(256, np.int64)  # bytes
        self._looks = 0
        self._needed = 1  # looks in which a page has to have been written, this one included
        self._written = {name: DirtyBitmap.empty(n) for name, n in npages.items()}
        self.protected()

    def hot(self, written: Mapping[str, DirtyBitmap], nbytes: int) -> dict[str, DirtyBitmap]:
        """Of the pages that were written, those that may wait; none if the sample says so.

        :param nbytes: no more than this, in all blocks together
        """
        asked_bytes, again_bytes = self.again(written)
        if any(left.any() for left in self._left.values()) and again_bytes < _STILL * asked_bytes:
            self._distrust()
            return {name: DirtyBitmap.empty(pages.npages) for name, pages in written.items()}
        counts = np.zeros(256, np.int64)
        for name, pages in written.items():
            counts += self._tally(name, pages) * self._units[name]
        least = 256 - (512 >> self._needed)
        choice = hottest(counts, nbytes // self._unit, least)
        left = choice.limit
        found = {}
        for name, pages in written.items():
            chosen = found[name] = DirtyBitmap.empty(pages.npages)
            units = self._units[name]
            taken = history.choose(
                pages.words, self._history[name], choice.least, left // units, chosen.words
            )
            left -= int(taken) * units
        return found

    def _distrust(self) -> None:
        """Forget what was assumed of pages that nobody asked for."""
        self._needed = min(self._needed * 2, _LOOKS)
        for name, left in self._left.items():
            self._history[name][left.mask()] = 0

    def unasked(self, hot: Mapping[str, DirtyBitmap]) -> dict[str, DirtyBitmap]:
        """The waiting pages to leave unprotected: all but one word in 16, which are the sample.

        None, where few pages wait, as their faults cost little.
        """
        few = self._bytes(hot) < _WORTH_LEAVING * self._unit
        found = {}
        for name, pages in hot.items():
            words = pages.words.copy()
            if few:
                words[:] = 0
            words[self._looks % _STRIPES :: _STRIPES] = 0
            found[name] = DirtyBitmap(pages.npages, words)
        return found

    def again(self, written: Mapping[str, DirtyBitmap]) -> tuple[int, int]:
        """Bytes written before the last look and protected since, and those of them written again.

        Where pages wait, only a sample of them was protected, and the bytes are those of the
        sample; otherwise they are those of all pages that the look before found.

        :param written: pages that the last look found, by block
        """
        again = {name: pages & written[name] for name, pages in self._asked.items()}
        return self._bytes(self._asked), self._bytes(again)

    def look(self, written: Mapping[str, DirtyBitmap], interval_s: float) -> None:
        """Remember what was written since the last look, so long ago, and is protected again."""
        self._looks += 1
        self._intervals_s.appendleft(interval_s)
        self._written = {name: pages.copy() for name, pages in written.items()}
        self.protected()
        self._by_history = np.zeros(256, np.int64)
        for name, pages in written.items():
            past, counts = self._history[name], np.zeros(256, np.int64)
            history.age(pages.words, past)
            history.count(past, counts)
            self._by_history += counts * self._units[name] * self._unit

    def protected(self) -> None:
        """Remember that all that was written has been protected again."""
        self._asked = self._written
        self._left = {name: DirtyBitmap.empty(len(past)) for name, past in self._history.items()}

    def leave(self, waiting: Mapping[str, DirtyBitmap], left: Mapping[str, DirtyBitmap]) -> None:
        """Remember that of what waits these pages were not protected again."""
        if any(pages.any() for pages in left.values()):
            self._asked = {name: pages.minus(left[name]) for name, pages in waiting.items()}
            self._left = dict(left)

    def recent(self) -> dict[str, DirtyBitmap]:
        """Pages that were written in the last two looks."""
        found = {}
        for name, past in self._history.items():
            chosen = found[name] = DirtyBitmap.empty(len(past))
            everything = DirtyBitmap.full(len(past))
            least = history.WRITTEN >> 1
            history.choose(everything.words, past, least, len(past), chosen.words)
        return found

    def lately(self, window_s: float) -> tuple[float, float]:
        """How much was written, as of the last looks, in so long a time.

        Pages that were written several times count once. What only a part of the time between two
        looks is needed of counts in proportion; but of the last look, all.

        :return: bytes, and the time in which they were written: ``window_s``, if there were looks
            for that long, and it is longer than the last one
        """
        found = covered_s = 0.0
        for looks, interval_s in enumerate(self._intervals_s, start=1):
            # of these looks the highest bits of a history tell whether a page was written
            within = float(self._by_history[256 >> looks :].sum())
            left_s = window_s - covered_s
            if looks > 1 and interval_s >= left_s:
                share = max(left_s, 0.0) / interval_s if interval_s > 0 else 1.0
                return found + (within - found) * share, max(window_s, covered_s)
            found, covered_s = within, covered_s + interval_s
        return found, covered_s

    def at_most(self, window_s: float) -> float:
        """How many bytes may be written in so long a time: as fast as lately, if all are new.

        No more than in all looks that are known together.
        """
        last, last_s = self.lately(0.0)
        ever, _ = self.lately(math.inf)
        return min(last * max(window_s / max(last_s, 1e-6), 1.0), ever)

    def _bytes(self, pages: Mapping[str, DirtyBitmap]) -> int:
        return sum(pages[name].count() * units * self._unit for name, units in self._units.items())

    def _tally(self, name: str, pages: DirtyBitmap) -> Counts:
        counts = np.zeros(256, np.int64)
        history.tally(pages.words, self._history[name], counts)
        return counts
