"""How much the guest's writers are slowed where a migration would not converge. Pure.

A writer that waits for a part of its time writes less by that part, so that less is left when the
guest stops. Slowing begins when the rounds do not get smaller any more and what is left is still
above the limit. It goes up in steps: each is as large as the last measurement asks for, and small
enough that a wrong measurement does not halt the guest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from migrator.policy.adaptive import final_bytes
from migrator.policy.judge import Decision, Limits, Observation, limit_reached
from migrator.report.phases import Phase

AUTO = 99
"""Percent; a writer that waited always would never come to its next write."""

LONGEST_MS = 10.0
"""Of one wait: QEMU answers its monitor, and devices go on, in between."""

EASED_MS = 1.0
"""Likewise, once the guest is about to be stopped: a vCPU that waits does not stop."""

_FALLS = 0.8  # of the least before: then it is waited for what comes of it
_PATIENCE_S = 0.25
_STEP = (1 / 4, 1 / 2)  # of what writers have of their time, they keep at least and at most


@dataclass(frozen=True)
class Throttling:
    """Decides how much of their time writers are to wait.

    :ivar max_percent: no more than this, 1 to 99; with 0 they never do
    :raise ValueError: it is none of these
    """

    max_percent: int

    def __post_init__(self) -> None:
        if not 0 <= self.max_percent <= AUTO:
            raise ValueError(f"writers cannot wait for up to {self.max_percent} % of their time")

    def percent(
        self,
        limits: Limits,
        seen: Observation,
        before: Sequence[Observation],
        decision: Decision,
    ) -> int:
        """What it is to be from now on; never less than it was.

        :param before: what was seen in earlier rounds, the first first
        :param decision: what would be done without slowing anybody more
        """
        now = seen.throttle_percent
        fits = decision.expected_downtime_ms <= limits.downtime_ms
        if now >= self.max_percent or fits or seen.handed_over or limit_reached(limits, seen):
            return now
        earlier = [o for o in before if not o.handed_over]
        if not earlier or slowed_for_s(seen, before) < _PATIENCE_S:
            return now
        if final_bytes(seen) < _FALLS * min(final_bytes(o) for o in earlier):
            return now
        least, most = _STEP
        kept = (1 - now / 100) * min(max(_fitting_share(limits, decision), least), most)
        return min(max(round(100 - 100 * kept), now + 1), self.max_percent)


def slowed_alike(seen: Observation, before: Sequence[Observation]) -> list[Observation]:
    """The rounds just before this one in which writers were slowed as they are now."""
    alike = takewhile(lambda o: o.throttle_percent == seen.throttle_percent, reversed(before))
    return list(alike)[::-1]


def slowed_for_s(seen: Observation, before: Sequence[Observation]) -> float:
    """For how long writers have been slowed as they are now."""
    others = len(before) - len(slowed_alike(seen, before))
    since = before[others - 1] if others else before[0] if before else seen
    return seen.elapsed_s - since.elapsed_s


def _fitting_share(limits: Limits, decision: Decision) -> float:
    """Of what is expected to be sent while the guest stands, how much would fit."""
    send_ms = decision.terms.get(Phase.FINAL_SEND.value, 0.0)
    others_ms = decision.expected_downtime_ms - send_ms
    return max(limits.downtime_ms - others_ms, 0.0) / max(send_ms, 1e-6)
