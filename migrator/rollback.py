"""Back to where we came from: the source runs, and nothing of ours is left in it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from migrator.errors import CommandFailed, VmError
from migrator.qmp import Qmp

_SETTLED_S = 0.5
_CONTINUED_S = 0.1
_STOPPED_BY_MIGRATION = ("finish-migrate", "postmigrate")
_UNDER_WAY = ("setup", "active", "wait-unplug", "pre-switchover", "device", "cancelling")

# multifd: QEMU's own migration may have left it on, and refuses a single stream then
DESTINATION_CAPABILITIES = {"x-ignore-shared": True, "events": True, "multifd": False}
SOURCE_CAPABILITIES = {**DESTINATION_CAPABILITIES, "pause-before-switchover": True}
SOURCE_PARAMETERS = {"max-bandwidth": 1 << 40}  # its own stream never has to wait


@dataclass(frozen=True)
class Before:
    """What we change in the source, as it was before.

    :ivar was_running: whether the guest ran
    :ivar capabilities: migration capabilities by name
    :ivar parameters: migration parameters by name
    :ivar paused_by_us: whether it may be paused because we executed ``stop``
    """

    was_running: bool
    capabilities: Mapping[str, bool] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    paused_by_us: bool = False


async def remember(source: Qmp, was_running: bool) -> Before:
    """Read what :func:`prepare` is going to change."""
    capabilities = await source.capabilities()
    parameters = await source.execute("query-migrate-parameters")
    return Before(
        was_running,
        {name: capabilities[name] for name in SOURCE_CAPABILITIES if name in capabilities},
        {name: parameters[name] for name in SOURCE_PARAMETERS if name in parameters},
    )


async def bring_back(source: Qmp, before: Before, *, timeout_s: float = 10.0) -> str:
    """Cancel QEMU's own migration, undo our settings, let the guest run if it ran.

    Only to be called while the destination cannot run.

    :return: the source's run state
    :raise VmError: the source does not answer, or refuses to go on
    """
    started = time.monotonic()
    deadline = started + timeout_s
    while (status := (await source.migration()).get("status")) in _UNDER_WAY:
        # One that saves the device state ends by itself, now that nobody reads it. If cancelled, it
        # may inactivate the images and start the guest all the same, whose next write, or next
        # migration, is a failed assertion (QEMU 7.2: migration_completion activates them where it
        # fails, but not where it was cancelled). That migrate-continue was executed a moment ago
        # does not show at once.
        ends_by_itself = status == "device" or (
            status == "pre-switchover" and time.monotonic() < started + _CONTINUED_S
        )
        if status != "cancelling" and not ends_by_itself:
            with contextlib.suppress(CommandFailed):
                await source.execute("migrate_cancel")
        if time.monotonic() > deadline:
            raise VmError(source.name, f"its own migration stays {status!r}")
        await asyncio.sleep(0.002)
    with contextlib.suppress(CommandFailed):
        await source.set_capabilities(before.capabilities)
        await source.execute("migrate-set-parameters", **before.parameters)
    state = await _settled(source)
    # a guest that is paused now was paused by somebody else, who may resume it, unless by us
    ours = (*_STOPPED_BY_MIGRATION, *(["paused"] if before.paused_by_us else []))
    # also one that runs: its images may be inactive, and cont activates them
    if before.was_running and state in (*ours, "running"):
        await source.execute("cont")
        state = await source.run_state()
        if state != "running":
            raise VmError(source.name, f"does not go on: it is {state!r}")
    return state


async def _settled(source: Qmp) -> str:
    """The run state once QEMU's migration thread has set it: a little after it says it is done."""
    deadline = time.monotonic() + _SETTLED_S
    while (state := await source.run_state()) == "finish-migrate" and time.monotonic() < deadline:
        await asyncio.sleep(0.002)
    return state
