"""What a configuration makes happen around a migration, and what is left of it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator import migrate
from migrator import scenario as runner
from migrator.config import Config
from migrator.errors import ConfigError, MigratorError, QmpUnreachable, Undecided, VmError
from migrator.qemu.process import Vm
from migrator.report.report import Report
from migrator.scenario import cache_directory, run
from tests.processes import is_running


@pytest.fixture
def own_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where run directories are made; all of them have to be gone in the end."""
    own = Path(tempfile.mkdtemp(prefix="own", dir="/tmp"))  # sockets' paths are short
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    yield own
    left = list(own.iterdir())
    own.rmdir()
    assert left == []


def config(**keys: object) -> Config:
    said: dict[str, Any] = {"source": {"qmp": "/none"}, "destination": {"qmp": "/none-either"}}
    return Config.model_validate({**said, **keys})


def fails(wanted: Config, here: Path) -> tuple[MigratorError, list[str]]:
    """Run it; return the error, and what was said before."""
    said: list[str] = []
    with pytest.raises(MigratorError) as caught:
        asyncio.run(run(wanted, here=here, say=said.append))
    return caught.value, said


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_directory() == Path("/c/qemu-migrator")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/h")
    assert cache_directory() == Path("/h/.cache/qemu-migrator")


# -- prepare ------------------------------------------------------------------------------------


def test_preparing(tmp_path: Path, own_tmp: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In order, in the directory of the file, what is printed does not get among the JSON."""
    wanted = config(prepare=["echo one | tee -a log", "test -s log && echo two >> log"])
    error, said = fails(wanted, tmp_path)
    assert isinstance(error, QmpUnreachable)
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    out, err = capfd.readouterr()
    assert (out, err) == ("", "one\n")
    assert said == [f"preparing: {c}" for c in wanted.prepare] + ["starting", "migrating"]


def test_a_preparation_that_fails_is_the_last_thing(tmp_path: Path, own_tmp: Path) -> None:
    wanted = config(prepare=["true", "exit 3", "touch never"])
    error, said = fails(wanted, tmp_path)
    assert isinstance(error, ConfigError)
    assert str(error) == "prepare: 'exit 3' ended with 3"
    assert said[-1] == "preparing: exit 3"
    assert list(tmp_path.iterdir()) == []


async def written(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "command",
    [
        "echo $$ > pid; exec sleep 60",
        "sleep 60 & echo $! > pid; wait",
        # one that takes its time, one that outlives the shell, and one that does not listen
        "(trap 'sleep 0.3; exit' TERM; sh -c 'echo $PPID' >pid; while :; do sleep 0.1; done)& wait",
        "(trap '' TERM; sh -c 'echo $PPID' >pid; while :; do sleep 0.1; done)& wait",
    ],
)
def test_a_preparation_that_is_cancelled(tmp_path: Path, own_tmp: Path, command: str) -> None:
    pid_file = tmp_path / "pid"

    async def body() -> None:
        task = asyncio.ensure_future(run(config(prepare=[command]), here=tmp_path))
        await written(pid_file)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(body())
    pid = int(pid_file.read_text())
    try:
        assert not is_running(pid)
    finally:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


# -- starting -----------------------------------------------------------------------------------


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "qemu"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_what_was_started_ends_when_the_next_cannot_be(
    tmp_path: Path, own_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'echo $$ > pid; s=${1#x:}; touch "$s"; exec sleep 60'
    source = [script(tmp_path, text), "x:{run}/source.qmp"]
    monkeypatch.chdir(tmp_path)
    wanted = config(source={"command": source}, destination={"command": "/no/such/qemu"})
    error, _ = fails(wanted, tmp_path)
    assert isinstance(error, VmError)
    assert error.vm == "destination"
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_a_source_that_is_to_be_kept_but_cannot_start(tmp_path: Path, own_tmp: Path) -> None:
    """Nothing to keep then."""
    command = [script(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60")]
    wanted = config(source={"command": command, "keep": True})

    async def body() -> None:
        task = asyncio.ensure_future(run(wanted, here=tmp_path))
        await written(tmp_path / "pid")
        task.cancel()  # it waits for the socket, which never comes
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(body())
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_a_source_that_is_to_be_kept_is_kept_when_the_migration_fails(tmp_path: Path) -> None:
    """It is the VM's only side then. In a process of its own, as its end is what matters."""
    directory = Path(tempfile.mkdtemp(prefix="own", dir="/tmp"))
    text = f'echo $$ > {tmp_path}/pid; s=${{1#x:}}; touch "$s"; exec sleep 60'
    (tmp_path / "config.yaml").write_text(
        f"source: {{command: '{script(tmp_path, text)} x:{{run}}/source.qmp', keep: true}}\n"
        "destination: {command: /no/such/qemu}\n"
    )
    program = "from migrator.cli.main import main; main()"
    command = [sys.executable, "-c", program, "run", str(tmp_path / "config.yaml")]
    done = subprocess.run(
        command, env={**os.environ, "TMPDIR": str(directory)}, capture_output=True, check=False
    )
    assert done.returncode == 1
    pid = int((tmp_path / "pid").read_text())
    try:
        assert is_running(pid)
        assert list(directory.glob("*/source.qmp"))  # and can be reached
    finally:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory)


