"""The order of one disturbed migration: disturb it, wait, look, and migrate the VM once more."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.faults import followups
from tests.faults.commands import WITNESS, Command, processes_of
from tests.faults.kinds import KILLS_COMMAND, RESETS, Fault
from tests.faults.monitors import MonitorLost
from tests.faults.observations import Seen, SideSeen
from tests.faults.plans import Plan
from tests.faults.scenes import Grounds, Scene, Side, beats_problem, staged
from tests.faults.strikes import Strike, strike
from tests.live.sending import Received
from tests.live.vms import Pair

END_S = 120.0
"""In which a command has to end; more than the longest patience that it has with a QEMU."""

_SETTLE_S = 60.0  # the guard's patience is 30 s
_QUIET_S = 0.2
_UNDER_WAY = ("setup", "active", "pre-switchover", "device", "cancelling", "wait-unplug")
# it stays to tell the source that it never ran, or, while QEMU lives, that it runs
_LINGERS = ("it never ran; staying", "the source does not know that it runs; staying")
_ARRIVES = "a VM comes from"
_WITNESS_STAYS = "staying to tell the source so"  # of a receiver that was killed


async def run(plan: Plan, grounds: Grounds) -> Seen:
    """Migrate, disturbed as planned, and look.

    :raise AssertionError: the scene could not be set, which says nothing of the product
    """
    async with staged(plan, grounds) as scene:
        scene.begin()
        async with _disturbed(scene) as struck:
            ended = await scene.command.ended(END_S)
        await _settled(scene)
        return await _look(scene, struck[0] if struck else None, ended)


@asynccontextmanager
async def _disturbed(scene: Scene) -> AsyncIterator[list[Strike]]:
    """Strike at the planned moment while the block runs; end a lasting fault after it."""
    struck: list[Strike] = []
    task = asyncio.create_task(_strike_in_time(scene, struck))
    try:
        yield struck
        await task  # a lasting fault, such as a frozen QEMU, ends by itself
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _strike_in_time(scene: Scene, struck: list[Strike]) -> None:
    moment, command = scene.plan.moment, scene.command
    if scene.plan.fault is Fault.OUTPUT_FULL:
        struck.append(Strike("start", time.time()))
    if moment.interrupt_at is not None:
        if not await command.reaches(moment.interrupt_at):
            return
        command.interrupt()
        command.release()
    if not await command.reaches(moment.phase):
        return
    if not moment.held:
        await asyncio.sleep(moment.delay_s)
    if command.exit_code is not None:
        return
    try:
        done, rest = await strike(scene)
        struck[:] = [done]
    finally:
        command.release()
    await rest()


# -- the dust settles ------------------------------------------------------------------------------


async def _settled(scene: Scene) -> None:
    """Wait until nothing changes any more: processes, run states, migrations of QEMU's."""
    deadline = time.monotonic() + _SETTLE_S
    quiet_since, before = time.monotonic(), None
    while time.monotonic() < deadline:
        now = await _state_of_all(scene)
        changes = now != before or any(status in _UNDER_WAY for _, status in now[:2])
        # a process that ends cannot be found any more a moment before it closes its descriptors
        if _helpers(scene) or (changes and not _beyond_help(scene)):
            quiet_since = time.monotonic()
        before = now
        if time.monotonic() - quiet_since > _QUIET_S:
            return
        await asyncio.sleep(0.05)


def _beyond_help(scene: Scene) -> bool:
    """Whether no process is left to end QEMU's own migration."""
    return scene.plan.fault in (*KILLS_COMMAND, Fault.GUARD_KILL) and not _helpers(scene)


async def _state_of_all(scene: Scene) -> list[tuple[str, str]]:
    found = []
    for side in (scene.source, scene.destination):
        state, status = await side.monitor.run_state(), ""
        if state not in ("gone", "mute"):
            with contextlib.suppress(MonitorLost):
                status = (await side.monitor.execute("query-migrate")).get("status", "")
        found.append((state, status))
    return found


def _helpers(scene: Scene) -> dict[int, str]:
    """Processes of the product's that are not there for a reason."""
    left = processes_of(scene.token)
    left.pop(scene.destination.pid, None)
    receiver = scene.receiver
    if receiver is not None and _may_stay(receiver):
        for pid, line in list(left.items()):
            if pid == receiver.pid or WITNESS in line:
                del left[pid]
    return left


def _may_stay(receiver: Command) -> bool:
    said = receiver.stderr.text
    if receiver.exit_code is not None:
        return receiver.exit_code == -signal.SIGKILL and _WITNESS_STAYS in said
    return any(words in said for words in _LINGERS) or _ARRIVES not in said


# -- the look --------------------------------------------------------------------------------------


