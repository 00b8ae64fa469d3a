"""The compiled kernels, beside numpy and beside the memory itself, in one process.

A bitmap has one bit a page of 4 KiB: 32 KiB for each GiB of guest. Every sample times, one after
the other, the kernel, what numpy does for it, and memory: ``memcpy`` that reads and writes as many
bytes, all together, as the kernel has to; and a loop that reads as many as it reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.kernels.work import Case, Work, work
from migrator.transport.warm import warm_up
from tracker.bits.words import kernel

Words = NDArray[np.uint64]
_LEAST_S = 0.02  # a sample is repeated until it takes so long


def cases(*, quick: bool) -> list[Case]:
    """All of them; if quick, a few of each kernel."""
    sizes = (1.0, 16.0) if quick else (1.0, 16.0, 128.0, 1024.0)
    densities = (0.0001, 0.5) if quick else (0.0001, 0.01, 0.1, 0.5, 0.9)
    found = [
        Case("merge", size, 0.1, sources)
        for size in sizes
        for sources in ((2,) if quick else (1, 2, 4, 8))
    ]
    found += [Case("or", size, 0.1, 2) for size in sizes]
    for name in ("count", "runs", "larger", "smaller"):
        found += [Case(name, size, density) for size in sizes for density in densities]
    for name in ("zero", "digest"):
        found += [Case(name, 0.0625 if quick else 1.0, density) for density in (0.0, 1.0)]
    return found


def measure(
    wanted: Sequence[Case], runs: int, step: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Time each case so often.

    :param step: called before each case
    :return: samples: what the case is (:class:`bench.kernels.work.Case`); the seconds of one
        execution: ``s``, ``numpy_s``, ``memcpy_s`` and ``read_s``; and how many bytes that has to
        read and to write: ``bytes_read``, ``bytes_written``
    :raise Differs: a kernel and numpy do not agree
    """
    warm_up()
    for case in wanted:
        step(f"{case.kernel}, {case.guest_gib:g} GiB, {case.density:g}, {case.sources} sources")
        todo = work(case)
        check(case, todo)
        source = np.ones(max(todo.read, (todo.read + todo.written) // 2) // 8, np.uint64)
        read, copied = source[: todo.read // 8], source[: (todo.read + todo.written) // 16]
        target = np.zeros_like(copied)
        for _ in range(runs):
            yield {
                **case.to_json(),
                "s": _time(todo.ours),
                "numpy_s": _time(todo.theirs),
                "memcpy_s": _time(lambda: np.copyto(target, copied)),  # noqa: B023
                "read_s": _time(lambda: add_up(read)),  # noqa: B023
                "bytes_read": todo.read,
                "bytes_written": todo.written,
            }


@kernel
def add_up(words: Words) -> int:
    """Read all words, as fast as one core can."""
    total = np.uint64(0)
    for i in range(len(words)):
        total += words[i]
    return int(total)


class Differs(RuntimeError):
    """A kernel and numpy do not agree."""


def check(case: Case, todo: Work) -> None:
    """Compare what comes of both ways.

    :raise Differs: it is not the same
    """
    for ours, theirs in zip(_parts(todo.ours()), _parts(todo.theirs()), strict=True):
        if not np.array_equal(ours, theirs):
            raise Differs(f"{case.kernel}: not what numpy finds")


def _parts(found: object) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


def _time(action: Callable[[], object]) -> float:
    count, spent = 0, 0.0
    started = time.perf_counter()
    while spent < _LEAST_S:
        action()
        count += 1
        spent = time.perf_counter() - started
    return spent / count
