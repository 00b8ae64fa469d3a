"""What the doctor makes of what it sees; that it sees what is there: tests/live/test_doctor.py."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import migrator
from migrator.doctor import check as results_of
from migrator.doctor import examine, host, kernel
from migrator.doctor import qemu as qemus
from migrator.doctor.check import Check
from tracker.probe import probe, trial
from tracker.probe.probe import Outcome

PASSED = Check("one", "passed", "fine")
WARNED = Check("two", "warning", "so so", "mind it")
FAILED = Check("three", "failed", "[bold]bad[/bold]", "mend it")


def results(checks: list[Check]) -> dict[str, str]:
    for check in checks:
        assert check.seen
        assert check.mend or check.result == "passed"
    return {check.check: check.result for check in checks}


# -- the outcome --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checks", "expected"),
    [([PASSED], True), ([PASSED, WARNED], True), ([PASSED, FAILED], False), ([FAILED], False)],
)
def test_only_a_failure_makes_a_host_unable(checks: list[Check], expected: bool) -> None:
    assert results_of.able(checks) is expected
    said = json.loads(json.dumps(results_of.as_json(checks)))
    assert said["able"] is expected
    assert said["checks"] == [vars(check) for check in checks]


def shown(checks: list[Check]) -> str:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    results_of.show(checks, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_says_all_and_takes_nothing_for_markup() -> None:
    text = shown([PASSED, WARNED, FAILED])
    for check in (PASSED, WARNED, FAILED):
        (line,) = [line for line in text.splitlines() if check.seen in line]
        assert [cell.strip() for cell in line.split("│")[1:-1]] == list(vars(check).values())
    assert "this host is not able to: 1 of 3 failed" in text


def test_the_table_does_not_repeat_itself() -> None:
    text = shown([FAILED, FAILED, WARNED, FAILED])
    assert text.count("mend it") == 2
    assert text.count("as above") == 1


def test_the_table_has_no_mends_where_there_is_nothing_to_mend() -> None:
    text = shown([PASSED])
    assert "mend" not in text
    assert "this host is able to" in text


# -- QEMU ---------------------------------------------------------------------------------------

FAKE_QEMU = """#!{python}
import json, os, socket, sys
commands, capabilities = {commands!r}, {capabilities!r}
listener = socket.socket(socket.AF_UNIX)
path = sys.argv[sys.argv.index("-qmp") + 1].partition(":")[2].partition(",")[0]
listener.bind(path + ".new")
listener.listen()
os.rename(path + ".new", path)  # it is connected to as soon as it is there
connection, _ = listener.accept()
def say(**what):
    connection.sendall(json.dumps(what).encode() + b"\\r\\n")
say(QMP={{"version": {{"qemu": {{"major": 1, "minor": 2, "micro": 3}}, "package": ""}},
         "capabilities": []}})
text, decoder = "", json.JSONDecoder()
while chunk := connection.recv(65536).decode():
    text += chunk
    command, end = decoder.raw_decode(text)  # the client waits for each answer
    text = text[end:].lstrip()
    answers = {{
        "query-version": {{"qemu": {{"major": 1, "minor": 2, "micro": 3}}, "package": ""}},
        "query-migrate-capabilities": [{{"capability": c, "state": False}} for c in capabilities],
        "query-commands": [{{"name": c}} for c in commands],
        "qmp_capabilities": {{}},
        "migrate-set-capabilities": {{}},
    }}
    name, extra = command["execute"], {{"id": command["id"]}} if "id" in command else {{}}
    if name in answers and name not in {refused!r}:
        say(**{{"return": answers[name]}}, **extra)
    else:
        say(error={{"class": "GenericError", "desc": "not that"}}, **extra)
