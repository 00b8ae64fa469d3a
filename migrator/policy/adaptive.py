"""When to switch over, from what a migration measures of its guest and its link. Pure.

What is left when the guest stops falls from round to round, as rounds become shorter, until it is
what the guest writes all the time. Switching over before it has fallen that far makes the downtime
longer, and waiting after it makes the migration longer, for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from migrator.policy.downtime import Fixed
from migrator.policy.judge import (
    Decision,
    Hot,
    Limits,
    Observation,
    Verdict,
    expected,
    given_up,
    limit_reached,
)

_GAIN_MS = 2.0  # less is not worth a round
_GAIN = 0.1  # of the expected downtime, likewise
_FLAT = 0.9  # of the round before: it falls no more
_SURE = 0.95  # of what was written is written again at once
_NEARLY = 2 / 3  # as long a time
_OVERDUE = 1.5  # times written, until the guest stops, at the rate at which it is written again
_PATIENCE_ROUNDS = 10
_PATIENCE_S = 2.0
_LITTLE = 0.25  # of what waits
_SEND_AGAIN = 4  # rounds


@dataclass(frozen=True)
class Adaptive:
    """Switch over where what is left falls no more; see :class:`migrator.policy.judge.Judge`."""

    limits: Limits
    fixed: Fixed = field(default_factory=Fixed)

    def decide(self, seen: Observation, before: Sequence[Observation] = ()) -> Decision:
        """See :meth:`migrator.policy.judge.Judge.decide`."""
        hot = self._at_last(seen)
        terms = expected(self.fixed, seen, left_bytes(seen, hot))
        expected_ms = sum(terms.values())
        over = limit_reached(self.limits, seen)
        if expected_ms <= self.limits.downtime_ms:
            said = f"expected downtime {expected_ms:.0f} ms fits {self.limits.downtime_ms:g} ms"
            may_fall_ms = None if over else self._may_fall_to_ms(seen, before, expected_ms)
            if may_fall_ms is None:
                return Decision(Verdict.SWITCH_OVER, expected_ms, said, hot, terms)
            said += f", and may fall to {may_fall_ms:.0f} ms"
            return Decision(Verdict.CONTINUE, expected_ms, said, Hot.WAIT, terms)
        if over:
            return given_up(self.limits, seen, f"after {over}", terms, hot)
        if stalled(seen, before):
            when = f"in {_PATIENCE_ROUNDS} rounds nothing was gained, and"
            return given_up(self.limits, seen, when, terms, hot)
        said = f"expected downtime {expected_ms:.0f} ms"
        return Decision(Verdict.CONTINUE, expected_ms, said, self._meanwhile(seen), terms)

    def _meanwhile(self, seen: Observation) -> Hot:
        """What becomes of hot pages in a round after which another follows."""
        if seen.rest_bytes < _LITTLE * seen.waiting_bytes and seen.round % _SEND_AGAIN == 1:
            # only a faster link could make it fit, and how fast it is, only sending tells
            return Hot.SEND
        return Hot.WAIT

    def _may_fall_to_ms(
        self, seen: Observation, before: Sequence[Observation], expected_ms: float
    ) -> float | None:
        """The downtime to be expected after another round, if that is worth one."""
        least_ms = sum(expected(self.fixed, seen, self._least_bytes(seen)).values())
        falls = not before or final_bytes(seen) < _FLAT * final_bytes(before[-1])
        worth_it = expected_ms - least_ms > max(_GAIN_MS, _GAIN * expected_ms)
        return least_ms if falls and worth_it else None

    def _least_bytes(self, seen: Observation) -> float:
        """The least that may be left after another round, which is as long as sending this one."""
        if seen.window_s <= 0:
            return final_bytes(seen)
        round_s = seen.gap_s - self.fixed.prepare_ms / 1000 + seen.collect_ms / 1000
        rest = seen.rest_bytes * min(round_s / max(seen.interval_s, 1e-6), 1.0)
        next_s = self.fixed.prepare_ms / 1000 + rest / max(seen.bytes_per_s, 1.0)
        share = min(next_s / seen.window_s, 1.0)
        return seen.waiting_bytes + max(final_bytes(seen) - seen.waiting_bytes, 0.0) * share

    def _at_last(self, seen: Observation) -> Hot:
        """What becomes of what waits in the last round before the guest stops.

        If it is sure to be written again by then, it is not sent once more; otherwise it may well
        stay clean. But what does not fit is not done if the other does, or comes closer.
        """
        left_ms = {
            hot: sum(expected(self.fixed, seen, left_bytes(seen, hot)).values()) for hot in Hot
        }
        if max(left_ms.values()) > self.limits.downtime_ms:
            return min(Hot, key=lambda hot: left_ms[hot])
        share, times = _share(seen), seen.gap_s / max(seen.interval_s, 1e-6)
        sure = (share >= _SURE and times >= _NEARLY) or share * times >= _OVERDUE
        return Hot.WAIT if sure else Hot.SEND


def left_bytes(seen: Observation, hot: Hot) -> float:
    """What may be left when the guest stands: what waited, and what was written in as long a time.

    :param hot: what becomes of what waits
    """
    if hot is Hot.SEND and seen.waiting_bytes:
        return seen.later_bytes
    looks = max(seen.window_s / max(seen.interval_s, 1e-6), 1.0)
    again = 1 - math.pow(1 - _share(seen), looks)
    return seen.waiting_bytes + max(seen.window_bytes - again * seen.waiting_bytes, 0.0)


def _share(seen: Observation) -> float:
    """Of what was written, what is written again between two looks."""
    return min(seen.again_bytes / max(seen.asked_bytes, 1), 1.0)


def final_bytes(seen: Observation) -> float:
    """The least that may be left when the guest stands."""
    return min(left_bytes(seen, hot) for hot in Hot)


def stalled(seen: Observation, before: Sequence[Observation]) -> bool:
    """Whether for a long time no round has left less than an earlier one."""
    if len(before) < _PATIENCE_ROUNDS:
        return False
    recent, earlier = [*before[-_PATIENCE_ROUNDS + 1 :], seen], before[: -_PATIENCE_ROUNDS + 1]
    least = min(final_bytes(o) for o in earlier)
    return (
        seen.elapsed_s - earlier[-1].elapsed_s >= _PATIENCE_S
        and min(final_bytes(o) for o in recent) >= _SURE * least
    )
