"""What to send now, whether to switch over, when to give up. Pure: no clock, no QEMU, no bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from migrator.choices import (
    DEFAULT_ON_LIMIT,
    DOWNTIME_LIMIT_MS,
    MAX_ROUNDS,
    MAX_SECONDS,
    OnLimit,
)
from migrator.policy.downtime import Fixed, Terms, predict


@dataclass(frozen=True)
class Limits:
    """How far a migration may go.

    :ivar downtime_ms: switch over once the expected downtime is not above this
    :ivar max_rounds: give up after so many rounds
    :ivar max_seconds: give up after so long
    :ivar on_limit: giving up means to ``abort``, or to ``force`` the switchover all the same
    """

    downtime_ms: float = DOWNTIME_LIMIT_MS
    max_rounds: int = MAX_ROUNDS
    max_seconds: float = MAX_SECONDS
    on_limit: OnLimit = DEFAULT_ON_LIMIT


@dataclass(frozen=True)
class Observation:
    """What is known when a round has been collected and not yet been sent.

    :ivar round: 1 for the first round after the copy of everything
    :ivar elapsed_s: since the migration began
    :ivar dirty_bytes: not at the destination: what this round sends, and what waits for the end
    :ivar bytes_per_s: the rate at which the last round was sent
    :ivar compare_bytes: to be compared once the guest has stopped
    :ivar compare_bytes_per_s: the rate at which that is done
    :ivar waiting_bytes: of ``dirty_bytes``, what waits for the end, as it is written all the time
    :ivar interval_s: since the collection before this one
    :ivar asked_bytes: written before that one, and protected since
    :ivar again_bytes: of these, written again
    :ivar collect_ms: what collecting took
    :ivar gap_s: seconds from now until the guest can be stopped: to send this round, and to prepare
        the switchover
    :ivar window_bytes: bytes that the guest wrote in the last ``window_s`` seconds, which is taken
        for what it writes during ``gap_s``
    :ivar window_s: ``gap_s``, or the last interval, if that was longer
    :ivar later_bytes: bytes that the guest may write until it is stopped, if the waiting pages are
        sent before that, too
    :ivar throttle_percent: of their time, how much writers had to wait since the last collection
    :ivar handed_over: whether pages count as dirty only because another tracker took them over
    """

    round: int
    elapsed_s: float
    dirty_bytes: int
    bytes_per_s: float
    compare_bytes: int = 0
    compare_bytes_per_s: float = 1.0
    waiting_bytes: int = 0
    interval_s: float = 0.0
    asked_bytes: int = 0
    again_bytes: int = 0
    collect_ms: float = 0.0
    gap_s: float = 0.0
    window_bytes: float = 0.0
    window_s: float = 0.0
    later_bytes: float = 0.0
    throttle_percent: int = 0
    handed_over: bool = False

    @property
    def rest_bytes(self) -> int:
        """What does not wait."""
        return self.dirty_bytes - self.waiting_bytes


class Verdict(Enum):
    """What to do after the round has been sent."""

    CONTINUE = "continue"
    SWITCH_OVER = "switch over"
    ABORT = "abort"


class Hot(Enum):
    """What becomes of pages that are written again and again."""

    WAIT = "wait"  # unprotected, but for a sample
    SEND = "send"  # they are protected and sent, as all others


@dataclass(frozen=True)
class Decision:
    """A verdict with its reason.

    :ivar terms: what the expected downtime is made of, if the guest were stopped now
    """

    verdict: Verdict
    expected_downtime_ms: float
    reason: str
    hot: Hot = Hot.WAIT
    terms: Terms = field(default_factory=dict, compare=False)


class Judge(Protocol):
    """Decides, round by round."""

    @property
    def limits(self) -> Limits:
        """Within which it decides."""

    @property
    def fixed(self) -> Fixed:
        """What it takes a switchover to cost without pages."""

    def decide(self, seen: Observation, before: Sequence[Observation] = ()) -> Decision:
        """Decide what follows the sending of this round.

        :param before: what was seen in the rounds before this one, the first first
        """


@dataclass(frozen=True)
class SendAll:
    """Switch over once what is dirty fits; what QEMU does too.

    The set that is left when the guest stops is taken to be as large as the one just collected.
    """

    limits: Limits
    fixed: Fixed = field(default_factory=Fixed)

    def decide(self, seen: Observation, before: Sequence[Observation] = ()) -> Decision:
        """See :meth:`Judge.decide`."""
        terms = expected(self.fixed, seen)
        expected_ms = sum(terms.values())
        if expected_ms <= self.limits.downtime_ms:
            said = f"expected downtime {expected_ms:.0f} ms fits {self.limits.downtime_ms:g} ms"
            return Decision(Verdict.SWITCH_OVER, expected_ms, said, terms=terms)
        if over := limit_reached(self.limits, seen):
            return given_up(self.limits, seen, f"after {over}", terms)
        return Decision(
            Verdict.CONTINUE, expected_ms, f"expected downtime {expected_ms:.0f} ms", terms=terms
        )


def expected(fixed: Fixed, seen: Observation, dirty_bytes: float | None = None) -> Terms:
    """The downtime if the guest were stopped now.

    :param dirty_bytes: what would have to be sent; as much as is dirty now, if not given
    """
    return predict(
        fixed,
        send_bytes=seen.dirty_bytes if dirty_bytes is None else dirty_bytes,
        bytes_per_s=seen.bytes_per_s,
        compare_bytes=seen.compare_bytes,
        compare_bytes_per_s=seen.compare_bytes_per_s,
        collect_ms=seen.collect_ms,
    )


def limit_reached(limits: Limits, seen: Observation) -> str:
    """Which limit of effort has been reached; empty if none has."""
    if seen.round >= limits.max_rounds:
        return f"{seen.round} rounds"
    if seen.elapsed_s >= limits.max_seconds:
        return f"{seen.elapsed_s:.0f} s"
    return ""


def given_up(
    limits: Limits, seen: Observation, when: str, terms: Terms, hot: Hot = Hot.WAIT
) -> Decision:
    """Abort, or force the switchover."""
    expected_ms = sum(terms.values())
    rates = ""
    if seen.interval_s > 0:
        rates = (
            f" (the guest writes {_mib(seen.dirty_bytes / seen.interval_s)}, "
            f"{_mib(seen.bytes_per_s)} are sent)"
        )
    if limits.on_limit == "force":
        said = f"{when}: forced with an expected downtime of {expected_ms:.0f} ms{rates}"
        return Decision(Verdict.SWITCH_OVER, expected_ms, said, hot, terms)
    return Decision(
        Verdict.ABORT,
        expected_ms,
        f"does not converge: {when} the expected downtime is {expected_ms:.0f} ms, the limit "
        f"{limits.downtime_ms:g} ms{rates}; allow more downtime, or force it",
        hot,
        terms,
    )


def _mib(bytes_per_s: float) -> str:
    return f"{bytes_per_s / (1 << 20):,.0f} MiB/s"
