"""A receiver that is killed: its VM runs or never will, and the source is told which."""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

import pytest

from migrator import Failed, MigratorError, Undecided
from migrator.errors import LinkError
from migrator.qemu.qmp import Qmp
from migrator.qemu.settings import read_settings, to_undo
from migrator.receiver.resolution import resolve
from migrator.report.phases import Phase
from tests.live.moving import once
from tests.live.sending import Receiver, Road, comes_to, eventually, monitor, on_a_road, state
from tests.live.test_cuts import COMPLETE
from tests.processes import is_running

pytestmark = pytest.mark.live

_RECEIVE = """
import os, signal, sys
from migrator.receiver import receive as reception
from migrator.cli.main import main
from migrator.migration.destination import LocalDestination
from migrator.qemu.devicestate import Outgoing

when, with_its_witness = sys.argv.pop(1), sys.argv.pop(1)
witnesses = []

class Witness(reception.Witness):
    def __init__(self, *args):
        super().__init__(*args)
        witnesses.append(self._process.pid)

reception.Witness = Witness

def die(moment):
    if moment == when:
        if with_its_witness:
            os.kill(witnesses[0], signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

go, finish = LocalDestination.go, Outgoing.finish

async def dying_go(self, **how):
    die("told")
    found = await go(self, **how)
    die("ran")
    return found

async def dying_finish(self, end, **how):
    await finish(self, end, **how)
    die("given")

LocalDestination.go, Outgoing.finish = dying_go, dying_finish
main()
"""


async def dying(road: Road, when: str, *options: str, with_its_witness: bool = False) -> None:
    """Start a receiver that kills itself.

    :param when: after it was ``told`` to go, has ``given`` QEMU the end of its stream, or it
        ``ran``
    :param with_its_witness: which it kills before
    """
    program = [sys.executable, "-c", _RECEIVE, when, "too" if with_its_witness else ""]
    road.prepare(*options, program=program, insecure=not options)
    await road.next_receiver()


def witness_of(receiver: Receiver) -> int:
    """The process of its witness."""
    children = Path(f"/proc/{receiver.process.pid}/task/{receiver.process.pid}/children")
    for pid in map(int, children.read_text().split()):
        if b"migrator.receiver.witness" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError("it has no witness")


async def send_and_hear_nothing(road: Road) -> None:
    """Migrate; from the word *go* on, which arrives, nothing comes back."""
    deaf = once(Phase.RESUME, lambda: road.hosts.drop(road.hosts.b))
    await road.send(deaf, reconnect_s=0.5, silence_s=0.5)


async def settings_are_back(road: Road) -> None:
    qmp = await Qmp.connect("destination", monitor(road.destination))
    try:
        assert to_undo(await read_settings(qmp)) is None
    finally:
        await qmp.close()


@pytest.mark.parametrize("when", ["given", "ran"])
def test_a_vm_that_was_told_to_go_runs_and_the_source_learns_it(when: str) -> None:
    async def body(road: Road) -> None:
        await dying(road, when)
        report = await road.send(reconnect_s=10.0, silence_s=1.0)
        assert report.mismatched_pages == 0
        assert await road.receiver.ended() == -signal.SIGKILL
        assert "the VM runs here; staying to tell the source so" in road.receiver.said
        await settings_are_back(road)
        found = await resolve(road.vm.qmp, road.link(), None)
        assert (found.destination, found.decided) == ("running", True)
        with pytest.raises(LinkError, match="cannot go on"):  # there is no other VM to be had here
            await road.send()
        assert await state(road.vm) in COMPLETE
        assert await road.one_runs() == "destination"

    on_a_road(body)


def test_a_vm_that_was_not_given_the_end_never_runs_and_the_source_goes_on() -> None:
    async def body(road: Road) -> None:
        await dying(road, "told")
        with pytest.raises(Failed, match="did not run: the receiver was killed"):
            await road.send(reconnect_s=10.0, silence_s=1.0)
        assert await state(road.destination) == "gone"
        assert list(road.receiver.directory.glob("migrator-*")) == []
        assert await road.one_runs() == "source"
        await road.next_receiver()
        assert (await road.send()).mismatched_pages == 0
        assert await road.one_runs() == "destination"

    on_a_road(body)


