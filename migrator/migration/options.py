"""What a caller may choose of a migration."""

from __future__ import annotations

from dataclasses import dataclass, field

from migrator.choices import DEFAULT_POLICY, DEFAULT_TRACKER, PolicyName
from migrator.policy.downtime import Fixed
from migrator.policy.judge import Limits


@dataclass(frozen=True)
class Options:
    """What a caller may choose.

    :ivar limits: when to switch over, when to give up
    :ivar policy: what is sent, and when it is time: see :func:`migrator.policy.policies.policy_of`
    :ivar fixed: what a switchover is taken to cost without pages
    :ivar verify: compare all of RAM before the destination runs; a difference is a failure
    :ivar tracker: source of CPU writes: ``uffd``, ``uffd-sync``, or ``auto``
    :ivar throttle_percent: of their time, how much writers may be made to wait where the migration
        would not converge otherwise: 1 to 99; with 0 they never are
    :ivar memory_only: rehearse: do everything but the hand-over, verify, and let the source go on
    :ivar dirty_map: have in the report where memory was dirty
    :ivar standstill_s: the most seconds for which the guest may stand, after which it goes on at
        the source; ``None``: see :func:`migrator.migration.budget.standstill_s`
    """

    limits: Limits = field(default_factory=Limits)
    verify: bool = False
    memory_only: bool = False
    tracker: str = DEFAULT_TRACKER
    policy: PolicyName = DEFAULT_POLICY
    fixed: Fixed = field(default_factory=Fixed)
    throttle_percent: int = 0
    dirty_map: bool = False
    standstill_s: float | None = None
