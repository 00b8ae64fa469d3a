"""Ways to learn which pages the CPU wrote: sources of :mod:`tracker`, with their settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from migrator.config import parse_size
from migrator.tracking.strategies import COARSE, STRATEGIES, cpu_source
from tracker.answered.uffdsync import UffdSync
from tracker.errors import NotTracking
from tracker.memory.ram import RamBlock
from tracker.probe.answering import check_answering
from tracker.probe.probe import check_tracking
from tracker.sources.pagemap import soft_dirty_missing
from tracker.sources.softdirty import SoftDirty
from tracker.sources.source import DirtySource
from tracker.sources.uffd import UffdAsync

Maker = Callable[[int, Sequence[RamBlock]], DirtySource]
"""Makes the source that tracks a process's blocks; goes from one process to another (pickle)."""

NONE = "none"
_WITH_CHUNK = (UffdSync.name, COARSE)
SOURCES = (NONE, *STRATEGIES)
_PAGE = 4096


@dataclass(frozen=True)
class Strategy:
    """A source, and how coarse it is.

    :ivar source: one of :data:`SOURCES`; ``none`` tracks nothing: what the measurement itself does
    :ivar chunk: bytes that a write opens (``uffd-sync``, ``coarse``), 0 for the others
    :ivar name: as a suite says it
    """

    source: str
    chunk: int
    name: str

    def maker(self) -> Maker | None:
        """What makes its source; ``None`` if it tracks nothing."""
        if self.source == NONE:
            return None
        return partial(cpu_source, self.source, chunk=self.chunk, copied=True)

    def missing(self) -> str:
        """Why the kernel cannot do it, which is tried; empty if it can."""
        try:
            if self.source == UffdAsync.name:
                check_tracking()
            elif self.source in _WITH_CHUNK:
                check_answering()
            elif self.source == SoftDirty.name:
                return soft_dirty_missing()
        except NotTracking as error:
            return error.reason
        return ""


def parse(text: str) -> Strategy:
    """``uffd``, or ``uffd-sync:64K`` → a strategy.

    :raise ValueError: it is none; the text says what would be
    """
    source, colon, size = text.partition(":")
    if source not in SOURCES:
        raise ValueError(f"expected one of {', '.join(SOURCES)}, found {source!r}")
    if source not in _WITH_CHUNK:
        if colon:
            raise ValueError(f"{source} has no chunks, found {text!r}")
        return Strategy(source, 0, text)
    chunk = parse_size(size)
    if chunk < _PAGE or chunk & (chunk - 1):
        raise ValueError(f"expected {source}:SIZE, a power of two from 4K on, found {text!r}")
    return Strategy(source, chunk, text)
