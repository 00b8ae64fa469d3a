"""When the link between two hosts is cut: at moments that are named, or random ones."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random

from tests.live.twohosts import TwoHosts

_POLL_S = 0.001


@dataclass(frozen=True)
class Cut:
    """One time that the link is cut.

    :ivar when: what must be true first, which is asked every millisecond in another thread; or
        how many seconds after the start, or after the cut before was mended
    :ivar for_s: how long; ``None``: until the end
    """

    when: float | Callable[[], bool]
    for_s: float | None = None


def random_cuts(
    random: Random, count: int, after_s: tuple[float, float], for_s: tuple[float, float]
) -> list[Cut]:
    """So many cuts, each as long, and as long after the one before, as from the ranges."""
    return [Cut(random.uniform(*after_s), random.uniform(*for_s)) for _ in range(count)]


@contextlib.contextmanager
def cutting(
    hosts: TwoHosts, cuts: Iterable[Cut], cut: Callable[[], None] | None = None
) -> Iterator[list[Cut]]:
    """Cut the link, in a thread, as often as ``cuts`` says; in the end it is mended.

    :param cut: what to do instead of :meth:`TwoHosts.cut`
    :return: the cuts that were made so far: a test may end before one
    """
    over, made = threading.Event(), list[Cut]()

    def work() -> None:
        for each in cuts:
            if not _comes(each.when, over):
                return
            (cut or hosts.cut)()
            made.append(each)
            over.wait(each.for_s)
            hosts.mend()

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            yield made
        finally:
            over.set()
            working.result()


def _comes(when: float | Callable[[], bool], over: threading.Event) -> bool:
    """Wait for the moment; whether it came, and not the end."""
    if not callable(when):
        return not over.wait(when)
    while not when():
        if over.wait(_POLL_S):
            return False
    return True
