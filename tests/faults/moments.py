"""When a fault strikes: in a phase of the migration, which is held meanwhile, or a moment later."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

EARLY = ("preflight", "attach", "copy", "rounds")
"""Phases in which the guest runs at the source."""

LATE = (
    "switchover",
    "stop",
    "final-collect",
    "final-send",
    "device-state",
    "last-collect",
    "verify",
    "load",
    "resume",
    "finish",
)
"""From the switchover to the end: two thirds of all faults strike here."""

ROLLBACK = "rollback"

_ROLLBACK_SHARE = 0.06
_LATE_SHARE = 0.67
_HAND_OVER = ("device-state", "load")
_LONGEST_DELAY_S = {"preflight": 0.1, "attach": 0.05, "copy": 0.05, "rounds": 0.1}
_LATE_DELAY_S = 0.012


@dataclass(frozen=True)
class Moment:
    """When a fault strikes.

    :ivar phase: name of the phase, as in reports
    :ivar held: whether the command waits at the beginning of the phase until the fault has struck
    :ivar delay_s: how long after the beginning of the phase the fault strikes, if that is not held
    :ivar interrupt_at: phase at whose beginning the command is interrupted, so that it rolls back:
        with ``rollback`` only
    """

    phase: str
    held: bool
    delay_s: float = 0.0
    interrupt_at: str | None = None

    def __str__(self) -> str:
        how = "held" if self.held else f"+{self.delay_s * 1000:.1f} ms"
        after = f" after SIGINT at {self.interrupt_at}" if self.interrupt_at else ""
        return f"{self.phase} {how}{after}"


def draw(rng: Random, *, memory_only: bool, verified: bool) -> Moment:
    """Choose a moment.

    :param memory_only: of a rehearsal, which has fewer phases
    :param verified: whether there is a phase ``verify``
    """
    late = tuple(
        phase
        for phase in LATE
        if (verified or phase != "verify") and not (memory_only and phase in _HAND_OVER)
    )
    share = rng.random()
    held = rng.random() < 0.5
    if share < _ROLLBACK_SHARE:
        before_go = [phase for phase in late if phase not in ("resume", "finish")]
        return Moment(ROLLBACK, held, _delay_s(rng, ROLLBACK), rng.choice(before_go))
    phase = rng.choice(late if share < _ROLLBACK_SHARE + _LATE_SHARE else EARLY)
    return Moment(phase, held, _delay_s(rng, phase))


def _delay_s(rng: Random, phase: str) -> float:
    return rng.uniform(0.0, _LONGEST_DELAY_S.get(phase, _LATE_DELAY_S))
