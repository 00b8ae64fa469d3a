"""The command: what it takes, how it ends, and what it prints where."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from migrator.cli.main import main
from migrator.cli.shared import SizeType
from migrator.errors import (
    Aborted,
    AccelUnavailable,
    ConfigError,
    Failed,
    Finding,
    MigratorError,
    PeerRefused,
    QmpUnreachable,
    Refused,
    Undecided,
)
from migrator.report.report import Report

ROOT = Path(__file__).parents[3]
COMMANDS = sorted(main.commands)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


# -- help ---------------------------------------------------------------------------------------


def test_the_commands() -> None:
    assert [
        *["cancel", "demo", "doctor", "keys", "migrate"],
        *["receive", "record", "resolve", "run", "send", "status", "watch"],
    ] == COMMANDS


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(option: str) -> None:
    done = invoke(option)
    assert done.exit_code == 0
    for command in COMMANDS:
        assert f"  {command} " in done.stdout
    for code in range(5):
        assert re.search(rf"^ +{code}  \w", done.stdout, re.MULTILINE)


def leaves(group: click.Group) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from ((name, *rest) for rest in leaves(command))
        else:
            yield (name,)


@pytest.mark.parametrize("words", list(leaves(main)), ids=" ".join)
def test_help_of_a_command(words: tuple[str, ...]) -> None:
    done = invoke(*words, "--help")
    assert done.exit_code == 0
    command: click.Command = main
    for word in words:
        assert isinstance(command, click.Group)
        command = command.commands[word]
    options = [p for p in command.params if isinstance(p, click.Option)]
    for option in options:
        assert option.opts[0] in done.stdout
        assert option.help, option.name
    assert "--json" in done.stdout


def test_version() -> None:
    done = invoke("--version")
    assert done.exit_code == 0
    assert "version" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["demo", "--help"], ["keys", "init", "--help"], ["--version"]]
)
def test_help_is_quick(arguments: list[str]) -> None:
    """Nothing is imported that only work needs."""
    program = (
        "import sys\n"
        "from migrator.cli.main import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "heavy = {'numba', 'numpy', 'matplotlib', 'pydantic', 'rich', 'qemu', 'yaml', 'asyncio'}\n"
        "heavy |= {'cryptography', 'ssl'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == "[]\n"


def test_importing_the_package_is_quick() -> None:
    program = "import migrator, sys; print(len([m for m in sys.modules if '.' in m]))"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in ("numba", "numpy", "pydantic", "qemu", "rich"):
        assert f" {name}\n" not in done.stderr


# -- usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "No such command"),
        (["run"], "Missing argument"),
        (["run", "a", "b"], "unexpected extra argument"),
        (["run", "/"], "is a directory"),
        (["migrate"], "Missing option '--source'"),
        (["migrate", "--source", "/a"], "Missing option '--destination'"),
        (["demo", "--colour", "red"], "No such option"),
        (["demo", "--memory", "much"], "expected a size such as 64M or 2G"),
        (["demo", "--memory", "-1"], "expected a size such as 64M or 2G"),
        (["demo", "--memory", "0"], "more memory"),
        (["demo", "--memory", "64M", "--working-set", "60M"], "more memory"),
        (["demo", "--working-set", "0"], "multiple of the page size"),
        (["demo", "--working-set", "5000"], "multiple of the page size"),
        (["demo", "--write-rate", "-1"], "--write-rate"),
        (["demo", "--accel", "xen"], "--accel"),
        (["demo", "--downtime-limit", "0"], "--downtime-limit"),
        (["demo", "--max-rounds", "0"], "--max-rounds"),
        (["demo", "--max-seconds", "0"], "--max-seconds"),
        (["demo", "--on-limit", "shrug"], "--on-limit"),
        (["demo", "--policy", "hope"], "--policy"),
        (["demo", "--throttle", "100%"], "--throttle"),
    ],
)
def test_usage_errors(arguments: list[str], said: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.output


# -- configurations -----------------------------------------------------------------------------


def last_line(done: Result) -> dict[str, Any]:
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("source: {qmp: /a}\ndestination: {qmp: /b}\nmigration: {max_rounds: 0}", "max_rounds"),
        ("source: {qmp: /a, colour: red}\ndestination: {qmp: /b}", "source.colour: unknown key"),
        ("source: [", "expected YAML"),
        (None, "No such file"),
    ],
)
def test_configuration_errors(tmp_path: Path, text: str | None, said: str, as_json: bool) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    done = invoke("run", str(path), *["--json"] * as_json)
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)
    assert said in done.stderr.replace("\n", "")
    if as_json:
        assert last_line(done)["status"] == "failed"
        assert said in last_line(done)["reason"]
        assert str(path) in last_line(done)["reason"]
    else:
        assert done.stdout == ""


def test_sockets_that_nobody_listens_at(tmp_path: Path) -> None:
    for side in ("source", "destination"):
        done = invoke("migrate", "--source", "/no/a", "--destination", "/no/b", "--json")
        assert done.exit_code == 6
        assert isinstance(done.exception, SystemExit)
        said = last_line(done)
        assert said["status"] == "failed"
        assert said["reason"] == "source: /no/a: No such file or directory"
        assert "No such file" in done.stderr, side


def test_a_preparation_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("prepare: [exit 3]\nsource: {qmp: /a}\ndestination: {qmp: /b}\n")
    done = invoke("run", str(path), "--json")
    assert done.exit_code == 2
    assert last_line(done)["reason"] == "prepare: 'exit 3' ended with 3"


# -- every end ----------------------------------------------------------------------------------


def reported(error: Any, **members: Any) -> Any:
    error.report = Report(status=error.status, reason=error.reason, **members)
    return error


ENDS: list[tuple[MigratorError, int, str]] = [
    (ConfigError("expected sense"), 2, "failed"),
    (AccelUnavailable("kvm", "no"), 2, "failed"),
    (QmpUnreachable("source", "no"), 1, "failed"),
    (PeerRefused("hostb [sha256:0]", "hosta"), 1, "failed"),
    (Refused([Finding("RAM", "is [private]", "share=on")]), 3, "aborted"),
    (reported(Aborted("rounds", "does not converge")), 1, "aborted"),
    (reported(Failed("copy", "is full")), 1, "failed"),
    (Failed("preflight", "before there was a report"), 1, "failed"),
    (reported(Undecided("resume", "no answer", ["it [is] alive"])), 4, "failed"),
]


def concluded(monkeypatch: pytest.MonkeyPatch, end: object) -> Result:
    """Give the command a migration that ends like this."""

    async def migrate(*_: object, **__: object) -> Report:
        if isinstance(end, BaseException):
            raise end
        assert isinstance(end, Report)
        return end

    monkeypatch.setattr("migrator.migration.orchestrator.migrate", migrate)
    return invoke("migrate", "--source", "/a", "--destination", "/b", "--json")


@pytest.mark.parametrize(("error", "code", "status"), ENDS, ids=lambda x: type(x).__name__)
def test_errors(
    monkeypatch: pytest.MonkeyPatch, error: MigratorError, code: int, status: str
) -> None:
    done = concluded(monkeypatch, error)
    assert (done.exit_code, error.exit_code) == (code, code)
    assert len(done.stdout.splitlines()) == 1
    said = last_line(done)
    assert said["status"] == status
    assert said["reason"]
    assert "Traceback" not in done.output
    reason = getattr(error, "reason", "")
    assert reason in done.stderr


def test_what_was_found_is_in_the_json(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = Refused([Finding("RAM", "is [private]", "share=on")])
    done = concluded(monkeypatch, refused)
    finding = {"check": "RAM", "problem": "is [private]", "mend": "share=on"}
    assert last_line(done)["findings"] == [finding]
    assert "is [private]" in done.stderr
    assert "share=on" in done.stderr


def test_what_is_known_is_told_to_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    undecided = Undecided("resume", "no answer", ["it [is] alive", "it is paused"])
    done = concluded(monkeypatch, reported(undecided, known=list(undecided.known)))
    assert "look at both VMs" in done.stderr
    for sentence in undecided.known:
        assert f"- {sentence}" in done.stderr
    assert last_line(done)["known"] == list(undecided.known)


def test_success(monkeypatch: pytest.MonkeyPatch) -> None:
    done = concluded(monkeypatch, Report(status="completed", downtime_ms=5.0, total_ms=50.0))
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 1
    assert last_line(done)["downtime_ms"] == 5.0
    assert "completed" in done.stderr


def test_success_with_a_source_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before QEMU could be asked how much RAM it had sent: null, and still a success."""
    done = concluded(monkeypatch, Report(status="completed", device_state_bytes=1))
    assert done.exit_code == 0
    assert last_line(done)["qemu_ram_transferred"] is None


