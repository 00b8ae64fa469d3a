"""YAML files: what is refused in them, and how that is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from bench.strategies.suite import load as load_suite
from migrator.cli.main import main
from migrator.config import load as load_config
from migrator.errors import ConfigError
from migrator.yamlfile import read

SMALLEST = "source: {qmp: /a}\ndestination: {qmp: /b}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file.yaml"


def refusal(file: Path, text: str, load: Callable[[Path], Any] = read) -> ConfigError:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert caught.value.file == str(file)
    return caught.value


both = pytest.mark.parametrize("load", [load_config, load_suite])


@both
@pytest.mark.parametrize("text", ["[" * 5000, "{" * 5000, "- " * 5000, "a:\n" + "? " * 5000])
def test_what_is_nested_too_deeply(file: Path, text: str, load: Callable[[Path], Any]) -> None:
    assert "nested too deeply" in refusal(file, text, load).expected


@both
def test_a_key_that_is_given_twice(file: Path, load: Callable[[Path], Any]) -> None:
    error = refusal(file, f'{SMALLEST}migration:\n  verify: true\n  "verify": false\n', load)
    assert error.key == "verify"
    assert error.expected == "line 5: a duplicate key, first given in line 4"


def test_a_merge_may_be_overridden(file: Path) -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, y: 3}\nd: {<<: [*a, *b]}\n"
    file.write_text(text)
    assert read(file) == yaml.safe_load(text)
    assert refusal(file, "a: &a {x: 1}\nb: {<<: *a, x: 2, x: 3}").key == "x"


@both
@pytest.mark.parametrize(
    "text",
    [
        'source: {qmp: "/a\\0b"}\ndestination: {qmp: /b}',
        'source: {command: ["a", "b\\x00"]}\ndestination: {qmp: /b}',
        'prepare: ["\\0"]\n' + SMALLEST,
        '"a\\0": 1',
    ],
)
def test_a_nul_byte(file: Path, text: str, load: Callable[[Path], Any]) -> None:
    assert refusal(file, text, load).expected == "line 1: a string with a NUL byte"


def test_half_a_character(file: Path) -> None:
    error = refusal(file, '\n"\\ud800"')
    assert "Unicode" in error.expected


@pytest.mark.parametrize(
    "text",
    [
        *('!!int ""', "!!int x", "!!bool x", "!!float x", '!!float ""', "!!timestamp x"),
        *(
            "2024-99-99",
            "1" * 5000,
            "!!binary ü",
            "? [a]\n: b",
            "*a",
            "!!python/object:os.system x",
        ),
        *("\0", "!!python/object:os.system x", "a: b: c", "{", "\x1b"),
    ],
)
@both
def test_what_is_no_yaml(file: Path, text: str, load: Callable[[Path], Any]) -> None:
    refusal(file, text, load)


@given(st.text(max_size=60) | st.text("{}[]&*!:?-<|>'\"\\\n ax0", max_size=60))
def test_there_is_no_other_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    try:
        found = read(file)
    except ConfigError:
        return
    assert repr(found) == repr(yaml.safe_load(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("key", ["1: 2", "null: 2", "[]: 2", "migration: {1: 2}"])
def test_keys_that_are_no_strings(file: Path, key: str) -> None:
    refusal(file, f"{SMALLEST}{key}\n", load_config)


def test_what_is_quoted_is_short(file: Path) -> None:
    for value in ("0x" + "f" * 20_000, "x" * 20_000):
        error = refusal(file, f"{SMALLEST}migration: {{max_rounds: {value}}}\n", load_config)
        assert error.key == "migration.max_rounds"
        assert len(error.expected) < 500


@pytest.mark.parametrize("text", ["[" * 5000, "a: 1\na: 2", 'prepare: ["\\0"]'])
def test_the_command_says_so(file: Path, text: str) -> None:
    file.write_text(text)
    done = CliRunner().invoke(main, ["run", str(file), "--json"])
    assert done.exit_code == 2
    assert "Traceback" not in done.output
