"""The policies that can be asked for, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from migrator.choices import PolicyName
from migrator.policy.adaptive import Adaptive
from migrator.policy.downtime import Fixed
from migrator.policy.judge import Judge, Limits, SendAll


@dataclass(frozen=True)
class Policy:
    """What decides in one migration.

    :ivar judge: when to switch over, when to give up
    :ivar defers: whether what is written again and again waits for the end
    :ivar compares: whether what is at the destination already is looked for, and not sent: where
        ``bytes`` can be compared, or by ``digests`` too, which a guest might be able to fool (see
        :mod:`tracker.memory.pagehash`)
    """

    judge: Judge
    defers: bool
    compares: Literal["", "bytes", "digests"]


def policy_of(name: PolicyName, limits: Limits, fixed: Fixed) -> Policy:
    """The policy of this name."""
    send_all = SendAll(limits, fixed)
    return {
        "send-all": Policy(send_all, defers=False, compares=""),
        "defer-hot": Policy(send_all, defers=True, compares=""),
        "skip-unchanged": Policy(send_all, defers=False, compares="digests"),
        "adaptive": Policy(Adaptive(limits, fixed), defers=True, compares="bytes"),
    }[name]
