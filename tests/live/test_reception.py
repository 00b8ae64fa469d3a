"""A VM that was told to run is not taken along by what breaks afterwards where it was received."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from migrator import migrate
from migrator.link.session import Link
from migrator.qemu.qmp import Qmp
from migrator.receiver.incoming import Incoming
from migrator.receiver.receive import receive
from tests.live.moving import VERIFIED
from tests.live.sending import MIGRATOR
from tests.live.vms import Machine, pair
from tests.processes import is_running

pytestmark = pytest.mark.live


def test_what_breaks_after_it_runs_leaves_it_running(monkeypatch: pytest.MonkeyPatch) -> None:
    close = Incoming.close

    def closing(incoming: Incoming) -> None:
        close(incoming)
        raise RuntimeError("broken")

    monkeypatch.setattr(Incoming, "close", closing)

    async def body() -> None:
        async with pair(Machine(), start=False) as vms:
            await vms.start_source()
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            said: list[str] = []
            command = vms.machine.arguments(vms.image, vms.destination.console, destination=True)
            receiving = asyncio.create_task(
                receive(("127.0.0.1", port), command, keys=None, peer=None, say=said.append)
            )
            while not any("waiting" in line for line in said):
                await asyncio.sleep(0.05)
                assert not receiving.done()
            pid = int(said[0].rsplit(" ", 1)[1])
            pids.append(pid)
            report = await migrate(vms.source.qmp, Link("127.0.0.1", port), VERIFIED)
            assert report.mismatched_pages == 0
            with pytest.raises(RuntimeError, match="broken"):
                await receiving
            assert is_running(pid)
            path = _socket_of(pid)
            qmp = await Qmp.connect("destination", path)
            assert await qmp.run_state() == "running"
            await qmp.close()
            shutil.rmtree(Path(path).parent)

    pids: list[int] = []
    try:
        asyncio.run(body())
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def test_a_signal_at_the_first_word_is_heeded() -> None:
    async def body() -> None:
        async with pair(Machine(), start=False) as vms:
            command = vms.machine.arguments(vms.image, vms.destination.console, destination=True)

            def say(line: str) -> None:
                if "waiting" in line:
                    os.kill(os.getpid(), signal.SIGTERM)

            received = await receive(("127.0.0.1", 0), command, keys=None, peer=None, say=say)
            assert (received.outcome.state, received.exit_code) == ("never", 1)
            assert not is_running(received.pid)

    asyncio.run(body())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_qemu_starts_takes_it_along(tmp_path: Path, number: int) -> None:
    slow = tmp_path / "qemu"
    slow.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 1000\n")
    slow.chmod(0o755)
    runs = tmp_path / "runs"
    runs.mkdir()
    process = subprocess.Popen(
        [
            *[MIGRATOR, "receive", "--listen", "127.0.0.1:0", "--insecure", "--json"],
            *["--", str(slow)],
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(runs)},
    )
    pid = tmp_path / "pid"
    try:
        while not (pid.exists() and pid.read_text()):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, json.loads(said)["status"]) == (1, "aborted")
    assert not is_running(int(pid.read_text()))
    assert not list(runs.iterdir())


def _socket_of(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return words[words.index("-qmp") + 1].removeprefix("unix:").partition(",")[0]
