"""``status`` and ``cancel``, asking processes that answer, end, are killed, or are none of ours."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from migrator.cli.main import main
from migrator.control import client as control_client
from migrator.errors import ControlError
from migrator.report.report import Report


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "qemu-migrator"


_MIGRATE = """
import asyncio, sys
from migrator.cli import main as cli
from migrator.migration import orchestrator
from migrator.errors import Aborted
from migrator.report.report import Progress
async def migrate(source, destination, options, watch):
    for number in range(100_000):
        watch(Progress("rounds", number, 10, 5, 7, 1e6, None, None, "so"))
        try:
            await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            await asyncio.sleep(0.3)
            raise Aborted("rounds", "interrupted")
orchestrator.migrate = migrate
cli.main()
"""


def start(name: str, runtime: Path) -> subprocess.Popen[bytes]:
    """A process that migrates nothing, but is asked like one that does."""
    process = subprocess.Popen(
        [
            *[sys.executable, "-c", _MIGRATE],
            *["migrate", "--source", f"/{name}", "--destination", "/there"],
        ],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (runtime / f"{process.pid}.sock").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_without_a_migration() -> None:
    for command in ("status", "cancel"):
        done = CliRunner().invoke(main, [command])
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr == "no migration runs\n"
    done = CliRunner().invoke(main, ["status", "--json"])
    assert (done.exit_code, json.loads(done.stdout)) == (1, {"migrations": []})
    for command in ("status", "cancel"):
        done = CliRunner().invoke(main, [command, "/nowhere"])
        assert done.exit_code == 1
        assert "no migration answers" in done.stderr or "No such file" in done.stderr


def test_two_migrations_at_once(runtime: Path) -> None:
    processes = [start(name, runtime) for name in ("one", "two")]
    one, two = processes
    try:
        done = CliRunner().invoke(main, ["status", "--json"])
        found = {m["pid"]: m for m in json.loads(done.stdout)["migrations"]}
        assert found.keys() == {one.pid, two.pid}
        assert found[two.pid]["what"] == "/two → /there"
        assert found[two.pid]["socket"] == str(runtime / f"{two.pid}.sock")
        for said in ("/one", "/two", str(one.pid), "rounds", "so"):
            assert said in done.stderr

        done = CliRunner().invoke(main, ["cancel"])
        assert done.exit_code == 2
        assert all(str(runtime / f"{p.pid}.sock") in done.stderr for p in processes)
        assert one.poll() is two.poll() is None

        watching = subprocess.Popen(
            [sys.executable, "-c", _MIGRATE, "status", "--watch", "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert watching.stdout is not None
        seen = [json.loads(watching.stdout.readline()) for _ in range(6)]
        done = CliRunner().invoke(main, ["cancel", str(runtime / f"{one.pid}.sock")])
        assert (done.exit_code, done.stderr) == (0, "aborted: interrupted\n")
        assert one.wait(60) == 1
        assert two.poll() is None

        done = CliRunner().invoke(main, ["cancel", "--json"])  # the only one by now
        assert json.loads(done.stdout) == {
            "socket": str(runtime / f"{two.pid}.sock"),
            "status": "aborted",
            "reason": "interrupted",
            "exit_code": 1,
        }
        assert two.wait(60) == 1
        seen += map(json.loads, watching.stdout)
        assert watching.wait(60) == 0
        for process in processes:
            heard = [a for a in seen if a["socket"] == str(runtime / f"{process.pid}.sock")]
            numbers = [a["round"] for a in heard[:-1]]
            assert numbers == sorted(numbers)
            assert heard[-1]["ended"]["status"] == "aborted"
        assert list(runtime.iterdir()) == []
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_process_that_is_killed_while_it_is_watched_and_cancelled(runtime: Path) -> None:
    process = start("one", runtime)
    path = runtime / f"{process.pid}.sock"
    heard = []
    for _, answer in control_client.watch([path]):
        heard.append(answer)
        process.kill()
    assert isinstance(heard[-1], ControlError)
    process.wait()
    assert path.exists()
    with pytest.raises(ControlError, match="Connection refused"):
        control_client.cancel(path)
    assert CliRunner().invoke(main, ["status"]).stderr == "no migration runs\n"
    assert not path.exists()


@pytest.mark.parametrize(
    "greeting", [b'{"QMP": {}}\n', b"220 ESMTP\n", b'{"error": "no"}\n', b"", b"\0" * (1 << 17)]
)
def test_a_socket_of_something_else(tmp_path: Path, greeting: bytes) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    async def body() -> None:
        path = tmp_path / "else"
        async with await asyncio.start_unix_server(greet, path):
            for ask in (control_client.status, control_client.cancel):
                with pytest.raises(ControlError):
                    await asyncio.to_thread(ask, path)

    asyncio.run(body())


def test_a_directory_that_cannot_be_made_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    async def migrate(*_: object, **__: object) -> Report:
        return Report(status="completed")

    monkeypatch.setattr("migrator.migration.orchestrator.migrate", migrate)
    arguments = ["migrate", "--source", "/a", "--destination", "/b"]
    assert "warning" not in CliRunner().invoke(main, arguments).stderr
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere/at/all")
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0
    assert "warning: neither status nor cancel will find this: /nowhere/at/all" in done.stderr


def test_a_directory_that_is_refused(runtime: Path) -> None:
    runtime.mkdir(mode=0o755)
    runtime.chmod(0o755)
    for command in ("status", "cancel"):
        done = CliRunner().invoke(main, [command, "--json"])
        assert done.exit_code == 1
        assert "mode 755" in json.loads(done.stdout)["reason"]
        assert "mode 755" in done.stderr
