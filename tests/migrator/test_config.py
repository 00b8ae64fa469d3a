"""What a configuration may say, and how it is told what it may not."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from migrator.config import (
    Config,
    Console,
    GuestConfig,
    LinkConfig,
    MigrationConfig,
    VmConfig,
    load,
    parse_address,
    parse_size,
)
from migrator.errors import ConfigError

DEMO = Path(__file__).parents[2] / "configs/demo.yaml"

SMALLEST: dict[str, Any] = {"source": {"qmp": "/a"}, "destination": {"qmp": "/b"}}
WHOLE: dict[str, Any] = {
    "prepare": ["true"],
    "accel": "tcg",
    "guest": {"working_set": "8M", "pages_per_s": 5},
    "source": {
        "command": ["qemu"],
        "console": {"ready": "r", "alive": "a", "broken": "b", "timeout_s": 5},
        "keep": True,
    },
    "destination": {"qmp": "/b"},
    "migration": {
        "downtime_limit_ms": 50,
        "max_rounds": 5,
        "max_seconds": 9,
        "on_limit": "force",
        "policy": "send-all",
        "throttle": "90%",
        "verify": True,
        "settle_s": 0,
    },
}
MODELS: list[type[BaseModel]] = [Config, VmConfig, Console, GuestConfig, MigrationConfig]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a config.yaml"


def loaded(path: Path, said: object) -> Config:
    path.write_text(yaml.safe_dump(said))
    return load(path)


def refused(path: Path, said: object, key: str) -> ConfigError:
    """Check that it is, and that file, key and what was expected are named."""
    with pytest.raises(ConfigError) as caught:
        loaded(path, said)
    error = caught.value
    assert error.exit_code == 2
    assert (error.file, error.key) == (str(path), key)
    assert str(error) == ": ".join(part for part in (str(path), key, error.expected) if part)
    return error


def changed(said: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    said = copy.deepcopy(said)
    *way, last = key.split(".")
    place = said
    for part in way:
        place = place[part]
    place[last] = value
    return said


# -- what may be said ---------------------------------------------------------------------------


def test_the_smallest() -> None:
    config = Config.model_validate(SMALLEST)
    assert config.destination is not None
    assert (config.source.qmp, config.destination.qmp) == ("/a", "/b")
    assert config.link is None
    assert config.guest is None


def test_everything(path: Path) -> None:
    config = loaded(path, WHOLE)
    assert config.prepare == ["true"]
    assert config.accel == "tcg"
    assert config.guest == GuestConfig(working_set=8 << 20, pages_per_s=5)
    console = Console(ready="r", alive="a", broken="b", timeout_s=5)
    assert config.source == VmConfig(command=["qemu"], console=console, keep=True)
    assert config.migration == MigrationConfig(
        downtime_limit_ms=50,
        max_rounds=5,
        max_seconds=9,
        on_limit="force",
        policy="send-all",
        throttle=90,
        verify=True,
        settle_s=0,
    )


@pytest.mark.parametrize(
    ("said", "percent"),
    [("auto", 99), ("off", 0), ("75%", 75), ("75 %", 75), ("75", 75), ("0", 0), ("no", 0)],
)
def test_how_much_writers_may_be_slowed(path: Path, said: str, percent: int) -> None:
    """As YAML reads it: ``off`` is false, and a number is one."""
    path.write_text(
        f"source: {{qmp: /a}}\ndestination: {{qmp: /b}}\nmigration: {{throttle: {said}}}"
    )
    assert load(path).migration.throttle == percent


def test_a_command_is_split_as_a_shell_does(path: Path) -> None:
    config = loaded(path, changed(SMALLEST, "source", {"command": "qemu -x 'a b' \\\n -y"}))
    assert config.source.command == ["qemu", "-x", "a b", "-y"]
    again = loaded(path, changed(SMALLEST, "source", {"command": ["qemu", "-x", "a b", "-y"]}))
    assert again == config


# -- what may not -------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "guest", "source", "source.console", "migration"])
def test_an_unknown_key(path: Path, place: str) -> None:
    key = f"{place}.colour".lstrip(".")
    error = refused(path, changed(WHOLE, key, "red"), key)
    known = error.expected.removeprefix("unknown key; expected one of ").split(", ")
    models: dict[str, type[BaseModel]] = {
        "": Config,
        "guest": GuestConfig,
        "source": VmConfig,
        "source.console": Console,
        "migration": MigrationConfig,
    }
    assert known == list(models[place].model_fields)


def test_a_missing_key(path: Path) -> None:
    said = copy.deepcopy(WHOLE)
    del said["source"]
    assert refused(path, said, "source").expected == "expected, and missing"


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("prepare", "true", ""),
        ("prepare", [1], ".0"),
        ("accel", "xen", ""),
        ("guest", 5, ""),
        ("guest.working_set", "much", ""),
        ("guest.working_set", 0, ""),
        ("guest.working_set", -4096, ""),
        ("guest.working_set", 1.5, ""),
        ("guest.working_set", True, ""),
        ("guest.pages_per_s", -1, ""),
        ("guest.pages_per_s", "fast", ""),
        ("source", "qemu", ""),
        ("source", None, ""),
        ("source.command", 5, ""),
        ("source.command", ["qemu", ["-m"]], ".1"),
        ("source.command", 'qemu "-m', ""),
        ("source.console", "ready", ""),
        ("source.console.ready", 5, ""),
        ("source.console.ready", "", ""),
        ("source.console.alive", "(", ""),
        ("source.console.broken", "[z-a]", ""),
        ("source.console.timeout_s", 0, ""),
        ("source.console.timeout_s", "soon", ""),
        ("source.keep", "perhaps", ""),
        ("destination.qmp", 5, ""),
        ("migration", [], ""),
        ("migration.downtime_limit_ms", 0, ""),
        ("migration.downtime_limit_ms", "short", ""),
        ("migration.downtime_limit_ms", float("nan"), ""),
        ("migration.max_rounds", 0, ""),
        ("migration.max_rounds", 1.5, ""),
        ("migration.max_seconds", -1, ""),
        ("migration.on_limit", "shrug", ""),
        ("migration.policy", "hope", ""),
        ("migration.throttle", "on", ""),
        ("migration.throttle", True, ""),
        ("migration.throttle", 100, ""),
        ("migration.throttle", -1, ""),
        ("migration.throttle", "90 %%", ""),
        ("migration.verify", "perhaps", ""),
        ("migration.settle_s", -0.1, ""),
    ],
)
def test_an_ill_typed_value(path: Path, key: str, value: object, place: str) -> None:
    error = refused(path, changed(WHOLE, key, value), key + place)
    assert error.expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("migration.max_rounds", True),  # as YAML's "yes" is
        ("migration.max_rounds", "5"),
        ("migration.downtime_limit_ms", True),
        ("migration.verify", 1),
        ("migration.verify", "no"),
        ("source.keep", "off"),
        ("guest.pages_per_s", "5"),
    ],
)
def test_nothing_is_made_of_another_type(path: Path, key: str, value: object) -> None:
    refused(path, changed(WHOLE, key, value), key)


def test_a_value_is_quoted_and_a_structure_is_not(path: Path) -> None:
    error = refused(path, changed(WHOLE, "accel", "xen"), "accel")
    assert error.expected == "expected 'auto', 'kvm' or 'tcg', found 'xen'"
    error = refused(path, changed(WHOLE, "accel", ["a very long list"]), "accel")
    assert "found" not in error.expected


def test_everything_that_is_wrong_is_told_at_once(path: Path) -> None:
    said = changed(changed(WHOLE, "accel", "xen"), "migration.max_rounds", 0)
    error = refused(path, said, "accel")
    assert "migration.max_rounds: " in error.expected


def test_a_command_or_a_socket(path: Path) -> None:
    for said in ({}, {"command": "qemu", "qmp": "/a"}, {"keep": True}):
        error = refused(path, changed(SMALLEST, "source", said), "source")
        assert error.expected == "expected either command or qmp"


@pytest.mark.parametrize("command", ["", "  ", []])
def test_an_empty_command(path: Path, command: object) -> None:
    error = refused(path, changed(SMALLEST, "source", {"command": command}), "source")
    assert "empty" in error.expected


def test_a_console_of_a_vm_that_runs_already(path: Path) -> None:
    said = changed(SMALLEST, "source", {"qmp": "/a", "console": {"ready": "x"}})
    assert "console goes with command" in refused(path, said, "source").expected


# -- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a: b: c", "expected YAML"),
        (b"a: [", "expected YAML"),
        (b"\0", "expected YAML"),
        (b"a: !!python/object:os.system x", "expected YAML"),
        (b"source: {qmp: /\xe9}", "expected YAML"),
        (b"", "expected keys and values"),
        (b"- a", "expected keys and values"),
        (b"qemu", "expected keys and values"),
    ],
)
def test_no_configuration(path: Path, text: bytes, said: str) -> None:
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load(path)
    assert (caught.value.file, caught.value.key) == (str(path), "")


def test_keys_that_are_no_words(path: Path) -> None:
    path.write_text("source: {qmp: /a}\ndestination: {qmp: /b}\n5: 6\n")
    with pytest.raises(ConfigError, match="5"):
        load(path)


def test_a_file_that_cannot_be_read(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file") as caught:
        load(path)
    assert caught.value.file == str(path)
    with pytest.raises(ConfigError, match="directory"):
        load(tmp_path)


# -- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *[("5", 5), (5, 5), ("4K", 4096), ("64M", 64 << 20), ("2G", 2 << 30), ("1T", 1 << 40)],
        *[("64 M", 64 << 20), (" 64m ", 64 << 20), ("64MB", 64 << 20), ("64MiB", 64 << 20)],
        *[("5B", 5), ("0", 0)],
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1", "1.5G", "1e3", "0x10", "64X", "64MM", "1G 1", None, 1.0, True, [1]]
)
def test_no_sizes(text: object) -> None:
    with pytest.raises(ValueError, match="expected a size such as 64M or 2G"):
        parse_size(text)


@given(st.integers(0, 1 << 12), st.sampled_from(["", "K", "M", "G", "T"]))
def test_units_are_powers_of_1024(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number * 1024 ** " KMGT".index(unit or " ")


# -- configs/demo.yaml is the reference ---------------------------------------------------------


def test_the_reference_loads() -> None:
    config = load(DEMO)
    assert config.source == config.destination
    assert config.source.command is not None
    assert {"{accel}", "file:{console}"} <= set(config.source.command)


def test_the_reference_names_every_key() -> None:
    text = DEMO.read_text()
    for model in MODELS:
        for key in model.model_fields:
            assert re.search(rf"^[# ]*{key}:", text, re.MULTILINE), key


def test_the_reference_names_every_placeholder() -> None:
    from migrator.qemu.process import fill_in

    named = set(re.findall(r"^# +(?:--)? *((?:\{[a-z]+\} ?)+) ", DEMO.read_text(), re.MULTILINE))
    words = {word for line in named for word in line.split()}
    assert words == {"{accel}", "{guest}", "{console}", "{run}", "{cache}", "{here}"}
    assert fill_in(sorted(words), {word[1:-1]: "x" for word in words}) == ["x"] * 6


def default(model: type[BaseModel], key: str) -> Any:
    return model.model_fields[key].get_default()


def test_the_reference_gives_the_defaults() -> None:
    """But where its comment says that it does not."""
    text = DEMO.read_text()
    said = yaml.safe_load(text)
    assert said["prepare"] == default(Config, "prepare")
    assert said["accel"] == default(Config, "accel")
    for side in ("source", "destination"):
        assert said[side]["keep"] == default(VmConfig, "keep")
    assert GuestConfig.model_validate(said["guest"]) == GuestConfig()
    assert said["guest"].keys() == GuestConfig.model_fields.keys()
    assert said["migration"].keys() == MigrationConfig.model_fields.keys()
    for key, value in said["migration"].items():
        comment = re.search(rf"^  {key}: .*\(default: (\w+)\)$", text, re.MULTILINE)
        wanted = yaml.safe_load(comment[1]) if comment else value
        assert wanted == default(MigrationConfig, key), key
    # these are in comments only
    timeout = re.search(r"^# +timeout_s: (\d+) ", text, re.MULTILINE)
    assert timeout is not None
    assert float(timeout[1]) == default(Console, "timeout_s")
    for key in ("ready", "alive", "broken"):
        assert default(Console, key) is None
    link = re.search(r"^#   link:\n((?:#     .*\n)+)", text, re.MULTILINE)
    assert link is not None
    keys = dict(re.findall(r"^#     (\w+): (\S+)", link[1], re.MULTILINE))
    assert keys.keys() == LinkConfig.model_fields.keys()
    for key in ("streams", "compress", "reconnect_s", "silence_s", "insecure"):
        assert yaml.safe_load(keys[key]) == default(LinkConfig, key), key
    for key in ("peer", "bandwidth"):
        assert default(LinkConfig, key) is None


def link(**said: object) -> dict[str, Any]:
    return {"source": {"qmp": "/a"}, "link": {"to": "b:7000", **said}}


def test_a_link_in_the_place_of_a_destination() -> None:
    config = Config.model_validate(link(tls="keys", bandwidth="100M", compress="zstd:3"))
    assert config.destination is None
    assert config.link is not None
    assert config.link.bandwidth == 100 << 20
    assert config.link.compress == "zstd:3"


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (link(), "either tls, or insecure"),
        (link(tls="keys", insecure=True), "either tls, or insecure"),
        (link(tls="keys", to="b"), "HOST:PORT"),
        (link(tls="keys", to="fd00::1:7000"), "in brackets"),
        (link(tls="keys", compress="zip"), "none, auto, zstd"),
        (link(tls="keys", streams=0), "from 1 to 32"),
        ({"source": {"qmp": "/a"}}, "either destination"),
        ({**link(tls="keys"), "destination": {"qmp": "/b"}}, "either destination"),
    ],
)
def test_a_link_that_makes_no_sense(said: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Config.model_validate(said)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host.example:7000", ("host.example", 7000)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("[fd00::1]:7000", ("fd00::1", 7000)),
        (":7000", ("", 7000)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address
