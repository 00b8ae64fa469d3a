"""The tracker alone, on a VM that goes on: what it writes, where, and what moving it would take.

Each interval it gives a :class:`~migrator.watch.sample.Sight`. Each second, or more often, all
sources are read twice: at its end, and soon after its beginning, for what is dirty after as short a
time as the last rounds of a migration take.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from migrator.aio import in_thread
from migrator.policy.forecast import Curve, forecast
from migrator.policy.judge import Limits, SendAll
from migrator.qemu.qmp import Qmp
from migrator.tracking.readings import Collected, Tracking
from migrator.tracking.sources import Sources
from migrator.watch.sample import WINDOWS_S, Sight, Watched
from migrator.watch.trackable import tracked
from tracker.bits.heat import History
from tracker.bits.pageset import PageSet
from tracker.memory.ram import RamBlock
from tracker.warm import warm_up

_LONGEST_TICK_S = 1.0
_SHORT_S = 0.1


@dataclass(frozen=True)
class Options:
    """What a caller may choose.

    :ivar seconds: how long to watch; ``None``: until cancelled
    :ivar interval_s: how often to tell, 0.1 or more
    :ivar bytes_per_s: how fast pages would be sent
    :ivar limits: of the migration that is forecast
    :ivar strategy: how writes are noticed: one of :data:`migrator.tracking.strategies.STRATEGIES`,
        or ``auto``
    """

    seconds: float | None = None
    interval_s: float = 1.0
    bytes_per_s: float = 1000.0 * (1 << 20)
    limits: Limits = field(default_factory=Limits)
    strategy: str = "auto"


async def watch(source: str, options: Options, show: Callable[[Sight], None]) -> None:
    """Track a running VM, and leave it as it was.

    :param source: QMP socket of the QEMU that runs it
    :param show: called in the event loop at the end of each interval
    :raise Refused: its RAM cannot be found, or not be tracked in the way that is asked for
    :raise SourceUnreachable: it does not answer
    :raise VmError: it ended, its RAM changed, or somebody else tracks it
    """
    await in_thread(warm_up)
    async with tracked(source, options.strategy) as found:
        await _Watch(found.vm, found.tracking, found.notes, found.sources, options).run(show)


# -- watching it --------------------------------------------------------------------------------


class _Watch:
    def __init__(
        self,
        vm: Qmp,
        tracking: Tracking,
        notes: tuple[str, ...],
        sources: Sources,
        options: Options,
    ) -> None:
        self._vm = vm
        self._tracking = tracking
        self._notes = notes
        self._sources = sources
        self._options = options
        self._histories = {block.name: History(block.npages) for block in tracking.blocks}
        self._ticks = max(1, math.ceil(options.interval_s / _LONGEST_TICK_S))
        self._tick_s = options.interval_s / self._ticks
        self._short = (0.0, 0)
        self._pages: dict[str, int] = {}
        self._bytes = 0

    async def run(self, show: Callable[[Sight], None]) -> None:
        began = last = time.monotonic()
        self._readings = deque([began])
        seconds = math.inf if self._options.seconds is None else self._options.seconds
        while True:
            self._pages, self._bytes = {}, 0
            for _ in range(self._ticks):
                await self._tick()
            now = self._readings[-1]
            state = await self._vm.run_state()
            show(self._sight(now - began, now - last, state))
            last = now
            if now - began > seconds - self._options.interval_s / 2:
                return

    async def _tick(self) -> None:
        """Read all sources twice, and keep what they report together."""
        last = self._readings[-1]
        first, then = await self._collect(last + min(_SHORT_S, self._tick_s / 2))
        self._short = (then - last, first.merged.dirty.nbytes())
        found, now = await self._collect(last + self._tick_s)
        for source, report in found.reports.items():
            both = report | first.reports[source]
            self._pages[source] = self._pages.get(source, 0) + both.count()
        written = found.merged.dirty | first.merged.dirty
        self._bytes += written.nbytes()
        await in_thread(self._note, written, now - last)
        self._readings.append(now)
        while now - self._readings[1] > 2 * max(WINDOWS_S):
            self._readings.popleft()

    async def _collect(self, at: float) -> tuple[Collected, float]:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        found = await self._sources.collect(backends_too=True)
        return found, time.monotonic()

    def _note(self, written: PageSet, seconds: float) -> None:
        for name, history in self._histories.items():
            history.note(written[name], seconds)

    # -- what is told ---------------------------------------------------------------------------

    def _sight(self, at_s: float, over_s: float, state: str) -> Sight:
        watched = tuple(
            Watched(block, self._data_bytes(block), self._histories[block.name])
            for block in self._tracking.blocks
        )
        working_sets = {seconds: self._working_set(seconds) for seconds in WINDOWS_S}
        measured = [self._short, *(found for found in working_sets.values() if found)]
        options = self._options
        return Sight(
            at_s=at_s,
            over_s=over_s,
            state=state,
            tracker=self._tracking.tracker,
            notes=self._notes,
            dirty_pages_per_s={name: pages / over_s for name, pages in self._pages.items()},
            dirty_bytes_per_s=self._bytes / over_s,
            working_set_bytes={s: found and found[1] for s, found in working_sets.items()},
            blocks=watched,
            bytes_per_s=options.bytes_per_s,
            limits=options.limits,
            forecast=forecast(
                Curve(measured, sum(block.size for block in self._tracking.blocks)),
                sum(one.data_bytes for one in watched),
                options.bytes_per_s,
                SendAll(options.limits),
            ),
        )

    def _data_bytes(self, block: RamBlock) -> int:
        if not block.has_file:
            return block.size
        return self._sources.data[block.name].count() * block.page_size

    def _working_set(self, seconds: float) -> tuple[float, int] | None:
        """The time nearest to this one that whole ticks make up, and bytes written in it.

        ``None`` if the watch is younger.
        """
        now = self._readings[-1]
        spans = [now - then for then in reversed(self._readings)]
        if spans[-1] < 0.95 * seconds:
            return None
        last = min(range(1, len(spans)), key=lambda i: abs(spans[i] - seconds))
        written = sum(
            self._histories[block.name].written_in(last) * block.page_size
            for block in self._tracking.blocks
        )
        return spans[last], written
