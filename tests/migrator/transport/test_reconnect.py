"""A link that breaks twice: what has arrived is told once, and must not be taken for more."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest

from migrator.link.connection import hang_up
from migrator.link.session import Applied, Link, Session
from migrator.receiver.incoming import Incoming
from migrator.transport.arrivals import Arrivals, Target
from migrator.transport.runs import UNITS_PER_FRAME
from migrator.transport.stream import StreamCopy
from tests.migrator.transport.test_local import Sides, noise
from tests.pagesets import page_set
from tests.tracker.mapper import shm_directory
from tracker.bits.bitmap import DirtyBitmap

NPAGES = 3 * UNITS_PER_FRAME


class BreakingArrivals(Arrivals):
    """Ends after so many frames; what comes after them is lost."""

    def __init__(self, *args: Any, frames: int | None) -> None:
        super().__init__(*args, spoilt=self._fail)
        self._left = frames

    @staticmethod
    def _fail(problem: Exception) -> None:
        raise problem

    def _frame(self) -> bool:
        if self._left == 0:
            hang_up(self._socket)
            return False
        if self._left is not None:
            self._left -= 1
        return super()._frame()


class Wire:
    """In place of a session: the receiver's own bookkeeping at the other end of socket pairs.

    :ivar frames: after how many frames the next connections break; ``None``: not at all
    :ivar lost_answers: how often connecting again succeeds, and nobody learns of it
    """

    peer = "there"

    def __init__(self, sides: Sides) -> None:
        self.link = Link("there", 1, streams=1)
        self.streams: list[socket.socket] = []
        self.frames: int | None = None
        self.lost_answers = 0
        there = sides.destination
        self._migration = Incoming(
            *("", [Target(there.pid, there.block)], 0.0, 0.0),
            control=cast(Any, None),
            opened_by=None,
            destination=cast(Any, None),
            say=lambda _: None,
            finished=lambda: None,
        )

    async def open(self, _: Sequence[str]) -> None:
        self._connect(0)

    async def ask(self, step: str, _: bytes) -> dict[str, Any]:
        assert step == "reserve"  # there is space enough
        return {}

    async def resume(self, number: int) -> list[Applied]:
        for _ in range(self.lost_answers):
            self._connect(number)
        return self._connect(number)

    def _connect(self, number: int) -> list[Applied]:
        self.hang_up()
        before = self._migration.arrivals.get(0)
        if before is not None:
            before.hang_up()
        told = self._migration.applied_on(0, number)
        ours, theirs = socket.socketpair()
        targets = self._migration.targets
        arrivals = BreakingArrivals(theirs, "here", targets, number, frames=self.frames)
        self._migration.attach(0, arrivals)
        arrivals.start()
        self.streams.append(ours)
        return [Applied(*told)]

    def break_streams(self) -> None:
        for stream in self.streams:
            hang_up(stream)

    def hang_up(self) -> None:
        while self.streams:
            self.streams.pop().close()

    def close(self) -> None:
        for arrivals in self._migration.arrivals.values():
            arrivals.hang_up()
        for target in self._migration.targets:
            target.close()


@pytest.fixture
def sides() -> Iterator[Sides]:
    with shm_directory() as directory:
        made = Sides(directory / "source", directory / "destination", NPAGES)
        for page in range(NPAGES):
            made.source.write(page, noise(page))
        yield made
        made.end()


def lost(sides: Sides, frames: Sequence[int | None], lost_answers: Sequence[int]) -> set[int]:
    """Send everything, and then, again and again, what is owed still.

    :param frames: for each sending, after how many frames the link breaks; ``None``: never
    :param lost_answers: likewise, how often the answer is lost when it was made again
    :return: pages that differ, and that nobody owes
    """

    async def body() -> set[int]:
        wire = Wire(sides)
        wire.frames = frames[0]
        copy = StreamCopy(cast(Session, wire), sides.source.pid, [sides.source.block])
        await copy.open()
        everything = owed = DirtyBitmap.full(NPAGES)
        try:
            for number, answers in enumerate(lost_answers):
                wire.frames = frames[number + 1]  # of the connections that are made again
                wire.lost_answers = answers
                sent = await copy.send(page_set({"ram": owed}), page_set({"ram": everything}))
                assert sent.error is None
                owed = sent.undelivered["ram"] if sent.undelivered else DirtyBitmap.empty(NPAGES)
        finally:
            await copy.close()
            wire.close()
        return sides.differing() - set(owed.pages().tolist())

    return asyncio.run(body())


def test_the_answer_to_a_reconnect_is_lost(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection that replaces one on which nothing came tells what that one had told."""
    assert lost(sides, [1, None], [2]) == set()

    def latest_only(self: Incoming, index: int, number: int) -> tuple[int, int]:
        before = self.arrivals.get(index)
        return (before.round, before.frames) if before is not None else (number, 0)

    sides.destination.punch(0, NPAGES)
    monkeypatch.setattr(Incoming, "applied_on", latest_only)
    # it says that the round that comes next is under way, so all of this one seems to be there
    assert lost(sides, [1, None], [1]) >= set(range(UNITS_PER_FRAME, 2 * UNITS_PER_FRAME))


def test_the_link_breaks_again_before_anything_came(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told then is of the round before."""
    assert lost(sides, [1, 0, None], [0, 0]) == set()

    def whatever_round(self: Applied, number: int) -> int | None:
        return None if self.round > number else self.frames

    sides.destination.punch(0, NPAGES)
    monkeypatch.setattr(Applied, "of_round", whatever_round)
    assert lost(sides, [1, 0, None], [0, 0]) == set(range(UNITS_PER_FRAME, 2 * UNITS_PER_FRAME))


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("second", [0, 1, 2])
def test_all_arrives_in_the_end(sides: Sides, first: int, second: int) -> None:
    assert lost(sides, [first, second, 0, None], [1, 2, 0]) == set()
    assert lost(sides, [first, second, None, None], [0, 1, 0]) == set()
    assert sides.differing() == set()
