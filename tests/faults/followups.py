"""After the look: the operator resolves an undecided migration, and migrates the VM again."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from migrator import Limits, MigratorError, Options, migrate
from tests.faults.commands import WITNESS, Command, processes_of
from tests.faults.monitors import CommandRefused, MonitorLost
from tests.faults.scenes import Scene, Side

_RESOLVE_S = 60.0
_FOLLOW_UP_S = 120.0
_HOLDS = ("paused", "prelaunch")


async def resolved(scene: Scene, *, ended: bool) -> str:
    """Let one side run where neither does, as the operator would with ``migrator resolve``.

    :param ended: whether the command did end; one that did not is killed first
    :return: the fault in that; empty if there was none, or if it was not needed
    """
    if not ended:
        await scene.command.close()
        del scene.command
    source = await scene.source.monitor.run_state()
    destination = await scene.destination.monitor.run_state()
    if "running" in (source, destination) or scene.plan.paused:
        return ""
    if source in _HOLDS or destination in _HOLDS or scene.destination.intervals():
        return ""  # it was paused by a fault, or ran at the destination, and ended
    receiver = scene.receiver
    said = "gone"
    if receiver is not None and (receiver.exit_code is None or _has_witness(scene)):
        problem, said = await _asked(scene, source, destination)
        if problem:
            return problem
    if said == "ready":
        side = "destination" if source == "gone" or scene.plan.seed % 2 else "source"
        return await _decided(scene, side, *scene.link())
    if source == "gone":
        return ""
    if said == "never":
        return await _decided(scene, "source", *scene.link())
    scene.destination.kill()
    return await _decided(scene, "source", "--destination-is-gone")


def _has_witness(scene: Scene) -> bool:
    return any(WITNESS in line for line in processes_of(scene.token).values())


async def _resolve(scene: Scene, *options: str) -> tuple[int | None, dict[str, Any], str]:
    command: Command = scene.run("resolve", *options, "--json")
    try:
        await command.ended(_RESOLVE_S)
        lines = command.stdout.text.splitlines()
        return command.exit_code, json.loads(lines[-1]) if lines else {}, command.stderr.text
    finally:
        await command.close()


async def _asked(scene: Scene, source: str, destination: str) -> tuple[str, str]:
    """Ask both sides; nothing is changed.

    :return: the fault in the answer, and the state of the receiver
    """
    named = ["--source", scene.source.qmp] if source != "gone" else []
    code, said, text = await _resolve(scene, *named, *scene.link())
    if named and said.get("source") != source:
        return f"says that the source is {said.get('source')!r}, not {source!r}: {text}", ""
    state = str(said.get("destination"))
    if (state == "running") != (destination == "running"):
        return f"says {state!r} of a destination that is {destination!r}: {text}", ""
    if code == 0:
        return f"exit code 0, though neither side runs: {text}", ""
    return "", state


async def _decided(scene: Scene, side: str, *how: str) -> str:
    """Decide for a side.

    :return: the fault in that; empty if there was none
    """
    source = await scene.source.monitor.run_state()
    named = ["--source", scene.source.qmp] if source != "gone" else []
    code, _, text = await _resolve(scene, *named, "--decide", side, *how)
    states = {
        "source": await scene.source.monitor.run_state(),
        "destination": await scene.destination.monitor.run_state(),
    }
    running = [name for name, state in states.items() if state == "running"]
    if running != [side]:
        return f"--decide {side}: exit code {code}, {states}: {text}"
    if code != 0:
        return f"--decide {side}: exit code {code}, though the {side} runs: {text}"
    return ""


async def follow_up(scene: Scene, resets: int) -> tuple[str, str]:
    """Migrate the side that remains to a third QEMU, and check its RAM before and after.

    :param resets: how often the guest may have booted anew
    :return: the faults of the migration, and of the RAM
    """
    survivor = await _survivor(scene)
    if survivor is None:
        return "", ""
    other = scene.destination if survivor is scene.source else scene.source
    other.kill()
    if scene.receiver is not None:
        await scene.receiver.close()
    problem, walk = "", ""
    try:
        if await survivor.monitor.run_state() != "running":
            await survivor.monitor.execute("cont")
        if not await survivor.goes_on():
            return f"the {survivor.name} does not go on", ""
        walk = await _walk(scene, survivor, resets)
        ram = "destination" if survivor is scene.source else "source"
        third = await scene.start("third", ram, incoming=True)
        try:
            problem = await _migrated(survivor, third)
            if not problem and not walk:
                walk = await _walk(scene, third, resets)
        finally:
            third.kill()
            await third.monitor.close()
    except (CommandRefused, MonitorLost) as error:
        problem = f"{survivor.name}: {error}"
    return problem, walk


async def _survivor(scene: Scene) -> Side | None:
    """The side that holds the VM now; ``None`` if neither does."""
    source, destination = scene.source, scene.destination
    there, here = await destination.monitor.run_state(), await source.monitor.run_state()
    if there in ("running", "paused"):
        return destination
    if destination.intervals() or here in ("gone", "mute"):
        return None
    return source


async def _walk(scene: Scene, side: Side, resets: int) -> str:
    await side.monitor.execute("stop")
    problem = await asyncio.to_thread(scene.walk_problem, side, resets)
    await side.monitor.execute("cont")
    return f"{side.name}: {problem}" if problem else ""


async def _migrated(survivor: Side, third: Side) -> str:
    options = Options(limits=Limits(on_limit="force"), verify=True)
    try:
        report = await asyncio.wait_for(
            migrate(survivor.qmp, third.qmp, options), timeout=_FOLLOW_UP_S
        )
    except (MigratorError, asyncio.TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    if report.mismatched_pages:
        return f"{report.mismatched_pages} pages differ"
    if not await third.goes_on():
        return "the guest does not go on"
    return ""
