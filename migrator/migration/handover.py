"""What a switchover and its rehearsal have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from migrator.errors import VmError
from migrator.migration.budget import Budget
from migrator.qemu.qmp import Event, Qmp
from migrator.qemu.standing import ENDED_STATES


@dataclass
class HandedOver:
    """The result of a handover that succeeded.

    :ivar downtime_ms: by the time stamps of QEMU's events, comparison included; ``None`` if the
        guest did not run
    :ivar device_state_bytes: the whole stream; ``None`` if there was none
    :ivar warnings: sentences for people
    """

    downtime_ms: float | None
    device_state_bytes: int | None
    warnings: list[str] = field(default_factory=list)


class Handover(Protocol):
    """From the last round on: the guest is stopped, and goes on at the other side, or at this one.

    :ivar committed: whether the point of no return was passed
    :ivar was_running: whether the guest ran until it was stopped for this; ``None`` before that
    :ivar paused_by_us: whether it may be paused because we executed ``stop``
    """

    committed: bool
    was_running: bool | None
    paused_by_us: bool

    async def run(self, budget: Budget) -> HandedOver:
        """Do all of it.

        :param budget: the time for which the guest may stand
        :raise VmError: before the point of no return: roll back. After it: never
        :raise Undecided: after the point of no return, neither side is known to run
        """

    def hurry(self) -> None:
        """Past the point of no return: have the destination say now whether it runs."""

    async def close(self) -> None:
        """Let go of what is open. May be called again."""


async def stop_guest(source: Qmp) -> Event | None:
    """Stop the guest by command.

    :return: QEMU's event of it, or ``None`` if the guest did not run
    :raise VmError: QEMU does not answer
    """
    mark = source.mark()
    await source.execute("stop")
    await source.run_state()  # events that came before this answer are here
    return source.seen("STOP", since=mark)


async def check_goes_on(source: Qmp) -> str:
    """Check that the guest has not ended by itself.

    :return: its run state
    :raise VmError: it has
    """
    state = await source.run_state()
    if state in ENDED_STATES:
        raise VmError(source.name, f"its guest has ended: QEMU is in state {state!r}")
    return state
