"""The link between two hosts is cut, or falls silent: whenever that is, one VM runs."""

from __future__ import annotations

import asyncio
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from migrator import Failed, MigratorError, Undecided
from migrator.link.session import Link, Session
from migrator.receiver.resolution import resolve
from migrator.report.phases import Phase
from tests.live.cuts import Cut, cutting
from tests.live.moving import Ram, once
from tests.live.sending import SMALL, Case, Road, expecting, on_a_road, on_several_roads
from tests.live.twohosts import TwoHosts
from tests.live.vms import MIB
from tests.profiles import examples, few

pytestmark = pytest.mark.live

_NOT_HERE = (Phase.PREFLIGHT, Phase.ROLLBACK, Phase.DRAIN, Phase.COMPARE)
PHASES = [phase for phase in Phase if phase not in _NOT_HERE]
GUEST_RUNS = (Phase.COPY, Phase.ROUNDS, Phase.SWITCHOVER)
COMPLETE = ("postmigrate", "finish-migrate", "paused")

SILENCE_S = 0.5
SHORT_S = 1.5  # a cut that is noticed
RECONNECT_S = 3.0
RUNS = examples(50)
TYPICAL_S = 2.0  # of a migration in the random runs, until it has ended
SLOW = 100 * 10**6  # bits a second
LAST_S = 0.2  # of which, from the beginning of the switchover
FILL = 16 * MIB  # at that rate, well over a second
QUIET = replace(SMALL, workload=replace(SMALL.workload, working_set_bytes=4 * MIB, pages_per_s=300))
"""A guest that a slow link keeps up with."""


@dataclass(frozen=True)
class Way:
    """A way to lose the link."""

    name: str
    begin: Callable[[TwoHosts], None]


CUT = Way("cut", lambda hosts: hosts.cut())
NOTHING_ARRIVES = Way("a→b", lambda hosts: hosts.drop(hosts.a))
NOTHING_COMES_BACK = Way("b→a", lambda hosts: hosts.drop(hosts.b))
WAYS = (CUT, NOTHING_ARRIVES, NOTHING_COMES_BACK)


async def decide_for_the_source(road: Road) -> None:
    """What an operator does after exit code 4, once the link is mended."""
    found = await resolve(road.vm.qmp, road.link(), None)
    assert found.source in COMPLETE
    if found.destination is None:
        # it ran, and its receiver told so, and has ended: nobody waits for a source for ever
        assert await road.receiver.ended() == 0, (road.receiver.said, found.sentences)
        assert road.receiver.result()["state"] == "running"
    elif found.destination != "running":
        assert (found.decided, found.exit_code) == (False, 4)
        found = await resolve(road.vm.qmp, road.link(), "source")
        assert (found.source, found.decided, found.exit_code) == ("running", True, 0)
    else:
        assert found.decided


async def in_the_end(road: Road, ended: Sequence[MigratorError]) -> str:
    """Check that it ended well, whatever happened; mend the link, and decide if need be.

    :param ended: what the migration raised, if it did
    :return: the side that runs
    """
    error = ended[0] if ended else None
    states = await road.states()
    if isinstance(error, Undecided):
        assert error.exit_code == 4
        assert states[0] in COMPLETE
        road.hosts.mend()
        await decide_for_the_source(road)
        return await road.one_runs()
    assert states[0] == ("running" if error else "postmigrate"), (states, error)
    assert (states[1] == "running") == (error is None), (states, error)
    road.hosts.mend()
    return await road.one_runs()


async def cut_once(
    road: Road, phase: Phase, way: Way, for_s: float | None, *, reconnect_s: float
) -> list[MigratorError]:
    """Migrate, and lose the link when a phase begins, before anything is done in it.

    :param for_s: for how long; ``None``: until :func:`in_the_end` mends it
    """

    def lose() -> None:
        way.begin(road.hosts)
        if for_s is not None:
            asyncio.get_running_loop().call_later(for_s, road.hosts.mend)

    await road.next_receiver()
    with expecting(MigratorError) as ended:
        report = await road.send(once(phase, lose), silence_s=SILENCE_S, reconnect_s=reconnect_s)
        assert report.mismatched_pages == 0
    return ended


def is_back(road: Road) -> bool:
    """Whether the source has reached the receiver again."""
    return "the source is back" in road.receiver.said


# -- once in each phase ----------------------------------------------------------------------------


def _for_good(phase: Phase, way: Way) -> Case:
    async def body(road: Road) -> None:
        ended = await cut_once(road, phase, way, None, reconnect_s=1.0)
        assert bool(ended) == (phase is not Phase.FINISH)
        assert isinstance(ended[0] if ended else None, Undecided) == (phase is Phase.RESUME)
        ran = await in_the_end(road, ended)
        heard = phase is Phase.FINISH or (phase is Phase.RESUME and way is NOTHING_COMES_BACK)
        assert (ran == "destination") == heard

    return Case(f"{way.name} at {phase.value}", body)


@pytest.mark.parametrize("way", WAYS, ids=("cut", "nothing arrives", "nothing comes back"))
@pytest.mark.one_in(3)
def test_the_link_is_lost_for_good(way: Way) -> None:
    on_several_roads([_for_good(phase, way) for phase in few(PHASES, 4)])


