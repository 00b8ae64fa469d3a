"""``--report``: the page of a real migration, and of one that was given up."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from migrator import Options, migrate
from migrator.report.report import Report
from tests.live.moving import VERIFIED
from tests.live.vms import MIB, Machine, pair
from tests.migrator.report.test_page import check, words

pytestmark = pytest.mark.live

MIGRATOR = [str(Path(sys.executable).with_name("migrator"))]


def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [*MIGRATOR, *arguments, "--json"], capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def says(text: str, milliseconds: float, before: str = "") -> bool:
    """Whether it says so, to a tenth, of a number that is rounded to thousandths here."""
    around = (milliseconds - 0.0005, milliseconds + 0.0005)
    return any(f"{before}{number:.1f} ms" in text for number in around)


def test_demo(tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    code, said, stderr = run(
        *["demo", "--memory", "256M", "--working-set", "16M", "--on-limit", "force"],
        *["--report", str(page)],
    )
    assert code == 0, stderr
    found = check(page.read_text())
    for number in (said["pages_sent"], said["final_pages"], said["verified_pages"]):
        assert f"{number:,}" in found.text
    assert says(found.text, said["downtime_ms"])
    timeline, terms, heat = (words(image) for _, image in found.images())
    assert says(timeline, said["downtime_ms"], "as it was: ")
    assert says(terms, said["phases"]["final-send"])
    assert "the guest stands" in heat


@pytest.mark.thorough
def test_a_migration_that_is_given_up(tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    code, said, stderr = run(
        *["demo", "--memory", "256M", "--working-set", "64M", "--downtime-limit", "1"],
        *["--max-rounds", "4", "--report", str(page)],
    )
    assert (code, said["status"]) == (1, "aborted"), stderr
    found = check(page.read_text())
    assert said["reason"] in found.text
    assert len(list(found.images())) == 2  # there was no downtime


def test_what_is_recorded_of_a_migration() -> None:
    async def body() -> Report:
        machine = Machine(memory=128 * MIB, nodes=2)
        async with pair(machine) as vms:
            options = Options(VERIFIED.limits, verify=True, dirty_map=True)
            report = await migrate(vms.source.qmp, vms.destination.qmp, options)
            await vms.check_heartbeat_unbroken()
            return report

    report = asyncio.run(body())
    assert report.mismatched_pages == 0
    drawn = report.dirty_map
    assert drawn is not None
    assert [(b.name, b.bytes) for b in drawn.blocks] == [("ram0", 64 * MIB), ("ram1", 64 * MIB)]
    rounds = report.rounds[1:]
    assert [row.first_round for row in drawn.rows] == [r.number for r in rounds]
    assert [sum(row.dirty_pages) for row in drawn.rows] == [r.dirty_pages for r in rounds]
    assert [row.guest_stood for row in drawn.rows] == [*[False] * (len(rounds) - 2), True, True]
    assert sum(drawn.rows[0].dirty_pages[: drawn.blocks[0].regions]) > 0
    # one after the other, within the migration; the last ones in the downtime
    times = [at for r in report.rounds for at in (r.began_s, r.ended_s)]
    assert times == sorted(times)
    assert times[-1] * 1000 <= report.total_ms
    for r in report.rounds:
        assert r.dirty_bytes == 4096 * r.dirty_pages
        assert r.waiting_bytes == 4096 * r.waiting_pages
        spent_ms = r.collect_ms + r.merge_ms + r.compare_ms + r.send_ms
        assert (r.ended_s - r.began_s) * 1000 >= spent_ms - 0.01
    before_ms = sum(report.phases[name] for name in ("preflight", "attach"))
    assert report.rounds[0].began_s * 1000 >= before_ms
