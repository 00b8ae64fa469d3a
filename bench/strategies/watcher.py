"""A process that tracks, and does nothing else: what it uses is what tracking costs.

It also keeps a copy of what it has reported, as a migration does: strategies that compare need the
digests of what was copied. Copying is no part of what is timed, taking digests is.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from bench.strategies import usage
from bench.strategies.replica import Replica
from bench.strategies.strategy import Maker
from tracker.bits.bitmap import DirtyBitmap
from tracker.memory.ram import RamBlock
from tracker.sources.coarse import Compared
from tracker.sources.contenthash import ContentHash
from tracker.sources.source import DirtySource
from tracker.warm import warm_up

_ANSWER_S = 180.0
_STOP_S = 10.0


class WatchingFailed(Exception):
    """The process that tracks could not, or has ended."""


@dataclass(frozen=True)
class Started:
    """What it took to begin.

    :ivar s: until every write is tracked
    :ivar digest_s: what the digests of a copy of all RAM took
    :ivar cpu_s: processor time of the process and its children, for both
    """

    s: float
    digest_s: float
    cpu_s: float


@dataclass(frozen=True)
class Collection:
    """What one collection found.

    :ivar pages: that are reported
    :ivar s: what the source took
    :ivar digest_s: what the digests of copies took
    :ivar cpu_s: processor time of the process for both
    :ivar children_cpu_s: of its children, since they began
    """

    pages: DirtyBitmap
    s: float
    digest_s: float
    cpu_s: float
    children_cpu_s: float


@dataclass(frozen=True)
class Usage:
    """Resident memory in bytes, without what is mapped of the guest's RAM and its copy.

    :ivar before: of the process, before it had a source
    :ivar now: of the process
    :ivar children: of its children
    """

    before: int
    now: int
    children: int


class Watcher:
    """The process, as seen from the one that measures.

    :param make: its source, from process and blocks; from a module, as it has to be sent there
    """

    def __init__(self, make: Maker) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        # Ctrl-C is for us, and we tell it; also in the second before it can ignore it
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()

    def attach(self, pid: int, block: RamBlock) -> None:
        """Say what is to be tracked."""
        self._ask("attach", pid, block)

    def start(self) -> Started:
        """Begin to track."""
        found: Started = self._ask("start")
        return found

    def collect(self) -> Collection:
        """Collect once."""
        found: Collection = self._ask("collect")
        return found

    def usage(self) -> Usage:
        """What it holds."""
        found: Usage = self._ask("usage")
        return found

    def stop(self) -> None:
        """Track no more; :meth:`start` may follow."""
        self._ask("stop")

    def _ask(self, *request: Any) -> Any:
        try:
            self._ours.send(request)
            if not self._ours.poll(_ANSWER_S):
                raise WatchingFailed(f"no answer to {request[0]} in {_ANSWER_S:g} s")
            answer, problem = self._ours.recv()
        except (EOFError, OSError) as error:
            raise WatchingFailed("the process that tracks has ended") from error
        if problem:
            raise WatchingFailed(problem)
        return answer

    def close(self) -> None:
        """End it, and what it has started; whatever it does."""
        self._ours.close()  # upon which it stops tracking, and ends
        self._process.join(_STOP_S)
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


# -- in the process -----------------------------------------------------------------------------


class _Tracking:
    """What the process does.

    :param make: see :class:`Watcher`
    """

    def __init__(self, make: Maker) -> None:
        self._make = make
        self._source: DirtySource | None = None
        self._replica: Replica | None = None
        self._before = usage.own_bytes()

    def attach(self, pid: int, block: RamBlock) -> None:
        self._pid, self._block = pid, block

    def start(self) -> Started:
        cpu, ended = usage.cpu_s(), usage.ended_children_cpu_s()
        began = time.perf_counter()
        self._source = self._make(self._pid, [self._block])
        self._source.start()
        spent = time.perf_counter() - began
        cpu = usage.cpu_s() - cpu + usage.ended_children_cpu_s() - ended + usage.children_cpu_s()
        digest_s, digest_cpu_s = self._copy(DirtyBitmap.full(self._block.npages))
        return Started(spent, digest_s, cpu + digest_cpu_s)

    def collect(self) -> Collection:
        assert self._source is not None
        cpu, began = usage.cpu_s(), time.perf_counter()
        pages = self._source.collect()[self._block.name]
        spent, cpu = time.perf_counter() - began, usage.cpu_s() - cpu
        digest_s, digest_cpu_s = self._copy(pages)
        return Collection(pages, spent, digest_s, cpu + digest_cpu_s, usage.children_cpu_s())

    def _copy(self, pages: DirtyBitmap) -> tuple[float, float]:
        """Copy pages for a source that compares with copies; what their digests took, twice."""
        source = self._source
        if not isinstance(source, (ContentHash, Compared)):
            return 0.0, 0.0
        if self._replica is None:
            self._replica = Replica(self._pid, self._block)
        self._replica.bring(pages)
        cpu, began = usage.cpu_s(), time.perf_counter()
        digests = self._replica.digests(pages, source.copies.seed)
        source.copies.copied(self._block.name, pages, digests)
        return time.perf_counter() - began, usage.cpu_s() - cpu

    def usage(self) -> Usage:
        return Usage(self._before, usage.own_bytes(), usage.children_bytes())

    def stop(self) -> None:
        if self._source is not None:
            self._source.stop()
        self._source = None
        if self._replica is not None:
            self._replica.close()
        self._replica = None


def _serve(requests: Connection, make: Maker) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    warm_up()
    tracking = _Tracking(make)
    answers: dict[str, Callable[..., object]] = {
        "attach": tracking.attach,
        "start": tracking.start,
        "collect": tracking.collect,
        "usage": tracking.usage,
        "stop": tracking.stop,
    }
    with contextlib.ExitStack() as stack:
        stack.callback(tracking.stop)
        while True:
            try:
                name, *arguments = requests.recv()
                requests.send(_answered(answers[name], arguments))
            except (EOFError, OSError):
                return


def _answered(answer: Callable[..., object], arguments: list[Any]) -> tuple[object, str]:
    try:
        return answer(*arguments), ""
    except Exception as error:  # noqa: BLE001 (told to whoever asked)
        return None, f"{type(error).__name__}: {error}"
