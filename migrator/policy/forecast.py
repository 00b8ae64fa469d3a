"""What moving a VM would take, from how much it writes. Pure: no clock, no QEMU, no bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

from migrator.policy.downtime import predict
from migrator.policy.judge import Observation, SendAll, Verdict


class Curve:
    """How many bytes are dirty after some time, pages that are written twice counting once.

    It is what was measured, with straight lines between. The more time, the fewer are new: so in a
    time shorter than any that was measured more may be dirty than the line says, and in one longer
    than all fewer.
    """

    def __init__(self, measured: Iterable[tuple[float, int]], ram_bytes: int) -> None:
        """Draw the curve.

        :param measured: seconds, and bytes that were written in that time
        :param ram_bytes: more cannot be dirty
        """
        self._ram_bytes = ram_bytes
        self._points = [(0.0, 0)]
        for seconds, dirty in sorted(measured):
            last_s, least = self._points[-1]
            if seconds > last_s:  # measured at different times: it may seem to have been less
                self._points.append((seconds, max(dirty, least)))

    def dirty_bytes(self, seconds: float) -> int:
        """Bytes that are dirty after this time."""
        if len(self._points) == 1:
            return 0
        after = next((i for i, (s, _) in enumerate(self._points) if s >= seconds), -1)
        after = max(after, 1) if after >= 0 else len(self._points) - 1
        (t0, d0), (t1, d1) = self._points[after - 1 : after + 1]
        return min(self._ram_bytes, round(d0 + (d1 - d0) * (seconds - t0) / (t1 - t0)))


@dataclass(frozen=True)
class Forecast:
    """What is to be expected of a migration.

    :ivar converges: whether it comes to an end without more downtime than allowed
    :ivar rounds: of sending what is dirty, after the copy of everything
    :ivar total_s: until the VM runs at the destination, or until it is given up
    :ivar downtime_ms: of it, how long the VM stands still; what it would be, if it is given up
    :ivar sent_bytes: in all
    :ivar reason: the policy's words
    """

    converges: bool
    rounds: int
    total_s: float
    downtime_ms: float
    sent_bytes: int
    reason: str


def forecast(curve: Curve, data_bytes: int, bytes_per_s: float, policy: SendAll) -> Forecast:
    """Go through a migration as the policy decides it, round by round.

    :param data_bytes: to be copied first
    :param bytes_per_s: what the way to the destination takes
    """
    spent_s = round_s = data_bytes / bytes_per_s
    sent = data_bytes
    for number in count(1):
        dirty = curve.dirty_bytes(round_s)
        decision = policy.decide(Observation(number, spent_s, dirty, bytes_per_s))
        if decision.verdict is Verdict.ABORT:
            ms = decision.expected_downtime_ms
            return Forecast(False, number, spent_s, ms, sent, decision.reason)
        round_s = dirty / bytes_per_s
        spent_s += round_s
        sent += dirty
        if decision.verdict is Verdict.SWITCH_OVER:
            break
    last = curve.dirty_bytes(round_s)
    terms = predict(policy.fixed, send_bytes=last, bytes_per_s=bytes_per_s)
    downtime_ms = sum(terms.values())
    return Forecast(
        True, number, spent_s + downtime_ms / 1000, downtime_ms, sent + last, decision.reason
    )
