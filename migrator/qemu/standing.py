"""Whether a VM stands: a VM that is handed over must not run, be reset, or end in between.

Other clients may be connected to a QEMU: an operator, a high-availability agent. ``cont`` is
accepted as soon as the source's own migration has completed, and a guest that ran on has written
pages that are in no collection.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from migrator.errors import NotStanding
from migrator.qemu.qmp import Event, Qmp

_DISTURBANCES = {
    "RESUME": "was resumed",
    "RESET": "was reset",
}
ENDED_STATES = ("shutdown", "guest-panicked", "internal-error")
"""Run states of a VM whose guest has ended, while its QEMU has not."""
_HALTS = ("pause", "poweroff", "shutdown", "exit-failure")  # QAPI: GuestPanickedAction and others


class Standing:
    """A VM from the moment on from which it has to stand.

    :ivar since: mark in its events; see :meth:`migrator.qemu.qmp.Qmp.mark`
    """

    def __init__(self, vm: Qmp, since: int) -> None:
        self._vm = vm
        self.since = since

    def disturbed(self) -> Event | None:
        """The first event after which the VM cannot be said to have stood."""
        seen = (self._vm.seen(name, self.since) for name in _DISTURBANCES)
        return min((event for event in seen if event), key=lambda e: e.at, default=None)

    def check_events(self) -> None:
        """Check that no event has arrived that tells of a disturbance.

        :raise NotStanding: one has
        """
        if event := self.disturbed():
            raise NotStanding(
                self._vm.name, f"{_DISTURBANCES[event.name]} by another client, or by itself"
            )

    async def check(self, states: Collection[str]) -> None:
        """Check that the VM has stood until now.

        :param states: run states in which it may have been left
        :raise NotStanding: it has not
        :raise VmError: QEMU does not answer
        """
        state = await self._vm.run_state()  # events that came before this answer are here
        self.check_events()
        if state not in states:
            raise NotStanding(self._vm.name, f"is {state!r}, and was left in another state")


def stopped_by_io_error(vm: Qmp, since: int) -> bool:
    """Whether QEMU stopped the guest, or means to, because of an I/O error (``werror=stop``).

    The event comes before STOP (QEMU: ``block/block-backend.c``, ``blk_error_action``). A guest
    that was resumed since is not stopped by it any more.
    """
    stopped = False
    for event in vm.events(since):
        if event.name == "BLOCK_IO_ERROR" and event.data.get("action") == "stop":
            stopped = True
        elif event.name == "RESUME":
            stopped = False
    return stopped


@dataclass(frozen=True)
class GuestEnd:
    """How a guest ended.

    :ivar reason: QEMU's own word for it, such as ``guest-shutdown``
    """

    reason: str

    def words(self) -> str:
        """For people."""
        return f"the VM ended by itself, or was ended by another client: {self.reason}"


def guest_end(vm: Qmp) -> GuestEnd | None:
    """How the guest ended, if events told that it did (QAPI: SHUTDOWN, GUEST_PANICKED)."""
    end: GuestEnd | None = None
    for event in vm.events():
        if event.name == "GUEST_PANICKED" and event.data.get("action") in _HALTS:
            return GuestEnd("guest-panicked")
        if event.name == "SHUTDOWN" and end is None:
            end = GuestEnd(str(event.data.get("reason", "unknown")))
    return end
