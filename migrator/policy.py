"""What to send now, whether to switch over, when to give up. Pure: no clock, no QEMU, no bytes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

OnLimit = Literal["force", "abort"]


@dataclass(frozen=True)
class Limits:
    """How far a migration may go.

    :ivar downtime_ms: switch over once the expected downtime is not above this
    :ivar max_rounds: give up after so many rounds
    :ivar max_seconds: give up after so long
    :ivar on_limit: giving up means to ``abort``, or to ``force`` the switchover all the same
    """

    downtime_ms: float = 100.0
    max_rounds: int = 60
    max_seconds: float = 300.0
    on_limit: OnLimit = "abort"


@dataclass(frozen=True)
class Observation:
    """What is known when a round has been collected and not yet been sent.

    :ivar round: 1 for the first round after the copy of everything
    :ivar elapsed_s: since the migration began
    :ivar dirty_bytes: to be sent in this round
    :ivar bytes_per_s: the rate at which the last round was sent
    :ivar compare_bytes: to be compared once the guest has stopped
    :ivar compare_bytes_per_s: the rate at which that is done
    """

    round: int
    elapsed_s: float
    dirty_bytes: int
    bytes_per_s: float
    compare_bytes: int = 0
    compare_bytes_per_s: float = 1.0


class Verdict(Enum):
    """What to do after the round has been sent."""

    CONTINUE = "continue"
    SWITCH_OVER = "switch over"
    ABORT = "abort"


@dataclass(frozen=True)
class Decision:
    """A verdict with its reason.

    :ivar expected_downtime_ms: what the verdict rests on
    """

    verdict: Verdict
    expected_downtime_ms: float
    reason: str


@dataclass(frozen=True)
class SendAll:
    """Send all that is dirty, each round; what QEMU does too.

    The set that is left when the guest stops is taken to be as large as the one just collected.

    :ivar fixed_ms: the part of the downtime that does not depend on the pages: stopping, device
        state, resuming
    """

    limits: Limits
    fixed_ms: float = 15.0

    def decide(self, seen: Observation) -> Decision:
        """Decide what follows the sending of this round."""
        expected_ms = self.fixed_ms + seen.dirty_bytes / max(seen.bytes_per_s, 1.0) * 1000
        expected_ms += seen.compare_bytes / max(seen.compare_bytes_per_s, 1.0) * 1000
        if expected_ms <= self.limits.downtime_ms:
            return Decision(
                Verdict.SWITCH_OVER,
                expected_ms,
                f"expected downtime {expected_ms:.0f} ms fits {self.limits.downtime_ms:g} ms",
            )
        over = self._over(seen)
        if not over:
            return Decision(
                Verdict.CONTINUE, expected_ms, f"expected downtime {expected_ms:.0f} ms"
            )
        if self.limits.on_limit == "force":
            return Decision(
                Verdict.SWITCH_OVER,
                expected_ms,
                f"{over}: forced with an expected downtime of {expected_ms:.0f} ms",
            )
        return Decision(
            Verdict.ABORT,
            expected_ms,
            f"does not converge: after {over} the expected downtime is {expected_ms:.0f} ms, "
            f"the limit {self.limits.downtime_ms:g} ms; allow more downtime, or force it",
        )

    def _over(self, seen: Observation) -> str:
        if seen.round >= self.limits.max_rounds:
            return f"{seen.round} rounds"
        if seen.elapsed_s >= self.limits.max_seconds:
            return f"{seen.elapsed_s:.0f} s"
        return ""
