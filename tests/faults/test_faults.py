"""Some disturbed migrations, others in every run; and that their oracles see real breakage."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from dataclasses import replace

import pytest

from bench.hosts.twohosts import missing
from tests.conftest import require
from tests.faults import campaign, oracles, plans, trials
from tests.faults.kinds import Fault
from tests.faults.moments import Moment
from tests.faults.observations import Seen
from tests.faults.scenes import Grounds
from tests.profiles import examples

pytestmark = pytest.mark.live

_COUNT = int(os.environ.get("MIGRATOR_FAULTS_COUNT") or examples(60))
_BASE = int(os.environ.get("MIGRATOR_FAULTS_SEED") or time.time_ns() % (1 << 32))
_PARTS = 4
_JOBS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 3
_HOSTS_SHARE = 0.3


def _able() -> float:
    """Skip where there is no QEMU; give the part of the migrations that is between hosts."""
    require(None if shutil.which("qemu-system-x86_64") else "qemu-system-x86_64 is not installed")
    if os.environ.get("MIGRATOR_REQUIRE_LIVE") == "1":
        require(missing())
    return campaign.hosts_share(_HOSTS_SHARE)


@pytest.mark.parametrize("part", range(_PARTS))
def test_disturbed_migrations(part: int, capsys: pytest.CaptureFixture[str]) -> None:
    share = _able()
    seeds = campaign.seeds(_BASE, _COUNT)[part::_PARTS]
    with capsys.disabled():
        print(f"\nMIGRATOR_FAULTS_SEED={_BASE}, part {part}: {len(seeds)} disturbed migrations")
    made = [plans.draw(seed, hosts_share=share) for seed in seeds]
    results = asyncio.run(campaign.run(made, jobs=_JOBS))
    print(campaign.table(results))
    assert len(results) == len(seeds)
    if bad := [result for result in results if result.violations or result.broken]:
        told = campaign.details(bad, options=f"--hosts {share:g}", timelines=True)
        pytest.fail(f"{len(bad)} of {len(results)}:\n{told}", pytrace=False)


def _disturbed(fault: Fault, moment: Moment) -> Seen:
    """One migration on this host, disturbed like this."""
    _able()
    drawn = plans.draw(2, hosts_share=0.0, only=frozenset({fault}))
    plan = replace(drawn, fault=fault, moment=moment, paused=False, memory_only=False, verify=True)
    plan = replace(plan, options=("--on-limit", "force", "--verify"))
    seen = asyncio.run(trials.run(plan, Grounds()))
    assert seen.struck is not None
    assert seen.struck.phase == moment.phase
    return seen


def _names(seen: Seen) -> set[str]:
    return {violation.split(":")[0] for violation in oracles.violations(seen)}


def test_a_source_that_stays_paused_is_noticed() -> None:
    """No guard is left to let it run; with a guard that would be a violation."""
    seen = _disturbed(Fault.COMMAND_AND_GUARD_KILL, Moment("final-send", held=True))
    assert "one_runs" not in _names(seen)
    assert seen.exit_code is not None
    assert seen.exit_code < 0
    alone = replace(seen, plan=replace(seen.plan, fault=Fault.COMMAND_KILL))
    assert "one_runs" in _names(alone)


def test_a_source_that_is_resumed_beside_the_destination_is_noticed() -> None:
    """It is the operator that resumes it here; if it were not, that would be found."""
    seen = _disturbed(Fault.SOURCE_CONT, Moment("finish", held=True))
    assert "never_two" not in _names(seen)
    assert oracles.by_the_operator(seen)
    assert seen.destination.runs
    by_us = replace(seen, plan=replace(seen.plan, fault=Fault.NONE))
    assert "never_two" in _names(by_us)
