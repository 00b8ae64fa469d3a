"""Back to the state before: the source runs, and nothing of the migration is left in it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field

from migrator.errors import CommandFailed, VmError
from migrator.qemu.qmp import Qmp
from migrator.qemu.settings import Settings, put_back, read_settings

_log = logging.getLogger(__name__)
_SETTLED_S = 0.5
_CONTINUED_S = 0.1
_AGAIN_S = 0.05
# prelaunch: it was reset while the migration had stopped it
_STOPPED_BY_MIGRATION = ("finish-migrate", "postmigrate", "prelaunch")
UNDER_WAY = ("setup", "active", "wait-unplug", "pre-switchover", "device", "cancelling")
"""States of a migration of QEMU's own that has not ended."""


@dataclass(frozen=True)
class Before:
    """The source, as it was before the migration.

    :ivar was_running: whether the guest ran until the migration stopped it
    :ivar settings: capabilities and parameters that the migration changes
    :ivar paused_by_us: whether it may be paused because we executed ``stop``
    """

    was_running: bool
    settings: Settings = field(default_factory=Settings)
    paused_by_us: bool = False


async def remember(source: Qmp, was_running: bool) -> Before:
    """Read all that a migration is going to change."""
    return Before(was_running, await read_settings(source))


async def bring_back(source: Qmp, before: Before, *, timeout_s: float = 10.0) -> str:
    """Cancel QEMU's own migration, undo our settings, let the guest run if it ran.

    A guest that was stopped by another client, or by an I/O error, is left stopped: ``before`` says
    whether it was the migration that stopped it. Only to be called while the destination cannot
    run.

    :return: the source's run state
    :raise VmError: the source does not answer, or refuses to go on
    """
    started = time.monotonic()
    deadline = started + timeout_s
    while (status := (await source.migration()).get("status")) in UNDER_WAY:
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
    try:
        await put_back(source, before.settings)
    except CommandFailed as error:
        _log.warning("not as it was before: %s", error)
    state = await _settled(source)
    # a guest that is paused now was paused by another client, which may resume it, unless by us
    ours = (*_STOPPED_BY_MIGRATION, *(["paused"] if before.paused_by_us else []))
    # also one that runs: its images may be inactive, and cont activates them
    if before.was_running and state in (*ours, "running"):
        await _go_on(source, deadline)
        state = await source.run_state()
        if state != "running":
            raise VmError(source.name, f"does not go on: it is {state!r}")
    return state


async def _go_on(source: Qmp, deadline: float) -> None:
    """Let the guest run; try again while QEMU refuses, as its images may be locked for a moment."""
    while True:
        try:
            await source.execute("cont")
        except CommandFailed as error:
            if time.monotonic() > deadline:
                raise
            _log.info("not yet: %s", error)
            await asyncio.sleep(_AGAIN_S)
        else:
            return


async def _settled(source: Qmp) -> str:
    """The run state once QEMU's migration thread has set it: a little after it says it is done."""
    deadline = time.monotonic() + _SETTLED_S
    while (state := await source.run_state()) == "finish-migrate" and time.monotonic() < deadline:
        await asyncio.sleep(0.002)
    return state