async def _look(scene: Scene, struck: Strike | None, ended: bool) -> Seen:
    plan, command = scene.plan, scene.command
    left = [f"process {pid}: {line}" for pid, line in _helpers(scene).items()]
    # before anything is mended: the command left it like this
    source, destination = await _side(scene.source), await _side(scene.destination)
    beats = _beats(scene, destination.ran)
    left += _files(scene, moved=destination.ran or destination.loaded)
    receiver_code = scene.receiver.exit_code if scene.receiver else None
    if scene.hosts is not None:
        await asyncio.to_thread(scene.hosts.mend)
    scene.make_room()
    timeline = _timeline(scene, struck)
    resolution = await followups.resolved(scene, ended=ended)
    resets = int(struck is not None and struck.accepted and plan.fault in RESETS)
    follow_up, walk = await followups.follow_up(scene, resets)
    return Seen(
        plan=plan,
        struck=struck,
        exit_code=command.exit_code if ended else None,
        source=source,
        destination=destination,
        said=_object(command.stdout.text),
        stdout_open=plan.fault not in (Fault.OUTPUT_CLOSED, Fault.OUTPUT_FULL),
        complaints=tuple(
            complaint
            for each in (command, scene.receiver)
            if each is not None
            for complaint in _tracebacks(each.stderr.text)
        ),
        looked_s=dict(command.phases).get("load"),
        decision_s=None if plan.memory_only else dict(command.phases).get("resume"),
        go_s=None if plan.memory_only else command.went_on_s.get("resume"),
        beats_problem=beats,
        walk_problem=walk,
        left=tuple(left),
        receiver_code=receiver_code,
        follow_up=follow_up,
        resolution=resolution,
        timeline=timeline,
    )


async def _side(side: Side) -> SideSeen:
    state = await side.monitor.run_state()
    if state in ("gone", "mute"):
        return SideSeen(state, side.intervals(), loaded=side.loaded)
    changed: tuple[str, ...] = ()
    with contextlib.suppress(MonitorLost):
        now = await side.monitor.settings()
        changed = tuple(
            f"{name} was {side.before.get(name)!r}, is {now.get(name)!r}"
            for name in sorted({*now, *side.before})
            if now.get(name) != side.before.get(name)
        )
    process = Received(side.console.parent, side.pid, side.console)
    traces = tuple(Pair.traces(process))
    return SideSeen(state, side.intervals(), side.loaded, changed, traces)


def _beats(scene: Scene, moved: bool) -> str:
    consoles = [scene.source.console.read_bytes()]
    if moved:
        consoles.append(scene.destination.console.read_bytes())
    return beats_problem(*consoles)


def _files(scene: Scene, *, moved: bool) -> list[str]:
    """Files, and a QEMU, that are left of the product's, unless it was killed before it could act.

    :param moved: whether the VM is at the destination, or was
    """
    found, fault = [], scene.plan.fault
    if fault not in KILLS_COMMAND:
        for name in ("runtime", "tmp"):
            paths = (scene.directory / name).rglob("*")
            found += [f"file {path}" for path in paths if path.is_file() or path.is_socket()]
    receiver = scene.receiver
    if receiver is None or receiver.exit_code is None or moved:
        return found
    if scene.destination.is_alive:
        found.append("the QEMU that the receiver started")
    return found + [f"file {path}" for path in (scene.directory / "receiver").iterdir()]


def _object(text: str) -> dict[str, Any] | None:
    lines = text.splitlines()
    with contextlib.suppress(ValueError):
        found = json.loads(lines[-1]) if lines else None
        return found if isinstance(found, dict) else None
    return None


def _tracebacks(text: str) -> list[str]:
    """The last line of each traceback in a text."""
    found, inside = [], False
    for line in text.splitlines():
        if line.startswith("Traceback ("):
            inside = True
        elif inside and line and not line.startswith((" ", "Traceback")):
            found.append(line[:200])
            inside = False
    return found


def _timeline(scene: Scene, struck: Strike | None) -> tuple[str, ...]:
    """Phases, events of both QEMUs and the strike, in order."""
    command = scene.command
    moments = [(at, f"phase {name}") for name, at in command.phases]
    moments += [(at, f"  {name} goes on") for name, at in command.went_on_s.items()]
    for side in (scene.source, scene.destination):
        for event in side.monitor.events:
            moments.append((event.at_s, f"{side.name}: {event.name} {event.data or ''}"))
        if side.monitor.lost_at_s is not None:
            moments.append((side.monitor.lost_at_s, f"{side.name}: hung up"))
    if struck is not None:
        answers = f" {struck.answers[:3]}" if struck.answers else ""
        moments.append((struck.at_s, f"*** {scene.plan.fault.value}{answers}"))
    began = command.began_s
    lines = [f"{at - began:8.4f} s {text}" for at, text in sorted(moments) if at > began - 1]
    lines.append(f"stdout: {command.stdout.text[-2000:].strip()[:300]}")
    lines += [f"stderr: {line}" for line in command.stderr.text.splitlines()[-12:]]
    if scene.receiver is not None:
        lines += [f"receiver: {line}" for line in scene.receiver.stderr.text.splitlines()[-12:]]
    return tuple(lines)
