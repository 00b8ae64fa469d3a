"""The order in which the synthetic guests touch their pages: pure, and the same for every run.

A pattern is a sequence of stages that begins anew after its last. A stage is a list of pages, each
with what is done to it, that is gone through so many times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

INCREMENT = 0
"""Add one to the first byte of the page."""

REWRITE = 1
"""Write the first byte of the page as it is."""

READ = 2
"""Read it."""

ZIPF_EXPONENT = 0.99
"""The page of rank r is as likely as r to the minus this one: YCSB's default."""

WRITTEN_PERCENT = 5
"""Of the pages of ``read-mostly``, and of its accesses."""

GROWTH_STEPS = 16
"""The sizes of the set that grows: so many parts of the whole, one after the other."""

GROWTH_S = 0.5
"""How long it stays at each of them."""

FULL_SPEED_PAGES_PER_S = 10_000_000
"""About what a guest under TCG does. Where it is faster or slower, a set grows that much faster."""

_DRAWS_PER_PAGE = 8  # 1 page in 3000 is never drawn
_MOST_DRAWS = 1 << 21
_SEED = 20_240_229


@dataclass(frozen=True)
class Stage:
    """Accesses in order.

    :ivar pages: shape (accesses,), indices in the working set
    :ivar kinds: shape (accesses,), of each :data:`INCREMENT`, :data:`REWRITE` or :data:`READ`
    :ivar times: how often all of them are done, at least once
    """

    pages: NDArray[np.uint32]
    kinds: NDArray[np.uint8]
    times: int = 1

    def __len__(self) -> int:
        return len(self.pages)


Pattern = tuple[Stage, ...]


def make(name: str, npages: int, pages_per_s: int) -> Pattern:
    """Make the pattern of a workload.

    :param name: one of :data:`PATTERNS`
    :param npages: of the working set, at least :data:`GROWTH_STEPS`
    :param pages_per_s: at what rate it is going to be gone through, as what grows is to grow with
        time; 0: as fast as the guest can, which is taken to be :data:`FULL_SPEED_PAGES_PER_S`
    """
    if name == "growing":
        return _growing(npages, pages_per_s)
    return (PATTERNS[name](npages),)


def _all(npages: int) -> NDArray[np.uint32]:
    return np.arange(npages, dtype=np.uint32)


def _stage(pages: NDArray[np.uint32], kind: int = INCREMENT, times: int = 1) -> Stage:
    return Stage(pages, np.full(len(pages), kind, np.uint8), times)


def _draws(npages: int) -> int:
    return min(npages * _DRAWS_PER_PAGE, _MOST_DRAWS)


def _sequential(npages: int) -> Stage:
    return _stage(_all(npages))


def _same_bytes(npages: int) -> Stage:
    return _stage(_all(npages), REWRITE)


def _uniform(npages: int) -> Stage:
    rng = np.random.default_rng(_SEED)
    return _stage(rng.integers(npages, size=_draws(npages), dtype=np.uint32))


def _zipf(npages: int) -> Stage:
    """Ranks are strewn over the set: hot pages are no neighbours."""
    rng = np.random.default_rng(_SEED)
    likely = np.arange(1, npages + 1) ** -ZIPF_EXPONENT
    ranks = np.searchsorted(np.cumsum(likely) / likely.sum(), rng.random(_draws(npages)))
    page_of = rng.permutation(npages).astype(np.uint32)
    return _stage(page_of[np.minimum(ranks, npages - 1)])


def _read_mostly(npages: int) -> Stage:
    """Reads anywhere; the writes are strewn among them, and go to few pages."""
    rng = np.random.default_rng(_SEED)
    written = rng.permutation(npages).astype(np.uint32)[: max(npages * WRITTEN_PERCENT // 100, 1)]
    draws = _draws(npages)
    writes = rng.random(draws) < WRITTEN_PERCENT / 100
    writes[0] = True
    pages = np.where(
        writes, rng.choice(written, draws), rng.integers(npages, size=draws, dtype=np.uint32)
    )
    return Stage(pages, np.where(writes, INCREMENT, READ).astype(np.uint8))


def _growing(npages: int, pages_per_s: int) -> Pattern:
    sizes = [npages * step // GROWTH_STEPS for step in range(1, GROWTH_STEPS + 1)]
    whole, rate = _all(npages), pages_per_s or FULL_SPEED_PAGES_PER_S
    return tuple(
        _stage(whole[:size], times=max(round(rate * GROWTH_S / size), 1)) for size in sizes
    )


PATTERNS: dict[str, Callable[[int], Stage]] = {
    "idle": _sequential,
    "sequential": _sequential,
    "random": _uniform,
    "zipf": _zipf,
    "bursts": _uniform,
    "read-mostly": _read_mostly,
    "same-bytes": _same_bytes,
}


def increments(pattern: Pattern, npages: int, accesses: int) -> NDArray[np.int64]:
    """Count how often each page has been incremented after so many accesses.

    :return: shape (npages,)
    """
    counts = np.zeros(npages, np.int64)
    passes, rest = divmod(accesses, sum(len(stage) * stage.times for stage in pattern))
    for stage in pattern:
        once = _incremented(stage, len(stage), npages)
        times, rest_of_stage = divmod(min(rest, len(stage) * stage.times), len(stage))
        counts += once * (passes * stage.times + times)
        counts += _incremented(stage, rest_of_stage, npages)
        rest -= times * len(stage) + rest_of_stage
    return counts


def _incremented(stage: Stage, accesses: int, npages: int) -> NDArray[np.int64]:
    kinds = stage.kinds[:accesses]
    return np.bincount(stage.pages[:accesses][kinds == INCREMENT], minlength=npages)


def at(pattern: Pattern, accesses: int) -> tuple[int, int]:
    """Tell which access comes after so many.

    :return: the page, and what is done to it
    """
    rest = accesses % sum(len(stage) * stage.times for stage in pattern)
    for stage in pattern:
        if rest < len(stage) * stage.times:
            break
        rest -= len(stage) * stage.times
    index = rest % len(stage)
    return int(stage.pages[index]), int(stage.kinds[index])
