"""Many disturbed migrations, several at a time, and their results."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from bench.hosts.twohosts import missing, two_hosts
from migrator.link.keys import init
from tests.faults import oracles, trials
from tests.faults.plans import Plan
from tests.faults.scenes import Grounds

_WHOLE_TRIAL_S = 400.0  # to notice one that hangs
_ADDRESSES = ("192.0.2.1", "192.0.2.2")


@dataclass(frozen=True)
class Result:
    """One disturbed migration.

    :ivar outcome: exit code and the side that runs, as in ``0/D``
    :ivar phase: in which the fault struck; ``-`` if it did not
    :ivar violations: of the oracles
    :ivar broken: why the migration could not be tried at all; that is no violation, but no success
    """

    plan: Plan
    outcome: str
    phase: str
    violations: tuple[str, ...]
    took_s: float
    timeline: tuple[str, ...] = ()
    broken: str = ""

    def line(self) -> str:
        """One line for people."""
        verdict = "ok"
        if self.violations:
            verdict = f"{len(self.violations)} VIOLATION(S): {self.violations[0][:110]}"
        if self.broken:
            verdict = f"BROKEN: {self.broken[:150]}"
        where = f"{self.plan}; in {self.phase}"
        return f"{self.plan.seed:>10} {self.outcome:<8} {self.took_s:5.1f} s  {where}: {verdict}"


def seeds(base: int, count: int) -> list[int]:
    """The seeds of a campaign, all of which follow from one."""
    rng = Random(base)
    return [rng.getrandbits(32) for _ in range(count)]


async def try_one(plan: Plan, grounds: Grounds, without: Collection[str] = ()) -> Result:
    """Do one disturbed migration, and judge it."""
    began_s = time.monotonic()
    try:
        seen = await asyncio.wait_for(trials.run(plan, grounds), _WHOLE_TRIAL_S)
    except Exception as error:  # noqa: BLE001 (the campaign goes on, and tells of it)
        reason = f"{type(error).__name__}: {error}"
        return Result(plan, "broken", "-", (), time.monotonic() - began_s, broken=reason)
    phase = seen.struck.phase if seen.struck else "-"
    found = tuple(oracles.violations(seen, without))
    took_s = time.monotonic() - began_s
    return Result(plan, oracles.outcome(seen), phase, found, took_s, seen.timeline)


async def run(
    plans: Sequence[Plan],
    *,
    jobs: int,
    tell: Callable[[Result], None] = lambda _: None,
    without: Collection[str] = (),
) -> list[Result]:
    """Do them all.

    :param jobs: how many at a time
    :param tell: called with each result
    :param without: names of oracles that are not asked
    """
    left: Iterator[Plan] = iter(plans)
    results: list[Result] = []

    async def work() -> None:
        with ExitStack() as stack:
            grounds = Grounds()
            for plan in left:
                if plan.two_hosts and grounds.hosts is None:
                    grounds = await asyncio.to_thread(stack.enter_context, _grounds())
                result = await try_one(plan, grounds, without)
                results.append(result)
                tell(result)
                if result.broken:  # the hosts, too, may be in any state
                    await asyncio.to_thread(stack.close)
                    grounds = Grounds()

    await asyncio.gather(*(work() for _ in range(jobs)))
    return results


@contextmanager
def _grounds() -> Iterator[Grounds]:
    with two_hosts() as hosts, tempfile.TemporaryDirectory(prefix="faults-keys-") as directory:
        keys = Path(directory) / "keys"
        init(keys, _ADDRESSES)
        yield Grounds(hosts, keys)


def hosts_share(wanted: float) -> float:
    """The part of all migrations that can be between two hosts here."""
    return 0.0 if missing() else wanted


def table(results: Iterable[Result]) -> str:
    """Faults by the phase in which they struck, and how that ended; one line each."""
    rows = sorted((r.plan.fault.value, r.phase, r.outcome, bool(r.violations)) for r in results)
    counted = Counter(rows)
    lines = [f"{'fault':<24} {'in phase':<14} {'outcome':<20} {'count':>5}  violations"]
    for fault, of_fault in itertools.groupby(counted, key=lambda row: row[0]):
        for _, phase, outcome, violated in of_fault:
            count = counted[fault, phase, outcome, violated]
            mark = f"  {count}" if violated else ""
            lines.append(f"{fault:<24} {phase:<14} {outcome:<20} {count:>5}{mark}")
    return "\n".join(lines)


def details(results: Iterable[Result], *, options: str = "", timelines: bool = False) -> str:
    """All violations, with the command that tries the migration again.

    :param options: of that command, that the plans depend on as they do on the seed
    :param timelines: also tell all that happened
    """
    lines: list[str] = []
    for result in results:
        if not result.violations and not result.broken:
            continue
        lines.append(f"{result.plan}; {result.outcome}")
        lines.append(f"    python -m tests.faults {options} --only {result.plan.seed}")
        lines += [f"    {violation}" for violation in result.violations]
        lines += [f"    not tried: {result.broken}"] * bool(result.broken)
        if timelines:
            lines += [f"      | {line}" for line in result.timeline]
    return "\n".join(lines)


def by_kind(results: Iterable[Result]) -> str:
    """How often each oracle was violated, and by which faults."""
    counted: Counter[str] = Counter()
    faults: dict[str, Counter[str]] = {}
    for result in results:
        for violation in {each.split(":")[0] for each in result.violations}:
            counted[violation] += 1
            faults.setdefault(violation, Counter())[result.plan.fault.value] += 1
    lines = []
    for name, count in counted.most_common():
        shown = ", ".join(f"{fault} {times}" for fault, times in faults[name].most_common())
        lines.append(f"{count:>5}  {name}: {shown}")
    return "\n".join(lines)
