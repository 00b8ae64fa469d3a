"""The Linux guests that are measured: they work, and notice what becomes of them."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from bench.guests import linuxguest
from bench.guests.guests import LINUX_BYTES, Guest, GuestError
from migrator import migrate
from migrator.guest.workload import PAGE_SIZE
from tests.bench.running import Running, run
from tests.live.moving import VERIFIED
from tests.live.qemus import SYSTEM

live = pytest.mark.live


def guest(workload: str) -> Guest:
    (qemu,) = SYSTEM.require()
    return Guest(workload, LINUX_BYTES, qemu)


@live
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("workload", "work", "written"), [("linux-boot", 20, 100), ("linux-sqlite", 100, 400)]
)
def test_works_on_through_a_migration(workload: str, work: int, written: int) -> None:
    it_is = guest(workload)

    async def test(it: Running) -> None:
        await it.works(3)
        with it.tracked() as tracker:
            tracker.collect()
            await it.works(work)
            assert tracker.collect()["ram"].count() > written
        report = await migrate(it.vms[0].qmp, it.vms[1].qmp, VERIFIED)
        assert report.status == "completed"
        await it.beats(5, side=1)
        await it.works(work)
        ram = await it.stopped(1)
        it.pulse.check_beats()
        assert it_is.problem(ram, it.heard()) == ""

    run(it_is, test, destination=True)


@live
@pytest.mark.thorough
def test_a_database_that_loses_pages_complains() -> None:
    it_is = guest("linux-sqlite")

    async def test(it: Running) -> None:
        await it.works(3)
        assert it_is.problem(await it.stopped(), it.heard()) == ""
        ram = np.memmap(it.sides[0].ram, np.uint8, "r+").reshape(-1, PAGE_SIZE)
        leaves = (ram[:, :2] == (13, 0)).all(axis=1) & (ram[:, -80:] >= 48).all(axis=1)
        assert np.count_nonzero(leaves) > 1000
        ram[leaves] = 0
        await it.go_on()
        await it.until(lambda: bool(it_is.problem(it.ram(), it.heard())))

    run(it_is, test)


def sql(part: str) -> str:
    """A piece of what the guest feeds its database with, without what is for the shell."""
    said = subprocess.check_output(
        ["sh", linuxguest.INIT, part], env={"PATH": os.environ["PATH"], "ROWS": "500"}, text=True
    )
    return "".join(line for line in said.splitlines(True) if not line.startswith("."))


def test_the_books_balance_only_if_they_do() -> None:
    with closing(sqlite3.connect(":memory:")) as bank:
        bank.isolation_level = None
        bank.executescript(sql("database"))
        for _ in range(50):
            bank.executescript(sql("transaction"))
        assert bank.execute("SELECT count(*), max(id) FROM history").fetchone() == (50, 50)
        assert len(bank.execute("SELECT DISTINCT account FROM history").fetchall()) > 10
        assert bank.execute(sql("books")).fetchall() == []
        assert bank.execute(sql("integrity")).fetchall() == []
        bank.execute("UPDATE accounts SET balance = balance - 1 WHERE id = 7")
        assert bank.execute(sql("books")).fetchall() == [("guest: FAULT the books do not balance",)]


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (b"beat 0 work 1\r\nbeat 1 work 2\r\n", ""),
        (
            b"beat 0 work 1\r\nguest: FAULT it is gone\r\nbeat 1 work 1\r\n",
            "guest: FAULT it is gone",
        ),
        (b"[ 3.1] Kernel panic - not syncing\r\n", "[ 3.1] Kernel panic - not syncing"),
    ],
)
def test_what_a_linux_guest_complains_of(said: bytes, problem: str) -> None:
    assert linuxguest.problem(said) == problem


def test_a_linux_guest_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lists" / "partial").mkdir(parents=True)
    (tmp_path / "apt.conf").write_text(f'Dir::State::lists "{tmp_path / "lists"}";\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(GuestError, match=r"run apt-get update|Debian or Ubuntu"):
        Guest("linux-boot", LINUX_BYTES).prepare(tmp_path)
