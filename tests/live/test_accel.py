"""Choosing an accelerator by running a guest.

KVM rarely runs guests where tests run, so most tests give a stand-in for QEMU: a shell script that
behaves as QEMU does where KVM works (it runs the guest, under TCG), or hangs, or crawls.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.errors import AccelUnavailable
from migrator.qemu import accel
from migrator.qemu.accel import AccelChoice, choose_accel
from tests.conftest import require

RUNS = """
for argument; do
    shift
    [ "$argument" = kvm ] && argument=tcg
    set -- "$@" "$argument"
done
exec qemu-system-x86_64 "$@"
"""
HANGS = "exec sleep 1000"
BEAT = 'printf "%08x\\n" $n; n=$((n + 1))'

StandIn = Callable[[str], str]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Make a QEMU of a shell script, on a host where the KVM device opens."""
    monkeypatch.setattr(accel, "KVM_DEVICE", os.devnull)
    script = tmp_path / "qemu"

    def make(body: str) -> str:
        script.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{body}\n")
        script.chmod(0o755)
        return str(script)

    return make


def assert_gone(directory: Path) -> None:
    """Check that the stand-in is not there any more, not even as a zombie."""
    with pytest.raises(ProcessLookupError):
        os.kill(int((directory / "pid").read_text()), 0)


def choose(qemu: str, monkeypatch: pytest.MonkeyPatch, probe_s: float = 60.0) -> AccelChoice:
    monkeypatch.setattr(accel, "PROBE_S", probe_s)
    return asyncio.run(choose_accel(qemu))


def test_tcg_is_taken_at_ones_word() -> None:
    assert asyncio.run(choose_accel("/no/such/qemu", "tcg")).name == "tcg"


def test_without_the_device_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "kvm"
    monkeypatch.setattr(accel, "KVM_DEVICE", str(device))
    choice = asyncio.run(choose_accel("/no/such/qemu"))
    assert choice == AccelChoice("tcg", f"{device} cannot be opened: No such file or directory")
    with pytest.raises(AccelUnavailable) as caught:
        asyncio.run(choose_accel("/no/such/qemu", "kvm"))
    assert caught.value.accel == "kvm"
    assert caught.value.reason == choice.reason


def test_no_qemu_is_not_taken_for_no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "KVM_DEVICE", os.devnull)
    with pytest.raises(FileNotFoundError):
        asyncio.run(choose_accel("/no/such/qemu"))


@pytest.mark.live
def test_kvm_where_the_guest_runs(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(None if shutil.which("qemu-system-x86_64") else "no qemu-system-x86_64")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    monkeypatch.setenv("TMPDIR", str(empty))
    # The host may be too busy to run the guest at its rate even so.
    monkeypatch.setattr(accel, "_LONGEST_S", 30.0)
    assert choose(stand_in(RUNS), monkeypatch).name == "kvm"
    assert_gone(tmp_path)
    assert not list(empty.iterdir())


@pytest.mark.live
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (HANGS, "did not boot within 0.5 s"),
        (f"n=0; {BEAT}; {BEAT}; {HANGS}", "had shown 2 heartbeats, not 30, after 0.5 s"),
    ],
)
def test_tcg_where_the_guest_hangs(
    body: str, reason: str, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = choose(stand_in(body), monkeypatch, probe_s=0.5)
    assert choice.name == "tcg"
    assert reason in choice.reason
    assert_gone(tmp_path)


@pytest.mark.live
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"n=0; while :; do {BEAT}; sleep 0.03; done", "30 heartbeats of a KVM guest took"),
        (f"n=0; {BEAT}; n=0; {BEAT}; {HANGS}", "do not count up from 0: [0, 0]"),
        (f"echo Booting; {HANGS}", "not a heartbeat at byte 0"),
        ("echo first >&2; echo last >&2; exit 1", "QEMU ended: last"),
        ("exit 1", "QEMU ended: it did not say why"),
    ],
)
def test_tcg_where_the_guest_goes_wrong(
    body: str, reason: str, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = choose(stand_in(body), monkeypatch)
    assert choice.name == "tcg"
    assert reason in choice.reason
    assert_gone(tmp_path)


@pytest.mark.live
def test_asking_for_kvm_where_the_guest_hangs_is_an_error(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "PROBE_S", 0.2)
    with pytest.raises(AccelUnavailable, match=r"did not boot within 0\.2 s; use tcg"):
        asyncio.run(choose_accel(stand_in(HANGS), "kvm"))
    assert_gone(tmp_path)


@pytest.mark.live
def test_a_cancelled_probe_leaves_no_process(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "PROBE_S", 60.0)
    qemu = stand_in(HANGS)

    pid = tmp_path / "pid"

    def wait_until_running() -> None:
        deadline = time.monotonic() + 30
        while not (pid.exists() and pid.stat().st_size):
            assert time.monotonic() < deadline
            time.sleep(0.005)

    async def cancel_once_running() -> None:
        task = asyncio.create_task(choose_accel(qemu))
        await asyncio.to_thread(wait_until_running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_once_running())
    assert_gone(tmp_path)


@pytest.mark.live
def test_this_host_gets_an_answer_soon() -> None:
    require(None if shutil.which("qemu-system-x86_64") else "no qemu-system-x86_64")
    started = time.monotonic()
    choice = asyncio.run(choose_accel())
    assert choice.reason
    assert choice.name in ("kvm", "tcg")
    # Far more than PROBE_S, for a busy host; a guest that hangs would take for ever.
    assert time.monotonic() - started < 30
