"""How each fault is done to a scene."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tests.faults.kinds import Fault
from tests.faults.monitors import CommandRefused, MonitorLost
from tests.faults.scenes import Scene, Side

_BURST_S = 1.5


@dataclass
class Strike:
    """A fault that has struck.

    :ivar phase: the phase in which the command was
    :ivar at_s: when, in seconds since the epoch
    :ivar answers: of the monitor, to each command of the fault: ``done``, or an error
    """

    phase: str
    at_s: float
    answers: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> bool:
        """Whether QEMU did at least one of the commands, or none was given."""
        return not self.answers or "done" in self.answers

    @property
    def half_accepted(self) -> bool:
        """Whether QEMU did the first of the commands, and refused a later one."""
        return self.answers[:1] == ["done"] and any(each != "done" for each in self.answers)


Rest = Callable[[], Awaitable[None]]
"""The part of a fault that comes after the command, if it was held, has gone on."""


async def strike(scene: Scene) -> tuple[Strike, Rest]:
    """Do the fault of the scene's plan.

    :return: the strike, and the part of the fault that remains to be done
    """
    struck = Strike(scene.command.phase, time.time())
    rest = await _ACTIONS[scene.plan.fault](scene, struck)
    return struck, rest or _nothing


async def _nothing() -> None:
    return None


_Action = Callable[[Scene, Strike], Awaitable["Rest | None"]]


# -- processes of ours -----------------------------------------------------------------------------


def _signalled(number: signal.Signals) -> _Action:
    async def action(scene: Scene, _: Strike) -> None:
        scene.command.signal(number)

    return action


def _receiver_signalled(number: signal.Signals) -> _Action:
    async def action(scene: Scene, _: Strike) -> None:
        assert scene.receiver is not None
        scene.receiver.signal(number)

    return action


def _kill_guards(scene: Scene) -> None:
    for pid in scene.command.guards():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def _guard_kill(scene: Scene, _: Strike) -> None:
    _kill_guards(scene)


async def _command_and_guard_kill(scene: Scene, _: Strike) -> None:
    _kill_guards(scene)
    scene.command.signal(signal.SIGKILL)


async def _command_freeze(scene: Scene, _: Strike) -> Rest:
    scene.command.signal(signal.SIGSTOP)

    async def thaw() -> None:
        await asyncio.sleep(scene.plan.lasting_s)
        scene.command.signal(signal.SIGCONT)

    return thaw


async def _output_closed(scene: Scene, _: Strike) -> None:
    if scene.plan.seed % 3 != 1:
        scene.command.stdout.close()
    if scene.plan.seed % 3 != 2:
        scene.command.stderr.close()


async def _none(scene: Scene, _: Strike) -> None:
    return None


# -- QEMUs -----------------------------------------------------------------------------------------


def _killed(side: Callable[[Scene], Side]) -> _Action:
    async def action(scene: Scene, _: Strike) -> None:
        side(scene).kill()

    return action


def _frozen(side: Callable[[Scene], Side]) -> _Action:
    async def action(scene: Scene, _: Strike) -> Rest:
        with contextlib.suppress(ProcessLookupError):
            os.kill(side(scene).pid, signal.SIGSTOP)

        async def thaw() -> None:
            await asyncio.sleep(scene.plan.lasting_s)
            with contextlib.suppress(ProcessLookupError):
                os.kill(side(scene).pid, signal.SIGCONT)

        return thaw

    return action


async def _tell(side: Side, command: str, struck: Strike) -> None:
    try:
        await side.monitor.execute(command)
        struck.answers.append("done")
    except (CommandRefused, MonitorLost) as error:
        # QEMU may have ended by the command before it could answer
        done = command == "quit" and isinstance(error, MonitorLost)
        struck.answers.append("done" if done else f"{command}: {error}")


def _told(side: Callable[[Scene], Side], command: str) -> _Action:
    async def action(scene: Scene, struck: Strike) -> None:
        await _tell(side(scene), command, struck)

    return action


def _told_to_stop_and_go(side: Callable[[Scene], Side]) -> _Action:
    async def action(scene: Scene, struck: Strike) -> Rest | None:
        await _tell(side(scene), "stop", struck)

        async def go() -> None:
            await asyncio.sleep(scene.plan.step_s)
            await _tell(side(scene), "cont", struck)

        if scene.plan.seed % 2:  # both while the command is held
            await go()
            return None
        return go

    return action


def _told_again_and_again(side: Callable[[Scene], Side], command: str) -> _Action:
    async def action(scene: Scene, struck: Strike) -> Rest:
        await _tell(side(scene), command, struck)

        async def more() -> None:
            deadline = time.monotonic() + _BURST_S
            while time.monotonic() < deadline and scene.command.exit_code is None:
                await asyncio.sleep(scene.plan.step_s)
                await _tell(side(scene), command, struck)

        return more

    return action


async def _destination_full(scene: Scene, struck: Strike) -> None:
    await asyncio.to_thread(scene.fill_up)
    struck.at_s = time.time()  # nothing is left from now on


# -- the link --------------------------------------------------------------------------------------


async def _link_blink(scene: Scene, _: Strike) -> Rest:
    assert scene.hosts is not None
    hosts = scene.hosts
    await asyncio.to_thread(hosts.cut)

    async def mend() -> None:
        await asyncio.sleep(scene.plan.lasting_s)
        await asyncio.to_thread(hosts.mend)

    return mend


async def _link_cut(scene: Scene, _: Strike) -> None:
    assert scene.hosts is not None
    await asyncio.to_thread(scene.hosts.cut)


async def _drop_from_a(scene: Scene, _: Strike) -> None:
    assert scene.hosts is not None
    await asyncio.to_thread(scene.hosts.drop, scene.hosts.a)


async def _drop_from_b(scene: Scene, _: Strike) -> None:
    assert scene.hosts is not None
    await asyncio.to_thread(scene.hosts.drop, scene.hosts.b)


def _source(scene: Scene) -> Side:
    return scene.source


def _destination(scene: Scene) -> Side:
    return scene.destination


_ACTIONS: dict[Fault, _Action] = {
    Fault.NONE: _none,
    Fault.COMMAND_KILL: _signalled(signal.SIGKILL),
    Fault.COMMAND_AND_GUARD_KILL: _command_and_guard_kill,
    Fault.GUARD_KILL: _guard_kill,
    Fault.COMMAND_TERM: _signalled(signal.SIGTERM),
    Fault.COMMAND_INT: _signalled(signal.SIGINT),
    Fault.COMMAND_HUP: _signalled(signal.SIGHUP),
    Fault.COMMAND_FREEZE: _command_freeze,
    Fault.OUTPUT_CLOSED: _output_closed,
    Fault.OUTPUT_FULL: _none,  # from the beginning
    Fault.SOURCE_KILL: _killed(_source),
    Fault.SOURCE_FREEZE: _frozen(_source),
    Fault.SOURCE_CONT: _told(_source, "cont"),
    Fault.SOURCE_CONT_BURST: _told_again_and_again(_source, "cont"),
    Fault.SOURCE_STOP: _told(_source, "stop"),
    Fault.SOURCE_STOP_CONT: _told_to_stop_and_go(_source),
    Fault.SOURCE_RESET: _told(_source, "system_reset"),
    Fault.SOURCE_CANCEL: _told(_source, "migrate_cancel"),
    Fault.SOURCE_QUIT: _told(_source, "quit"),
    Fault.GUEST_ENDS: _told(_source, "system_reset"),  # QEMU runs with -no-reboot
    Fault.DESTINATION_KILL: _killed(_destination),
    Fault.DESTINATION_FREEZE: _frozen(_destination),
    Fault.DESTINATION_CONT: _told(_destination, "cont"),
    Fault.DESTINATION_CONT_BURST: _told_again_and_again(_destination, "cont"),
    Fault.DESTINATION_STOP: _told(_destination, "stop"),
    Fault.DESTINATION_STOP_CONT: _told_to_stop_and_go(_destination),
    Fault.DESTINATION_RESET: _told(_destination, "system_reset"),
    Fault.DESTINATION_CANCEL: _told(_destination, "migrate_cancel"),
    Fault.DESTINATION_QUIT: _told(_destination, "quit"),
    Fault.DESTINATION_FULL: _destination_full,
    Fault.LINK_BLINK: _link_blink,
    Fault.LINK_CUT: _link_cut,
    Fault.LINK_DROP_FROM_A: _drop_from_a,
    Fault.LINK_DROP_FROM_B: _drop_from_b,
    Fault.RECEIVER_KILL: _receiver_signalled(signal.SIGKILL),
    Fault.RECEIVER_TERM: _receiver_signalled(signal.SIGTERM),
    Fault.RECEIVER_HUP: _receiver_signalled(signal.SIGHUP),
}
assert set(_ACTIONS) == set(Fault)
