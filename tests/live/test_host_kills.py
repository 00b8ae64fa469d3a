"""Between two hosts, whoever is killed, and whenever: one side runs, and nothing of ours stays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from migrator import MigratorError, Undecided
from migrator.receiver.resolution import resolve
from migrator.report.phases import Phase
from tests.live.moving import once
from tests.live.sending import (
    Case,
    Road,
    comes_to,
    eventually,
    expecting,
    on_a_road,
    on_several_roads,
    state,
)
from tests.live.test_cuts import COMPLETE, PHASES
from tests.profiles import few

pytestmark = pytest.mark.live

BEFORE_THE_WORD = PHASES[: PHASES.index(Phase.RESUME)]
RECONNECT_S = 1.0

_SENDER = """
import asyncio, json, os, signal, sys
from migrator import Limits, Options, migrate
from migrator.link.session import Link
source, link, phase, and_the_guard = sys.argv[1:]
guards = []
if and_the_guard:
    import subprocess
    from migrator.migration import guard
    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if any("migrator.migration.guard" in word for word in args[0]):
                guards.append(self.pid)
    guard.subprocess.Popen = Popen
def watch(progress):
    if progress.phase == phase:
        for pid in guards:
            os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
options = Options(limits=Limits(on_limit="force"), verify=True)
asyncio.run(migrate(source, Link(**json.loads(link)), options, watch=watch))
"""


async def send_and_be_killed(
    road: Road, phase: Phase, *, and_the_guard: bool = False, reconnect_s: float = RECONNECT_S
) -> str:
    """Migrate in a process that kills itself, and its guard, when a phase begins.

    :return: what was said by the process, and by the guard, which has ended by then
    """
    link = road.link(reconnect_s=reconnect_s, silence_s=1.0)
    sender = road.hosts.a.run(
        [
            *[sys.executable, "-c", _SENDER, road.vm.qmp, json.dumps(link.to_json())],
            *[phase.value, "guard" if and_the_guard else ""],
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    # read to the end of file: the guard, which inherits it, is done then too
    _, said = await asyncio.to_thread(sender.communicate)
    assert sender.returncode == -signal.SIGKILL, said
    return str(said)


def _sender_killed(phase: Phase) -> Case:
    async def body(road: Road) -> None:
        await road.next_receiver()
        said = await send_and_be_killed(road, phase)
        ran = "destination" if await state(road.vm) != "running" else "source"
        if phase in BEFORE_THE_WORD:
            assert ran == "source", said
        if phase is Phase.FINISH:
            assert ran == "destination", said
        if phase is Phase.RESUME and ran == "source":
            await eventually(lambda: "it never ran" in road.receiver.said, "it gives up")
        elif phase is not Phase.ATTACH:  # when it has not heard of it yet
            assert await road.receiver.ended() == (0 if ran == "destination" else 1)
            state_there = "running" if ran == "destination" else "never"
            assert road.receiver.result()["state"] == state_there
        assert await road.one_runs() == ran
        await _moves_again(road)

    return Case(phase.value, body)


async def _moves_again(road: Road) -> None:
    await road.next_receiver()
    report = await road.send()
    assert report.mismatched_pages == 0
    assert await road.one_runs() == "destination"


def test_the_sender_is_killed() -> None:
    on_several_roads([_sender_killed(phase) for phase in few(PHASES, 4)])


def test_without_the_guard_the_source_stays_paused() -> None:
    """The other side of the test above; an operator who ended the destination lets it go on."""

    async def body(road: Road) -> None:
        await road.next_receiver()
        await send_and_be_killed(road, Phase.FINAL_SEND, and_the_guard=True)
        assert await road.receiver.ended() == 1
        assert (await road.states())[0] in COMPLETE
        assert (await road.states())[1] != "running"
        found = await resolve(road.vm.qmp, None, "source", gone=True)
        assert (found.source, found.exit_code) == ("running", 0)
        assert await road.one_runs() == "source"

    on_a_road(body)


def _kill(pid: Callable[[], int]) -> Callable[[], None]:
    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid(), signal.SIGKILL)

    return kill


def _receiver_killed(phase: Phase) -> Case:
    async def body(road: Road) -> None:
        receiver = await road.next_receiver()
        with expecting(MigratorError) as ended:
            # long enough for its witness to answer, also on a busy machine
            await road.send(once(phase, _kill(lambda: receiver.process.pid)), reconnect_s=20.0)
        if phase is Phase.FINISH:
            assert not ended, ended
            assert await road.one_runs() == "destination"
            return
        assert not isinstance(ended[0], Undecided), ended
        await comes_to(road.destination, "gone")
        assert await road.one_runs() == "source"

    return Case(phase.value, body)


def test_the_receiver_is_killed() -> None:
    on_several_roads([_receiver_killed(phase) for phase in few(PHASES, 4)])


def _destination_killed(phase: Phase) -> Case:
    async def body(road: Road) -> None:
        receiver = await road.next_receiver()
        with expecting(MigratorError) as ended:
            await road.send(once(phase, _kill(lambda: road.destination.pid)))
        assert ended
        assert not isinstance(ended[0], Undecided), ended
        assert await receiver.ended() == 1
        assert await road.one_runs() == "source"

    return Case(phase.value, body)


def test_the_destination_is_killed() -> None:
    on_several_roads(
        [_destination_killed(phase) for phase in few((*BEFORE_THE_WORD, Phase.RESUME), 4)]
    )
