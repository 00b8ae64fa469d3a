"""One cell: a strategy on a guest, its reports against the truth, and what it costs.

Spans of a guest that is tracked alternate with spans in which it is not, in one VM. A tracked span
is a round::

    the guest runs     start to track
    the guest stands   collect: nothing counts as written now; once more: what that costs at least
                       copy all of RAM
    the guest runs     collect some times
    the guest stands   compare all of RAM with the copy: these pages changed
                       collect: all of them must have been reported by now

Comparing comes before the last collection, so that what QEMU itself writes meanwhile can only be
reported, not missed.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.guests.guests import Guest
from bench.guests.pulse import BeatsBroken
from bench.strategies.replica import Replica
from bench.strategies.strategy import Maker
from bench.strategies.suite import Task
from bench.strategies.vmspans import Span, Spans, running
from bench.strategies.watcher import Collection, Watcher, WatchingFailed
from migrator.aio import in_thread
from migrator.errors import MigratorError
from tracker.bits.bitmap import DirtyBitmap
from tracker.errors import TrackerError

FAILURES = (WatchingFailed, BeatsBroken, MigratorError, TrackerError, OSError)
"""What ends a cell, and not those after it."""

_SETTLE_S = 0.5  # a guest that has just begun writes otherwise than later
_NAMED = 16


def measure(task: Task, make: Maker | None, guest: Guest, directory: Path) -> dict[str, Any]:
    """Measure a cell, in a VM of its own.

    :param make: of the strategy's source; ``None``: nobody tracks
    :param directory: on tmpfs; with the guest's images in it
    :return: what :mod:`bench.strategies.run` calls a cell
    :raise FAILURES: it could not be measured
    """
    return asyncio.run(_measure(task, make, guest, directory))


async def _measure(task: Task, make: Maker | None, guest: Guest, directory: Path) -> dict[str, Any]:
    with ExitStack() as stack:
        watcher = stack.enter_context(Watcher(make)) if make is not None else None
        place = stack.enter_context(_subdirectory(directory / "vm"))
        async with running(guest, place, directory) as vm:
            if watcher is not None:
                await in_thread(watcher.attach, vm.pid, vm.block)
            await asyncio.sleep(_SETTLE_S)
            await vm.halt()
            return await _Cell(task, vm, watcher).measure()


class _Cell:
    def __init__(self, task: Task, vm: Spans, watcher: Watcher | None) -> None:
        self._task, self._vm, self._watcher = task, vm, watcher
        self._rounds: list[dict[str, Any]] = []
        self._usage: dict[str, int] | None = None

    async def measure(self) -> dict[str, Any]:
        spans: dict[bool, list[Span]] = {True: [], False: []}
        for number in range(self._task.pairs):
            for tracked in (False, True) if number % 2 else (True, False):
                span = await (self._tracked() if tracked else self._untracked())
                spans[tracked].append(span)
        replica = Replica(self._vm.pid, self._vm.block)
        data = replica.data().count()
        replica.close()
        await in_thread(self._vm.check)
        return {
            "data_bytes": data * self._vm.block.page_size,
            "tracked": [span.to_json() for span in spans[True]],
            "untracked": [span.to_json() for span in spans[False]],
            "rounds": self._rounds,
            "usage": self._usage,
        }

    async def _untracked(self) -> Span:
        return await self._vm.span(lambda: self._looking(lambda: None))

    async def _looking(self, look: Callable[[], None]) -> None:
        """Let the span pass, and look some times, in even intervals."""
        interval_s = self._task.span_s / (self._task.collections + 1)
        for _ in range(self._task.collections):
            await asyncio.sleep(interval_s)
            await in_thread(look)
        await asyncio.sleep(interval_s)

    async def _tracked(self) -> Span:
        watcher = self._watcher
        if watcher is None:
            return await self._unwatched()
        vm = self._vm
        await vm.run()
        started = await in_thread(watcher.start)
        await vm.halt()
        first, idle = await in_thread(watcher.collect), await in_thread(watcher.collect)
        found: list[Collection] = []
        with _copied(vm) as copy:
            span = await vm.span(lambda: self._looking(lambda: found.append(watcher.collect())))
            changed = await in_thread(copy.differing)
        last = await in_thread(watcher.collect)
        used = await in_thread(watcher.usage)
        await in_thread(watcher.stop)
        whole = [("first", first), ("idle", idle), *(("running", c) for c in found), ("last", last)]
        self._rounds.append(
            {
                "start_ms": started.s * 1000,
                "start_digest_ms": started.digest_s * 1000,
                "start_cpu_ms": started.cpu_s * 1000,
                "cpu_ms": sum(c.cpu_s for c in found) * 1000,
                "children_cpu_ms": (last.children_cpu_s - idle.children_cpu_s) * 1000,
                "collections": [{"when": when, **_json(c)} for when, c in whole],
                **_judged(changed, [*found, last]),
            }
        )
        self._usage = {
            "before_bytes": used.before,
            "tracker_bytes": used.now,
            "children_bytes": used.children,
        }
        return span

    async def _unwatched(self) -> Span:
        with _copied(self._vm) as copy:
            span = await self._vm.span(lambda: self._looking(lambda: None))
            changed = await in_thread(copy.differing)
        self._rounds.append({"changed": changed.count()})
        return span


@contextmanager
def _copied(vm: Spans) -> Iterator[Replica]:
    """All of the RAM of a guest that stands."""
    copy = Replica(vm.pid, vm.block)
    try:
        copy.bring(DirtyBitmap.full(vm.block.npages))
        yield copy
    finally:
        copy.close()


def _judged(changed: DirtyBitmap, found: list[Collection]) -> dict[str, Any]:
    """How the reports compare with the truth."""
    reported = DirtyBitmap.empty(changed.npages)
    for collection in found:
        reported |= collection.pages
    missed = changed - reported
    runs, _ = missed.runs()
    return {
        "changed": changed.count(),
        "reported": reported.count(),
        "missed": missed.count(),
        "missed_at": runs[:_NAMED].tolist(),
    }


def _json(collection: Collection) -> dict[str, Any]:
    return {
        "ms": collection.s * 1000,
        "digest_ms": collection.digest_s * 1000,
        "cpu_ms": collection.cpu_s * 1000,
        "pages": collection.pages.count(),
    }


@contextmanager
def _subdirectory(made: Path) -> Iterator[Path]:
    made.mkdir()
    try:
        yield made
    finally:
        shutil.rmtree(made)
