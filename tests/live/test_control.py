"""A real migration that does not converge, watched and cancelled by other processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.live.vms import Pair, pair

pytestmark = pytest.mark.live

MIGRATOR = [str(Path(sys.executable).with_name("migrator"))]
FOR_EVER = ["--downtime-limit", "0.001", "--max-rounds", "100000", "--max-seconds", "3600"]


class Terminals:
    """Commands that share a runtime directory of their own."""

    def __init__(self, directory: Path) -> None:
        self.sockets = directory / "qemu-migrator"
        self._environment = {**os.environ, "XDG_RUNTIME_DIR": str(directory)}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*MIGRATOR, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self._environment,
        )

    def run(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        """The exit code, and the last JSON object."""
        process = self.start(*arguments, "--json")
        stdout, _ = process.communicate(timeout=120)
        return process.returncode, json.loads(stdout.splitlines()[-1])

    def wait_for(
        self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 120.0
    ) -> dict[str, Any]:
        """Ask again and again until the only migration is as wanted."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            _, said = self.run("status")
            if said["migrations"] and condition(said["migrations"][0]):
                (found,) = said["migrations"]
                assert isinstance(found, dict)
                return found
        raise AssertionError(f"it never was as wanted: {said}")


@pytest.fixture
def terminals(tmp_path: Path) -> Terminals:
    return Terminals(tmp_path)


def test_a_demo_that_is_watched_and_cancelled(terminals: Terminals) -> None:
    demo = terminals.start("demo", "--memory", "256M", *FOR_EVER, "--json")
    try:
        first = terminals.wait_for(lambda now: bool(now["expected_downtime_ms"]))  # since round 1
        assert (first["what"], first["pid"]) == ("demo", demo.pid)
        assert first["phase"] == "rounds"
        assert first["bytes_per_s"] > 0
        assert first["left_s"] is not None
        # its round may have been sent already, and the next not yet
        later = terminals.wait_for(lambda now: bool(now["round"] > first["round"] + 1))
        assert later["total_sent_pages"] > first["total_sent_pages"]

        code, ended = terminals.run("cancel")
        assert (code, ended["status"], ended["reason"]) == (0, "aborted", "interrupted")
        stdout, _ = demo.communicate(timeout=60)
    finally:
        demo.kill()
        demo.wait()
    assert demo.returncode == 1
    report = json.loads(stdout.splitlines()[-1])
    assert (report["status"], report["reason"]) == ("aborted", "interrupted")
    assert "rollback" in report["phases"]
    assert list(terminals.sockets.iterdir()) == []
    assert terminals.run("status") == (1, {"migrations": []})


async def _begun(vms: Pair, terminals: Terminals) -> subprocess.Popen[str]:
    migrating = terminals.start(
        *["migrate", "--source", vms.source.qmp, "--destination", vms.destination.qmp],
        *[*FOR_EVER, "--json"],
    )
    await asyncio.to_thread(terminals.wait_for, lambda now: now["phase"] == "rounds")
    return migrating


def test_the_source_of_a_cancelled_migration_runs_on(terminals: Terminals) -> None:
    async def body() -> None:
        async with pair() as vms:
            migrating = await _begun(vms, terminals)
            try:
                assert vms.traces(vms.source) != []
                watching = terminals.start("status", "--watch", "--json")
                assert watching.stdout is not None
                seen = [json.loads(watching.stdout.readline()) for _ in range(3)]
                # its report is longer than a pipe
                ending = asyncio.create_task(asyncio.to_thread(migrating.communicate, timeout=120))
                code, ended = await asyncio.to_thread(terminals.run, "cancel")
                assert (code, ended["reason"]) == (0, "interrupted")
                await ending
                assert migrating.returncode == 1
                seen += map(json.loads, watching.stdout)
                assert watching.wait(60) == 0
            finally:
                migrating.kill()
                migrating.wait()
            assert seen[0]["what"] == f"{vms.source.qmp} → {vms.destination.qmp}"
            assert seen[0]["round"] < seen[2]["round"]
            assert seen[-2]["phase"] == "rollback"
            assert seen[-1]["ended"]["status"] == "aborted"
            assert await vms.state(vms.source) == "running"
            assert vms.traces(vms.source) == []
            await vms.beats(vms.source, 3)

    asyncio.run(body())


def test_what_a_killed_migration_leaves_is_removed_by_who_looks(terminals: Terminals) -> None:
    async def body() -> None:
        async with pair() as vms:
            migrating = await _begun(vms, terminals)
            migrating.send_signal(signal.SIGKILL)
            migrating.communicate()
            (left,) = terminals.sockets.iterdir()
            assert left.name == f"{migrating.pid}.sock"
            asked = await asyncio.to_thread(terminals.run, "status")
            assert asked == (1, {"migrations": []})
            assert list(terminals.sockets.iterdir()) == []
            assert await vms.state(vms.source) == "running"

    asyncio.run(body())
