"""Numbers at the door: options and configuration files take those that make sense."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from bench.cli.main import main as bench_main
from bench.strategies.suite import Grid
from migrator import ranges
from migrator.cli.main import main
from migrator.cli.shared import Number, SizeType, ThrottleType
from migrator.config import (
    Console,
    GuestConfig,
    LinkConfig,
    MigrationConfig,
    parse_address,
    parse_size,
    parse_throttle,
)
from migrator.errors import ConfigError
from migrator.ranges import Range
from migrator.transport.packing import parse_compression

SENSELESS = ["nan", "inf", "-inf", "1e300", "-1e300", "-1e-300", "", "٣", "1_0", "9" * 5000]


# -- a range ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*SENSELESS, "0x10", "true", None, True, [], math.nan, math.inf])
def test_it_refuses_all_that_is_no_number_in_it(text: object) -> None:
    with pytest.raises(ValueError, match=r"^expected a number from 0\.5 to 1,000 s$"):
        Range(0.5, 1000, "s").parse(text)


@given(st.floats() | st.integers())
def test_it_takes_no_more_than_it_says(number: float) -> None:
    numbers = Range(0.5, 1000, "s")
    if 0.5 <= number <= 1000:
        assert numbers.parse(number) == numbers.parse(repr(number)) == number
    else:
        with pytest.raises(ValueError, match="expected"):
            numbers.parse(number)
        with pytest.raises(ValueError, match="expected"):
            numbers.parse(repr(number))


@pytest.mark.parametrize("text", ["1.5", "1e-3", 2.5])
def test_a_whole_number_is_whole(text: object) -> None:
    with pytest.raises(ValueError, match="a whole number"):
        Range(0, 10, whole=True).parse(text)
    assert type(Range(0, 10, whole=True).parse("7")) is int


# -- commands -----------------------------------------------------------------------------------


def options(group: click.Group, *before: str) -> Iterator[tuple[tuple[str, ...], click.Option]]:
    for name, command in group.commands.items():
        words = (*before, name)
        if isinstance(command, click.Group):
            yield from options(command, *words)
        else:
            yield from ((words, p) for p in command.params if isinstance(p, click.Option))


ALL = [(root, *found) for root in (main, bench_main) for found in options(root)]


def named(part: object) -> str | None:
    if isinstance(part, click.Command | click.Option):
        return part.name
    return " ".join(part) if isinstance(part, tuple) else None


NUMBERS = [one for one in ALL if isinstance(one[2].type, Number)]


def test_all_numbers_are_of_one_type() -> None:
    assert len(NUMBERS) > 20
    for _, words, option in ALL:
        other = (click.types.IntParamType, click.types.FloatParamType, click.IntRange)
        is_other = isinstance(option.type, other) and not isinstance(option.type, Number)
        assert not is_other, (words, option.name)


@pytest.mark.parametrize("text", [*SENSELESS, "1e-300"])
@pytest.mark.parametrize(("root", "words", "option"), NUMBERS, ids=named)
def test_a_senseless_number_is_a_usage_error(
    root: click.Group, words: tuple[str, ...], option: click.Option, text: str
) -> None:
    assert isinstance(option.type, Number)
    if text == "1e-300" and option.type.numbers.least == 0 and not option.type.numbers.whole:
        return  # it is as good as 0 there
    done = CliRunner().invoke(root, [*words, f"{option.opts[0]}={text}"])
    assert done.exit_code == 2
    assert f"'{option.opts[0]}': expected {option.type.numbers}" in " ".join(done.stderr.split())
    assert done.stdout == ""


SIZES = [one for one in ALL if isinstance(one[2].type, SizeType)]


@pytest.mark.parametrize("text", ["nan", "9999999999999T", "9" * 5000, "64\u212a", "٣M", "-1"])
@pytest.mark.parametrize(("root", "words", "option"), SIZES, ids=named)
def test_a_senseless_size_is_a_usage_error(
    root: click.Group, words: tuple[str, ...], option: click.Option, text: str
) -> None:
    done = CliRunner().invoke(root, [*words, f"{option.opts[0]}={text}"])
    assert done.exit_code == 2
    assert "expected" in done.stderr


@pytest.mark.parametrize("rate", ["9" * 400, f"0.{0:020}1", "٣", "nan", "1e300", "2000000GiB/s"])
def test_a_senseless_link_of_a_simulation(rate: str) -> None:
    done = CliRunner().invoke(bench_main, ["simulate", "none", "--link", rate])
    assert done.exit_code == 2
    assert "expected" in done.stderr


# -- configuration files ------------------------------------------------------------------------

MODELS: list[type[BaseModel]] = [Console, GuestConfig, LinkConfig, MigrationConfig, Grid]


def numeric_fields() -> Iterator[tuple[type[BaseModel], str]]:
    for model in MODELS:
        for name, field in model.model_fields.items():
            if re.search(r"\b(int|float)\b", str(field.annotation)):
                yield model, name


@pytest.mark.parametrize(("model", "name"), list(numeric_fields()))
@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, 1e300, 10**400, 1 << 20_000, -(10**400), -1],
    ids=["nan", "inf", "-inf", "1e300", "1e400", "2^20000", "-1e400", "-1"],
)
def test_a_senseless_number_in_a_file(model: type[BaseModel], name: str, value: Any) -> None:
    """None is taken, and none ends in another error than the one that is expected."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate({name: value})
    assert any(error["loc"][0] == name for error in caught.value.errors())


