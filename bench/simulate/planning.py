"""What migrations of a recorded guest would be: every policy, over every link."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.parts import Bad, Table
from bench.simulate.costs import Costs
from bench.simulate.replay import Replay
from bench.simulate.run import NEVER_SLOWED, Outcome, migrate
from migrator.choices import PolicyName
from migrator.policy.downtime import Fixed
from migrator.policy.judge import Limits
from migrator.policy.policies import policy_of
from migrator.policy.throttling import Throttling
from tracker.warm import warm_up

POLICIES: tuple[PolicyName, ...] = ("send-all", "defer-hot", "skip-unchanged", "adaptive")


@dataclass(frozen=True)
class Planned:
    """One migration.

    :ivar rounds: of sending what is dirty, after the copy of everything, while the guest runs
    :ivar sent_bytes: content of pages, in all
    :ivar total_ms: until the VM runs at the destination, or until it is given up
    :ivar downtime_ms: of it, how long it stands still; what it would be, if it is given up
    """

    policy: PolicyName
    link_bytes_per_s: float
    converges: bool
    rounds: int
    sent_bytes: int
    total_ms: float
    downtime_ms: float
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Every member under its name."""
        return asdict(self)


def plan(
    guest: Replay,
    links: Sequence[float],
    policies: Sequence[PolicyName],
    limits: Limits,
    costs: Costs,
    throttling: Throttling = NEVER_SLOWED,
) -> Iterator[Planned]:
    """Try all of them, one after the other.

    :param links: bytes a second of pages' content
    :param throttling: how much writers may be slowed
    """
    warm_up()
    for bytes_per_s in links:
        for policy in policies:
            deciding = policy_of(policy, limits, Fixed())
            outcome = migrate(guest, deciding, bytes_per_s, costs, throttling)
            yield _planned(policy, bytes_per_s, outcome)


def _planned(policy: PolicyName, bytes_per_s: float, outcome: Outcome) -> Planned:
    report = outcome.report
    downtime_ms = report.downtime_ms
    if downtime_ms is None:
        downtime_ms = report.predicted_downtime_ms or 0.0
    decided = [r for r in report.rounds if r.decision]
    return Planned(
        policy,
        bytes_per_s,
        outcome.converges,
        len(decided),
        report.bytes_sent,
        report.total_ms,
        downtime_ms,
        report.reason or (decided[-1].decision if decided else ""),
    )


def table(plans: Sequence[Planned]) -> Table:
    """A table, a line a migration."""
    rows = [
        [
            link(p),
            p.policy,
            "yes" if p.converges else Bad("no"),
            f"{p.rounds}",
            _bytes(p.sent_bytes),
            f"{p.total_ms / 1000:,.2f} s",
            f"{p.downtime_ms:,.0f} ms" if p.converges else f"({p.downtime_ms:,.0f} ms)",
        ]
        for p in plans
    ]
    heads = ["link", "policy", "converges", "rounds", "sent", "total", "downtime"]
    return Table("", heads, rows, left=3)


def link(p: Planned) -> str:
    """What it goes over."""
    return f"{p.link_bytes_per_s * 8 / 1e9:,.3g} Gbit/s"


def _bytes(n: float) -> str:
    for unit in ("MiB", "GiB"):
        n /= 1024 if unit == "GiB" else 1 << 20
        if n < 10_000:
            break
    return f"{n:,.1f} {unit}"
