"""What a configuration file may say. Every other word in it is an error that names its place."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from migrator import choices, ranges, yamlfile
from migrator.errors import ConfigError
from migrator.policy.throttling import AUTO
from migrator.ranges import Range

_SIZE = re.compile(r"([0-9]{1,18})\s*([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_QUOTED = 200  # characters of a value in a message
_PORT = re.compile(r"[0-9]{1,5}")  # in str.isdigit() are digits that int() does not read
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: object) -> int:
    """``64M`` or a number of bytes → bytes; K, M, G and T are powers of 1024.

    :raise ValueError: it is neither, or more than any machine has
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return int(ranges.SIZE_BYTES.check(text))
    found = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None:
        raise ValueError("expected a size such as 64M or 2G")
    return int(ranges.SIZE_BYTES.check(int(found[1]) << _UNITS[found[2].upper()]))


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` → host, port; an IPv6 address in brackets; no host for every address.

    :raise ValueError: it is something else
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"expected an IPv6 address in brackets, not {text!r}")
    if not colon or not _PORT.fullmatch(port) or int(port) > 65535:
        raise ValueError(f"expected HOST:PORT, not {text!r}")
    return host, int(port)


def parse_throttle(text: object) -> int:
    """``auto``, ``off`` or ``90%`` → percent, 0 to 99.

    YAML reads ``off`` as false.

    :raise ValueError: it is something else
    """
    if text is False or text == "off":
        return 0
    if text == "auto":
        return AUTO
    found = re.fullmatch(r"([0-9]{1,2})\s*%?", str(text).strip())
    if found is None or isinstance(text, bool):
        raise ValueError("expected auto, off, or at most 99 %")
    return int(found[1])


def in_range(numbers: Range) -> AfterValidator:
    """A number of a configuration file is in its range; see :mod:`migrator.ranges`."""
    return AfterValidator(numbers.check)


Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Throttle = Annotated[int, BeforeValidator(parse_throttle)]
Pattern = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Console(_Strict):
    """What the serial console has to show, as regular expressions."""

    ready: Pattern | None = None
    alive: Pattern | None = None
    broken: Pattern | None = None
    timeout_s: Annotated[float, in_range(ranges.WAIT_S)] = 60.0

    @field_validator("ready", "alive", "broken")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"expected a regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _somebody_looks(self) -> Console:
        if self.broken is not None and self.ready is None and self.alive is None:
            raise ValueError("expected ready or alive beside broken: nobody looks without")
        return self


class VmConfig(_Strict):
    """A VM: a command line to start, or the QMP socket of a QEMU that runs."""

    command: list[str] | None = None
    qmp: str | None = None
    console: Console = Console()
    keep: bool = False

    @field_validator("command", mode="before")
    @classmethod
    def _split(cls, command: object) -> object:
        if isinstance(command, str):
            return shlex.split(command.replace("\\\n", ""))  # which shlex takes for an argument
        return command

    @model_validator(mode="after")
    def _one_of_them(self) -> VmConfig:
        if (self.command is None) == (self.qmp is None):
            raise ValueError("expected either command or qmp")
        if self.command is not None and not self.command:
            raise ValueError("expected a command line, found an empty one")
        if self.qmp is not None and "console" in self.model_fields_set:
            raise ValueError("console goes with command, not with qmp")
        return self


def _check_address(text: object) -> object:
    if isinstance(text, str):
        parse_address(text)
    return text


class LinkConfig(_Strict):
    """Another host, on which ``migrator receive`` waits."""

    to: Annotated[str, BeforeValidator(_check_address)]
    tls: str | None = None
    insecure: bool = False
    peer: str | None = None
    streams: Annotated[int, in_range(ranges.STREAMS)] = choices.STREAMS
    compress: str = choices.COMPRESS
    bandwidth: Annotated[Size, in_range(ranges.BANDWIDTH_BYTES_PER_S)] | None = None
    reconnect_s: Annotated[float, in_range(ranges.RECONNECT_S)] = choices.RECONNECT_S
    silence_s: Annotated[float, in_range(ranges.SILENCE_S)] = choices.SILENCE_S

    @field_validator("compress")
    @classmethod
    def _is_known(cls, text: str) -> str:
        if not re.fullmatch(r"none|auto|zstd(:([1-9]|1[0-9]))?", text):
            raise ValueError("expected none, auto, zstd or zstd:1 to zstd:19")
        return text

    @model_validator(mode="after")
    def _one_of_them(self) -> LinkConfig:
        if (self.tls is None) != self.insecure:
            raise ValueError("expected either tls, or insecure: true")
        return self


class GuestConfig(_Strict):
    """The built-in workload guest."""

    working_set: Size = 64 << 20
    pages_per_s: Annotated[int, in_range(ranges.PAGES_PER_S)] = 0


class MigrationConfig(_Strict):
    """When to switch over, when to give up."""

    downtime_limit_ms: Annotated[float, in_range(ranges.DOWNTIME_MS)] = choices.DOWNTIME_LIMIT_MS
    max_rounds: Annotated[int, in_range(ranges.ROUNDS)] = choices.MAX_ROUNDS
    max_seconds: Annotated[float, in_range(ranges.MIGRATION_S)] = choices.MAX_SECONDS
    on_limit: choices.OnLimit = choices.DEFAULT_ON_LIMIT
    max_standstill_s: Annotated[float, in_range(ranges.STANDSTILL_S)] | None = None
    verify: bool = False
    memory_only: bool = False
    tracker: choices.TrackerName = choices.DEFAULT_TRACKER
    policy: choices.PolicyName = choices.DEFAULT_POLICY
    throttle: Throttle = 0
    settle_s: Annotated[float, in_range(ranges.SETTLE_S)] = 0.5


class Config(_Strict):
    """A whole file."""

    prepare: list[str] = []
    accel: choices.AccelName = choices.DEFAULT_ACCEL
    guest: GuestConfig | None = None
    source: VmConfig
    destination: VmConfig | None = None
    link: LinkConfig | None = None
    migration: MigrationConfig = MigrationConfig()

    @model_validator(mode="after")
    def _one_place_to_go(self) -> Config:
        if (self.destination is None) == (self.link is None):
            raise ValueError("expected either destination, on this host, or link, to another")
        return self


def load(path: Path) -> Config:
    """Read a configuration file.

    :raise ConfigError: it cannot be read, is not YAML, or says what may not be said
    """
    said = yamlfile.read(path)
    if not isinstance(said, dict):
        raise ConfigError("expected keys and values", file=str(path))
    try:
        return Config.model_validate(said)
    except ValidationError as error:
        first, *more = error.errors()
        also = "".join(f"; {_key(e)}: {_expected(e)}" for e in more)
        raise ConfigError(_expected(first) + also, file=str(path), key=_key(first)) from error


def _key(error: Any) -> str:
    return ".".join(str(part) for part in error["loc"])


def _expected(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        said = f"unknown key; expected one of {', '.join(_keys_beside(error['loc']))}"
    elif error["type"] == "missing":
        said = "expected, and missing"
    else:
        said = str(error["msg"]).removeprefix("Value error, ")
        said = said.replace("Input should be", "expected")
        if not isinstance(error["input"], (dict, list)):
            said += f", found {_quoted(error['input'])}"
    return said


def _quoted(found: object) -> str:
    if isinstance(found, int) and found.bit_length() > 64:
        return "a number of more than 64 bits"  # which Python may refuse to write
    text = repr(found)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…"


def _keys_beside(location: tuple[str | int, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        inner = [t for t in (annotation, *getattr(annotation, "__args__", ())) if _is_model(t)]
        model = inner[0]
    return list(model.model_fields)


def _is_model(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