def _short(phase: Phase, way: Way) -> Case:
    async def body(road: Road) -> None:
        ended = await cut_once(road, phase, way, SHORT_S, reconnect_s=RECONNECT_S * 3)
        if phase in GUEST_RUNS:
            assert not ended, ended
            assert is_back(road)
        assert not isinstance(ended[0] if ended else None, Undecided), ended
        await in_the_end(road, ended)

    return Case(f"{way.name} at {phase.value}", body)


def test_the_link_is_lost_for_a_moment() -> None:
    """While the guest runs, it is made again; and in the end nobody has to be asked."""
    cases = [_short(phase, CUT) for phase in few(PHASES, 5)]
    cases += [_short(phase, NOTHING_ARRIVES) for phase in few((*GUEST_RUNS, Phase.RESUME), 2)]
    on_several_roads(cases)


def _not_again(phase: Phase) -> Case:
    async def body(road: Road) -> None:
        ended = await cut_once(road, phase, CUT, SHORT_S, reconnect_s=0.0)
        assert ended
        assert not isinstance(ended[0], Undecided)
        assert not is_back(road)
        assert await in_the_end(road, ended) == "source"

    return Case(phase.value, body)


def test_a_link_that_is_not_to_be_made_again() -> None:
    on_several_roads([_not_again(phase) for phase in GUEST_RUNS])


def test_only_the_connection_for_messages_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has nothing to say in the rounds. Pages still come: nobody gives up."""
    sessions: list[Session] = []
    begin = Session.begin

    async def remembered(link: Link) -> Session:
        sessions.append(await begin(link))
        return sessions[-1]

    async def body(road: Road) -> None:
        # longer than the receiver would wait for a source of which it hears nothing
        Ram(road.vm, road.machine).write(64 * MIB, Random(0).randbytes(FILL))
        road.hosts.shape(SLOW // 4)
        await road.next_receiver()
        report = await road.send(
            once(Phase.COPY, lambda: sessions[-1]._control.hang_up()),
            silence_s=SILENCE_S,
            reconnect_s=0.5,
        )
        assert report.mismatched_pages == 0
        assert "lost the source (open)" in road.receiver.said
        assert is_back(road)
        assert await road.one_runs() == "destination"

    monkeypatch.setattr(Session, "begin", remembered)
    on_a_road(body, QUIET)


@pytest.mark.thorough
def test_the_link_is_lost_while_ram_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """With threads in the middle of it: nothing they did keeps the source's RAM mapped."""

    async def body(road: Road) -> None:
        ask = Session.ask

        async def and_lose(self: Session, what: str, *args: Any, **more: Any) -> dict[str, Any]:
            answer = await ask(self, what, *args, **more)
            if what == "look-anew":
                road.hosts.cut()
            return answer

        monkeypatch.setattr(Session, "ask", and_lose)
        await road.next_receiver()
        with pytest.raises(Failed) as caught:
            await road.send(silence_s=SILENCE_S, reconnect_s=1.0)
        assert caught.value.phase == "verify"
        assert await in_the_end(road, [caught.value]) == "source"
        assert not re.search(r"/memfd:|qemu_back_mem", Path("/proc/self/maps").read_text())

    on_a_road(body)


# -- whenever --------------------------------------------------------------------------------------


def _at_random(number: int, random: Random) -> Case:
    at_the_end = number % 3 == 0  # what is decided there takes no time to speak of
    way = random.choice((CUT, CUT, NOTHING_ARRIVES, NOTHING_COMES_BACK))
    when = random.uniform(0, LAST_S if at_the_end else TYPICAL_S)
    for_s = math.exp(random.uniform(math.log(0.05), math.log(1.5 * RECONNECT_S)))
    since = "the switchover began" if at_the_end else "the start"
    name = f"{number}: {way.name} {when:.2f} s after {since} for {for_s:.2f} s"

    async def body(road: Road) -> None:
        if not road.is_used:
            road.hosts.shape(SLOW)
            Ram(road.vm, road.machine).write(64 * MIB, Random(number).randbytes(FILL))
        await road.next_receiver()
        began: list[float] = []
        started = time.monotonic()
        if at_the_end:
            cut = Cut(lambda: bool(began) and time.monotonic() > began[0] + when, for_s)
        else:
            cut = Cut(when, for_s)
        with (
            expecting(MigratorError) as ended,
            cutting(road.hosts, [cut], lambda: way.begin(road.hosts)) as made,
        ):
            report = await road.send(
                once(Phase.SWITCHOVER, lambda: began.append(time.monotonic())),
                silence_s=1.0,
                reconnect_s=RECONNECT_S,
            )
            assert report.mismatched_pages == 0
        again = ", reconnected" if is_back(road) else ""
        ran = await in_the_end(road, ended)
        what = f"{type(ended[0]).__name__}: {ended[0]}" if ended else "completed"
        print(
            f"{name}{'' if made else ' (not made)'}{again}: {ran} runs; {what}; "
            f"{time.monotonic() - started:.2f} s"
        )

    return Case(name, body)


@pytest.mark.thorough
def test_the_link_is_cut_at_random() -> None:
    seed = int(os.environ.get("MIGRATOR_SEED") or Random().randrange(1 << 32))
    print(f"MIGRATOR_SEED={seed}")
    random = Random(seed)
    cases = [_at_random(number, random) for number in range(RUNS)]
    on_several_roads(cases, machine=QUIET)
