"""The phases of a migration: their order, and the time each took."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum


class Phase(str, Enum):
    """One step of a migration; the values are the names in reports."""

    PREFLIGHT = "preflight"  # may this VM be migrated like this?
    ATTACH = "attach"  # write-protect the source's RAM
    DRAIN = "drain"  # the guest stands for a moment: I/O past the page cache comes to its end
    COPY = "copy"  # everything that holds data, once
    ROUNDS = "rounds"  # what was written meanwhile, again and again
    SWITCHOVER = "switchover"  # QEMU's own migration has been started
    STOP = "stop"  # downtime begins: the vCPUs stand, block I/O is drained
    FINAL_COLLECT = "final-collect"
    COMPARE = "compare"  # pages that may have been written without anybody's being told
    FINAL_SEND = "final-send"
    DEVICE_STATE = "device-state"  # QEMU saves it, and is read to the end
    LAST_COLLECT = "last-collect"  # what saving wrote, and sending it
    VERIFY = "verify"  # compare all of RAM; not downtime
    LOAD = "load"  # the destination loads all but the end of the stream
    RESUME = "resume"  # point of no return; downtime ends
    FINISH = "finish"
    ROLLBACK = "rollback"


DOWNTIME = (
    Phase.STOP,
    Phase.FINAL_COLLECT,
    Phase.COMPARE,
    Phase.FINAL_SEND,
    Phase.DEVICE_STATE,
    Phase.LAST_COLLECT,
    Phase.LOAD,
    Phase.RESUME,
)
"""The phases whose times add up to the downtime."""

_ORDER = list(Phase)


class IllegalMove(RuntimeError):
    """A phase was entered that cannot follow the present one: a defect of the caller."""


class Phases:
    """Where a migration is, and how long it has been in each phase.

    :ivar current: the present phase
    :param watch: called with each phase that is entered
    :param clock: seconds of a clock that never goes back
    """

    def __init__(
        self,
        watch: Callable[[Phase], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.current = Phase.PREFLIGHT
        self._watch = watch
        self._clock = clock
        self._since = self._started = clock()
        self._spent: dict[Phase, float] = {}

    def enter(self, phase: Phase, *, at: float | None = None) -> None:
        """Leave the present phase for a later one, or for the rollback.

        :param at: when that happened, in seconds of the monotonic clock; now if not given
        :raise IllegalMove: phases go forward only, and a rollback only to its end
        """
        if _ORDER.index(phase) <= _ORDER.index(self.current):
            raise IllegalMove(f"{self.current.value} → {phase.value}")
        if phase is Phase.ROLLBACK and self.current is Phase.FINISH:
            raise IllegalMove("the destination runs: nothing to roll back to")
        self._leave(self._clock() if at is None else at)
        self.current = phase
        self._watch(phase)

    def end(self) -> None:
        """Stop the clock of the last phase."""
        self._leave(self._clock())

    def _leave(self, at: float) -> None:
        at = max(at, self._since)
        self._spent[self.current] = self._spent.get(self.current, 0.0) + at - self._since
        self._since = at

    @property
    def elapsed_s(self) -> float:
        """Seconds since the migration began."""
        return self._clock() - self._started

    @property
    def total_ms(self) -> float:
        """Milliseconds from the beginning to the last change of phase."""
        return (self._since - self._started) * 1000

    def milliseconds(self) -> dict[str, float]:
        """Milliseconds by name of the phase, for the phases that were left."""
        return {phase.value: spent * 1000 for phase, spent in self._spent.items()}