"""


def examined(directory: Path, **what: tuple[str, ...]) -> dict[str, Check]:
    """What is made of a QEMU that has all it should have but for ``what``."""
    fields = {"commands": qemus.COMMANDS, "capabilities": qemus.CAPABILITIES, "refused": ()}
    qemu = directory / "qemu"
    qemu.write_text(FAKE_QEMU.format(python=sys.executable, **{**fields, **what}))
    qemu.chmod(0o755)
    checks = asyncio.run(qemus.qemu_checks(str(qemu)))
    results(checks)
    return {check.check: check for check in checks}


def test_a_qemu_that_has_everything(tmp_path: Path) -> None:
    checks = examined(tmp_path)
    assert checks["QEMU"].seen.endswith("says 1.2.3")
    assert checks["QEMU's capabilities"].result == "passed"
    assert checks["QEMU's commands"].result == "passed"
    # this one cannot have RAM, so that it shows here that such a QEMU is found out
    assert checks["RAM as a shared file"].result == "failed"
    assert "not that" in checks["RAM as a shared file"].seen


@pytest.mark.parametrize("missing", qemus.CAPABILITIES)
def test_a_qemu_without_a_capability(missing: str, tmp_path: Path) -> None:
    there = tuple(c for c in qemus.CAPABILITIES if c != missing)
    check = examined(tmp_path, capabilities=there)["QEMU's capabilities"]
    assert (check.result, check.seen) == ("failed", f"it lacks {missing}")


def test_a_qemu_that_does_not_turn_its_capabilities_on(tmp_path: Path) -> None:
    check = examined(tmp_path, refused=("migrate-set-capabilities",))["QEMU's capabilities"]
    assert check.result == "failed"
    assert "QEMU refused migrate-set-capabilities: not that" in check.seen


def test_a_qemu_without_a_command(tmp_path: Path) -> None:
    check = examined(tmp_path, commands=qemus.COMMANDS[1:])["QEMU's commands"]
    assert (check.result, check.seen) == ("failed", f"it lacks {qemus.COMMANDS[0]}")


def test_the_commands_are_those_that_a_migration_executes() -> None:
    executed: set[str] = set()
    for file in Path(migrator.__file__).parent.rglob("*.py"):
        if file.parent.name not in ("doctor", "watch"):  # which migrate nothing
            executed.update(re.findall(r'\.execute\(\s*"([\w-]+)"', file.read_text()))
    assert executed
    assert executed == set(qemus.COMMANDS)


def test_no_qemu() -> None:
    (check,) = asyncio.run(qemus.qemu_checks("/no/such/qemu"))
    assert results([check]) == {"QEMU": "failed"}
    assert "/no/such/qemu" in check.seen


def test_a_qemu_that_ends_at_once(tmp_path: Path) -> None:
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\necho cannot >&2\nexit 1\n")
    qemu.chmod(0o755)
    (check,) = asyncio.run(qemus.qemu_checks(str(qemu)))
    assert results([check]) == {"QEMU": "failed"}
    assert check.seen == "QEMU ended with 1: cannot"


def test_no_qemu_is_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    from migrator.qemu import accel

    monkeypatch.setattr(accel, "KVM_DEVICE", "/dev/null")
    assert results(asyncio.run(qemus.accelerator_checks("/no/such/qemu"))) == {
        "accelerator": "failed"
    }


# -- the kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("ptrace is not permitted: it is traced", ("failed", "warning", "warning")),
        ("its main thread does not stop: state D", ("failed", "warning", "warning")),
        ("pidfd_open: Function not implemented", ("failed", "warning", "warning")),
        ("userfaultfd inside the process: Permission denied", ("passed", "failed", "warning")),
        ("pidfd_getfd: Operation not permitted", ("passed", "passed", "failed")),
    ],
)
def test_a_refused_injection_names_the_call(reason: str, expected: tuple[str, ...]) -> None:
    checks = kernel.refused_checks(reason)
    assert results(checks) == dict(
        zip(("ptrace", "userfaultfd", "pidfd_getfd"), expected, strict=True)
    )
    assert [check.seen for check in checks if check.result == "failed"] == [reason]


@pytest.mark.parametrize(
    ("scope", "mend"),
    [
        (None, "CAP_SYS_PTRACE, or as QEMU's user"),
        ("0\n", "CAP_SYS_PTRACE, or as QEMU's user"),
        ("1\n", "to 0 (it is 1)"),
        ("2\n", "to 0 (it is 2)"),
        ("3\n", "nobody may trace"),
    ],
)
def test_yama_is_looked_at_for_the_mend(
    scope: str | None, mend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ptrace_scope"
    if scope is not None:
        file.write_text(scope)
    monkeypatch.setattr(kernel, "PTRACE_SCOPE", file)
    assert mend in kernel.refused_checks("ptrace is not permitted")[0].mend


@pytest.mark.parametrize("missing", trial.FEATURES)
def test_a_missing_feature_is_named(missing: str) -> None:
    everything = (1 << 64) - 1
    assert kernel.features_check(everything).result == "passed"
    check = kernel.features_check(everything & ~trial.FEATURES[missing])
    assert results([check]) == {"userfaultfd's features": "failed"}
    assert check.seen == f"it lacks {missing}"


def test_a_wrong_probe_is_a_failure() -> None:
    checks = kernel.outcome_checks(
        "shm", "mend", [Outcome("a", True, "x"), Outcome("b", False, "y")]
    )
    assert checks == [Check("shm: a", "passed", "x"), Check("shm: b", "failed", "y", "mend")]


def tries(monkeypatch: pytest.MonkeyPatch, free: dict[int, int], panic: Path) -> list[int]:
    tried: list[int] = []

    def try_everything(page_size: int) -> list[Outcome]:
        tried.append(page_size)
        return [Outcome("a", False, "y")]

    monkeypatch.setattr(probe, "free_huge_pages", lambda: free)
    monkeypatch.setattr(probe, "try_everything", try_everything)
    monkeypatch.setattr(kernel, "HUNG_TASK_PANIC", panic)
    return tried


def test_huge_pages_are_tried_where_enough_are_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = tries(monkeypatch, {1 << 30: 9, 2 << 20: trial.HUGE_PAGES + 1}, tmp_path / "none")
    assert results(kernel.huge_page_checks()) == {"2048 kB pages: a": "failed"}
    assert tried == [2 << 20]


def test_huge_pages_are_not_missed_where_none_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = tries(monkeypatch, {2 << 20: trial.HUGE_PAGES}, tmp_path / "none")
    (check,) = kernel.huge_page_checks()
    assert check.result == "passed"
    assert "4 of 2048 kB are free" in check.seen
    assert tried == []


def test_no_deadlock_is_risked_where_it_would_end_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panic = tmp_path / "hung_task_panic"
    panic.write_text("1\n")
    tried = tries(monkeypatch, {2 << 20: 100}, panic)
    assert results(kernel.huge_page_checks()) == {"tracking of huge pages": "warning"}
    assert tried == []
    panic.write_text("0\n")
    assert results(kernel.huge_page_checks()) == {"2048 kB pages: a": "failed"}


# -- the host -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "expected"), [("000001ffffffffff", "passed"), ("fffffffffff7ffff", "warning")]
)
def test_whose_processes(capabilities: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "proc_status", lambda _: {"CapEff": capabilities})
    assert results([host.permission_check()]) == {"other users' processes": expected}


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "expected"), [(4 << 30, "passed"), (64 << 20, "warning")])
def test_room_in_shared_memory(free: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(8 << 30, (8 << 30) - free, free))
    check = host.shared_memory_check()
    assert results([check]) == {"/dev/shm": expected}
    assert "of 8.0 GiB are free" in check.seen


def test_no_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (host, kernel):
        monkeypatch.setattr(module, "SHM", str(tmp_path / "shm"))
    assert results([host.shared_memory_check()]) == {str(tmp_path / "shm"): "warning"}
    assert results(kernel.tracing_checks()) == {"ptrace": "failed"}


# -- patience -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("takes_s", "said"), [(0.0, []), (0.5, ["still trying: it"])])
def test_what_takes_long_is_said(
    takes_s: float, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine, "_PATIENCE_S", 0.1)
    told: list[str] = []

    async def body() -> None:
        assert await examine._patiently("it", asyncio.sleep(takes_s, "result"), told.append) == (
            "result"
        )
        await asyncio.sleep(0.2)

    asyncio.run(body())
    assert told == said


def test_a_kernel_that_is_able_in_the_second_best_way() -> None:
    failed = Check("tracking: holes", "failed", "missed", "a newer kernel")
    other = Check("QEMU", "failed", "none", "install it")
    answered = Check("answered faults", "passed", "all")
    assert results_of.able(kernel.soften([failed, answered]))
    assert not results_of.able(kernel.soften([failed]))
    assert not results_of.able(kernel.soften([failed, replace(answered, result="warning")]))
    assert not results_of.able(kernel.soften([other, answered]))