@pytest.mark.parametrize("when", ["told", "ran"])
def test_without_its_witness_the_source_is_left_without_an_answer(when: str) -> None:
    """The other side of the tests above."""

    async def body(road: Road) -> None:
        await dying(road, when, with_its_witness=True)
        with pytest.raises(Undecided):
            await road.send(reconnect_s=1.0, silence_s=1.0)
        assert await state(road.vm) in COMPLETE
        found = await resolve(road.vm.qmp, road.link(), None)
        assert (found.destination, found.exit_code) == (None, 4)
        await comes_to(road.destination, "running" if when == "ran" else "gone")
        if when == "told":
            await resolve(road.vm.qmp, None, "source", gone=True)
        await road.one_runs()

    on_a_road(body)


def test_it_answers_an_operator_for_as_long_as_the_vm_lives() -> None:
    """The link was down until after the source had given up."""

    async def body(road: Road) -> None:
        await dying(road, "ran")
        with pytest.raises(Undecided):
            await road.send(
                once(Phase.RESUME, lambda: road.hosts.drop(road.hosts.b)),
                reconnect_s=0.5,
                silence_s=0.5,
            )
        road.hosts.mend()
        found = await resolve(road.vm.qmp, road.link(), None)
        assert (found.destination, found.exit_code) == ("running", 0)
        assert not any("--decide" in sentence for sentence in found.sentences)
        found = await resolve(road.vm.qmp, road.link(), "source")
        assert (found.source, found.destination) == ("postmigrate", "running")
        assert await road.one_runs() == "destination"

    on_a_road(body)


@pytest.mark.parametrize("phase", [Phase.ROUNDS, Phase.FINAL_SEND, Phase.LOAD, Phase.RESUME])
def test_a_receiver_whose_witness_has_ended_runs_nothing(phase: Phase) -> None:
    async def body(road: Road) -> None:
        receiver = await road.next_receiver()
        witness = witness_of(receiver)

        def kill() -> None:
            pidfd = os.pidfd_open(witness)
            os.kill(witness, signal.SIGKILL)
            select.select([pidfd], [], [], 10)
            os.close(pidfd)

        with pytest.raises(MigratorError, match=r"the witness, process \d+, has ended"):
            await road.send(once(phase, kill))
        assert await road.receiver.ended() == 1
        assert await road.one_runs() == "source"

    on_a_road(body)


def test_a_receiver_that_is_killed_before_a_vm_came_leaves_nothing() -> None:
    async def body(road: Road) -> None:
        receiver = await road.next_receiver()
        witness = witness_of(receiver)
        receiver.process.kill()
        assert await receiver.ended() == -signal.SIGKILL
        assert "the receiver was killed before a VM came" in receiver.said
        await eventually(lambda: not is_running(witness), "its witness ends")
        assert await state(road.destination) == "gone"
        assert list(receiver.directory.glob("migrator-*")) == []
        assert await state(road.vm) == "running"

    on_a_road(body)


def test_a_witness_ends_with_its_receiver_and_with_its_vm() -> None:
    async def body(road: Road) -> None:
        receiver = await road.next_receiver()
        witness = witness_of(receiver)
        assert (await road.send()).mismatched_pages == 0
        assert await receiver.ended() == 0
        assert not is_running(witness)
        assert await road.one_runs() == "destination"
        await dying(road, "ran")
        witness = witness_of(road.receiver)
        with pytest.raises(Undecided):
            await road.send(
                once(Phase.RESUME, lambda: road.hosts.drop(road.hosts.b)),
                reconnect_s=0.5,
                silence_s=0.5,
            )
        assert is_running(witness)
        await road.destination.stop()
        await eventually(lambda: not is_running(witness), "its witness ends")

    on_a_road(body)