def test_numeric_fields_are_found() -> None:
    found = {f"{model.__name__}.{name}" for model, name in numeric_fields()}
    assert found >= {
        *("Console.timeout_s", "GuestConfig.pages_per_s", "LinkConfig.streams", "Grid.pairs"),
        *("LinkConfig.bandwidth", "LinkConfig.reconnect_s", "LinkConfig.silence_s"),
        *("MigrationConfig.max_standstill_s", "MigrationConfig.settle_s", "Grid.span_s"),
    }


def test_the_bounds_themselves_are_taken() -> None:
    for name, numbers in vars(ranges).items():
        if isinstance(numbers, Range):
            for bound in (numbers.least, numbers.most):
                assert numbers.parse(bound) == bound, name
                assert TypeAdapter(float).validate_python(bound) == bound


# -- other things that are written with digits ----------------------------------------------------


@pytest.mark.parametrize("port", ["²", "٣", "1²", "１", "9" * 5000, "+1", "1_0", " 1", ""])
def test_a_port_is_written_in_plain_digits(port: str) -> None:
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        parse_address(f"host:{port}")
    for arguments in (["send", "--source", "/a", "--to"], ["receive", "--listen"]):
        done = CliRunner().invoke(main, [*arguments, f"host:{port}"])
        assert done.exit_code == 2
        assert "expected HOST:PORT" in done.stderr


@pytest.mark.parametrize("text", ["٣M", "²", "64\u212a", "1e3"])
def test_a_size_is_written_in_plain_digits(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["٣%", "²", "٣"])
def test_a_share_is_written_in_plain_digits(text: str) -> None:
    with pytest.raises(ValueError, match="expected auto, off"):
        parse_throttle(text)
    with pytest.raises(click.BadParameter, match="expected auto, off"):
        ThrottleType().convert(text, None, None)


@pytest.mark.parametrize("text", ["zstd:²", "zstd:٣", "zstd:0", "zstd:20", "zstd:"])
def test_a_level_is_written_in_plain_digits(text: str) -> None:
    with pytest.raises(ConfigError, match="zstd:1 to zstd:19"):
        parse_compression(text)
    arguments = ["send", "--source", "/a", "--to", "h:1", "--insecure", "--compress", text]
    assert CliRunner().invoke(main, arguments).exit_code == 2
