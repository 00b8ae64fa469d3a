"""SIGHUP, as of a terminal that is closed, ends the commands as SIGTERM does: nothing is left."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.live.test_output import MIGRATOR, PATIENCE_S, SMALL, migrate, with_pair
from tests.live.vms import Pair

pytestmark = pytest.mark.live


def _started(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    )


def test_receive(tmp_path: Path) -> None:
    async def body(vms: Pair) -> None:
        await vms.destination.stop()
        console = tmp_path / "console"
        console.touch()
        temporary = tmp_path / "tmp"
        temporary.mkdir()
        receiver = _started(
            [
                *[MIGRATOR, "receive", "--insecure", "--listen", "127.0.0.1:0", "--"],
                *SMALL.arguments(vms.image, console, destination=True),
            ],
            TMPDIR=str(temporary),
        )
        assert receiver.stderr is not None
        said = ""
        while (found := re.search(r"to be run by process (\d+)", said)) is None:
            line = await asyncio.to_thread(receiver.stderr.readline)
            assert line, said
            said += line
        assert list(temporary.iterdir())
        receiver.send_signal(signal.SIGHUP)
        assert await asyncio.to_thread(receiver.wait, PATIENCE_S) == 1
        receiver.stderr.close()
        assert not Path(f"/proc/{found[1]}").exists()
        assert list(temporary.iterdir()) == []

    with_pair(body)


def test_migrate() -> None:
    async def body(vms: Pair) -> None:
        command = migrate(vms, "--downtime-limit", "0.001", "--max-rounds", "1000000")
        command[command.index("force")] = "abort"
        command[command.index("--json")] = "--policy=send-all"
        process = _started(command)
        assert process.stderr is not None
        while "phase rounds" not in (line := await asyncio.to_thread(process.stderr.readline)):
            assert line
        process.send_signal(signal.SIGHUP)
        _, said = await asyncio.to_thread(process.communicate, timeout=PATIENCE_S)
        assert process.returncode == 1
        assert "interrupted" in said
        assert await vms.state(vms.source) == "running"
        assert vms.traces(vms.source) == []

    with_pair(body)
