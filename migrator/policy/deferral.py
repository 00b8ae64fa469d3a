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
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracker.bits import history
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import Block, PageSet

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


@dataclass(frozen=True)
class Chosen:
    """Which pages wait for the end.

    :ivar hot: all of these
    :ivar left: of these, pages to leave unprotected meanwhile
    """

    hot: PageSet
    left: PageSet

    @classmethod
    def nothing(cls, blocks: Iterable[Block]) -> Chosen:
        """No page of these blocks."""
        none = PageSet.empty(blocks)
        return cls(none, none)

    def protected(self) -> Chosen:
        """The same pages wait, and all of them are protected."""
        return Chosen(self.hot, PageSet.empty(self.hot.blocks))


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

    :param blocks: what is moved
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        blocks = tuple(blocks)
        self._none = PageSet.empty(blocks)
        self._history = {block.name: np.zeros(block.npages, np.uint8) for block in blocks}
        self._unit = min(block.page_size for block in blocks)
        self._units = {block.name: block.page_size // self._unit for block in blocks}
        self._intervals_s: deque[float] = deque(maxlen=_LOOKS)
        self._by_history: Counts = np.zeros(256, np.int64)  # bytes
        self._looks = 0
        self._needed = 1  # looks in which a page has to have been written, this one included
        self._written = self._none
        self.protected()

    def choose(self, written: PageSet, nbytes: int) -> Chosen:
        """Choose pages that wait for the end, out of those that were written.

        :param nbytes: no more than this, in all blocks together
        """
        hot = self.hot(written, nbytes)
        return Chosen(hot, self.unasked(hot))

    def hot(self, written: PageSet, nbytes: int) -> PageSet:
        """Of the pages that were written, those that may wait; none if the sample says so.

        :param nbytes: no more than this, in all blocks together
        """
        asked_bytes, again_bytes = self.again(written)
        if self._left.any() and again_bytes < _STILL * asked_bytes:
            self._distrust()
            return self._none
        counts = np.zeros(256, np.int64)
        for name, pages in written.items():
            counts += self._tally(name, pages) * self._units[name]
        least = 256 - (512 >> self._needed)
        choice = hottest(counts, nbytes // self._unit, least)
        left = choice.limit
        found = PageSet.empty(written.blocks)
        for name, pages in written.items():
            units, chosen = self._units[name], found[name].words
            taken = history.choose(
                pages.words, self._history[name], choice.least, left // units, chosen
            )
            left -= int(taken) * units
        return found

    def _distrust(self) -> None:
        """Forget what was assumed of pages that nobody asked for."""
        self._needed = min(self._needed * 2, _LOOKS)
        for name, left in self._left.items():
            self._history[name][left.mask()] = 0

    def unasked(self, hot: PageSet) -> PageSet:
        """The waiting pages to leave unprotected: all but one word in 16, which are the sample.

        None, where few pages wait, as their faults cost little.
        """
        if hot.nbytes() < _WORTH_LEAVING * self._unit:
            return self._none
        return hot.each(self._without_sample)

    def _without_sample(self, pages: DirtyBitmap) -> DirtyBitmap:
        words = pages.words.copy()
        words[self._looks % _STRIPES :: _STRIPES] = 0
        return DirtyBitmap(pages.npages, words)

    def again(self, written: PageSet) -> tuple[int, int]:
        """Bytes written before the last look and protected since, and those of them written again.

        Where pages wait, only a sample of them was protected, and the bytes are those of the
        sample; otherwise they are those of all pages that the look before found.

        :param written: pages that the last look found
        """
        return self._asked.nbytes(), (self._asked & written).nbytes()

    def look(self, written: PageSet, interval_s: float, chosen: Chosen | None = None) -> None:
        """Remember what was written since the last look, and is protected again.

        :param interval_s: how long ago the last look was
        :param chosen: what waits, and of it what is not protected again
        """
        self._looks += 1
        self._intervals_s.appendleft(interval_s)
        self._written = written.copy()
        self.protected()
        if chosen is not None and chosen.left.any():
            self._asked, self._left = chosen.hot - chosen.left, chosen.left
        self._by_history = np.zeros(256, np.int64)
        for name, pages in written.items():
            past, counts = self._history[name], np.zeros(256, np.int64)
            history.age(pages.words, past)
            history.count(past, counts)
            self._by_history += counts * self._units[name] * self._unit

    def protected(self) -> None:
        """Remember that all that was written has been protected again."""
        self._asked = self._written
        self._left = self._none

    def recent(self) -> PageSet:
        """Pages that were written in the last two looks."""
        found, everything = self._none.copy(), PageSet.full(self._none.blocks)
        for name, past in self._history.items():
            least, chosen = history.WRITTEN >> 1, found[name].words
            history.choose(everything[name].words, past, least, len(past), chosen)
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

    def _tally(self, name: str, pages: DirtyBitmap) -> Counts:
        counts = np.zeros(256, np.int64)
        history.tally(pages.words, self._history[name], counts)
        return counts