def test_placeholders(tmp_path: Path, own_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    command = [script(tmp_path, f'printf "%s\\n" "$@" > {tmp_path}/said; exit 1')]
    command += ["{here}", "{cache}", "{accel}", "{run}", "{console}", "{guest}", "{other}"]
    wanted = config(
        accel="tcg", guest={"working_set": "1M"}, source={"command": command, "keep": False}
    )
    fails(wanted, Path("/here"))
    said = (tmp_path / "said").read_text().splitlines()
    directory = said[3]
    assert Path(directory).parent == own_tmp
    assert said[:7] == [
        *["/here", "/c/qemu-migrator", "tcg", directory],
        *[f"{directory}/source.console", f"{directory}/guest.img", "{other}"],
    ]


@pytest.mark.parametrize("accel", ["auto", "kvm"])
def test_no_such_qemu_to_probe_an_accelerator_with(
    tmp_path: Path, own_tmp: Path, accel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrator.qemu.accel.KVM_DEVICE", "/dev/null")  # any that can be opened
    wanted = config(accel=accel, source={"command": ["/no/such/qemu", "-accel", "{accel}"]})
    fails(wanted, tmp_path)


def test_a_working_set_that_cannot_be(tmp_path: Path, own_tmp: Path) -> None:
    wanted = config(guest={"working_set": 5}, source={"command": "qemu {guest}"})
    error, _ = fails(wanted, tmp_path)
    assert isinstance(error, ConfigError)
    assert error.key == "guest"


def test_sockets_that_nobody_listens_at(tmp_path: Path, own_tmp: Path) -> None:
    error, _ = fails(config(), tmp_path)
    assert isinstance(error, QmpUnreachable)
    assert (error.vm, error.exit_code) == ("source", 6)
    assert "/none: No such file" in str(error)


def test_both_sides_the_same_socket(tmp_path: Path, own_tmp: Path) -> None:
    (tmp_path / "link").symlink_to("/none")
    error, _ = fails(config(destination={"qmp": str(tmp_path / "link")}), tmp_path)
    assert isinstance(error, ConfigError)
    assert "the same" in str(error)


# -- what comes after a migration ---------------------------------------------------------------


def beats(*numbers: int) -> bytes:
    return b"".join(b"%08x\n" % number for number in numbers)


def heart(tmp_path: Path, source: bytes, destination: bytes) -> Any:
    """Look at the consoles of two VMs."""
    vms = Vm("source", tmp_path), Vm("destination", tmp_path)
    vms[0].console.write_bytes(source)
    vms[1].console.write_bytes(destination)
    return asyncio.run(runner._heartbeat_goes_on(*vms))


def test_a_heartbeat_that_goes_on(tmp_path: Path) -> None:
    assert heart(tmp_path, beats(*range(7)), beats(*range(7, 12))) == {
        "heartbeats_before": 7,
        "heartbeats_after": 5,
    }


def test_a_line_that_was_cut_by_the_switchover(tmp_path: Path) -> None:
    whole = beats(*range(20))
    for cut in range(9 * 7, 9 * 8):
        found = heart(tmp_path, whole[:cut], whole[cut:])
        assert found == {"heartbeats_before": 7, "heartbeats_after": 13}


@pytest.mark.parametrize(
    ("source", "destination", "said"),
    [
        (range(7), range(8, 20), "from 6 to 8"),  # one is lost
        (range(7), range(6, 20), "from 6 to 6"),  # one is repeated
        (range(7), range(20), "from 6 to 0"),  # it was reset
    ],
)
def test_a_heartbeat_that_does_not(
    tmp_path: Path, source: range, destination: range, said: str
) -> None:
    with pytest.raises(VmError, match=said) as caught:
        heart(tmp_path, beats(*source), beats(*destination))
    assert caught.value.vm == "destination"


def test_a_heart_that_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_GUEST_S", 0.1)
    with pytest.raises(VmError, match=r"no 12 heartbeats in 0\.1 s"):
        heart(tmp_path, beats(*range(7)), beats(7, 8))


def test_a_console_with_something_else(tmp_path: Path) -> None:
    with pytest.raises(VmError, match="not a heartbeat"):
        heart(tmp_path, beats(*range(7)), b"panic!\n")


def test_a_source_console_with_something_else(tmp_path: Path) -> None:
    with pytest.raises(VmError, match="not a heartbeat"):
        heart(tmp_path, beats(*range(7)) + b"panic!\n", beats(*range(7, 20)))


def test_a_guest_that_is_not_well_is_no_reason_to_run_the_source() -> None:
    report = Report(status="completed", downtime_ms=5.0)
    error = runner._not_well(VmError("destination", "its heart stopped"), report)
    assert isinstance(error, Undecided)
    assert error.exit_code == 4
    assert error.report is report
    assert report.status == "failed"
    assert "its heart stopped" in report.reason
    assert any("source will not run" in sentence for sentence in report.known)


@pytest.mark.parametrize("watch", [None, lambda _: None])
def test_a_migration_may_go_unwatched(tmp_path: Path, watch: Callable[[Any], None] | None) -> None:
    source, destination = str(tmp_path / "a"), str(tmp_path / "b")
    with pytest.raises(QmpUnreachable):
        asyncio.run(migrate(source, destination, watch=watch))
    with pytest.raises(QmpUnreachable):
        asyncio.run(run(config(), here=tmp_path, watch=watch))