def test_options_reach_the_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    async def migrate(source: str, destination: str, options: Any, **_: object) -> Report:
        seen.extend((source, destination, options))
        return Report(status="completed")

    monkeypatch.setattr("migrator.migration.orchestrator.migrate", migrate)
    done = invoke(
        *["migrate", "--source", "/a", "--destination", "/b", "--verify"],
        *["--downtime-limit", "7.5", "--max-rounds", "3", "--max-seconds", "9"],
        *["--on-limit", "force", "--policy", "defer-hot", "--throttle", "80%"],
    )
    assert done.exit_code == 0
    assert done.stdout == ""
    source, destination, options = seen
    assert (source, destination, options.verify) == ("/a", "/b", True)
    limits = options.limits
    assert (limits.downtime_ms, limits.max_rounds, limits.max_seconds) == (7.5, 3, 9.0)
    assert limits.on_limit == "force"
    assert options.policy == "defer-hot"
    assert options.throttle_percent == 80


@pytest.mark.parametrize("verify", [False, True])
def test_a_configuration_reaches_the_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("source: {qmp: /a}\ndestination: {qmp: /b}\nmigration: {max_rounds: 7}\n")
    seen: list[Any] = []

    async def run(config: Any, *, here: Path, **_: object) -> Report:
        seen.extend((config, here))
        return Report(status="completed")

    monkeypatch.setattr("migrator.scenario.run", run)
    assert invoke("run", str(path), *["--verify"] * verify).exit_code == 0
    config, here = seen
    assert here == tmp_path.resolve()
    assert (config.migration.max_rounds, config.migration.verify) == (7, verify)


def test_defaults_are_those_of_the_configuration() -> None:
    """On the command line, in a file, and in the library."""
    from migrator.config import GuestConfig, MigrationConfig, parse_throttle
    from migrator.migration.options import Options
    from migrator.policy.judge import Limits

    in_file, in_library = MigrationConfig(), Limits()
    for command in ("demo", "migrate"):
        options = {p.name: p.default for p in main.commands[command].params}
        assert options["downtime_limit"] == in_file.downtime_limit_ms == in_library.downtime_ms
        assert options["max_rounds"] == in_file.max_rounds == in_library.max_rounds
        assert options["max_seconds"] == in_file.max_seconds == in_library.max_seconds
        assert options["on_limit"] == in_file.on_limit == in_library.on_limit
        assert options["policy"] == in_file.policy == Options().policy
        assert parse_throttle(options["throttle"]) == in_file.throttle == Options().throttle_percent
    options = {p.name: p.default for p in main.commands["demo"].params}
    size = SizeType().convert(options["working_set"], None, None)
    assert size == GuestConfig().working_set
    assert options["write_rate"] == GuestConfig().pages_per_s
