"""What a suite of cells may say: which strategies, on which guests, for how long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from bench.guests.guests import Guest
from bench.strategies.strategy import Strategy, parse
from migrator import ranges, yamlfile
from migrator.config import Size, in_range
from migrator.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """One cell to be measured: a strategy, a guest, and how long to look.

    :ivar strategy: as a suite names it
    :ivar memory: bytes of guest RAM
    :ivar pairs: how many spans are tracked; as many are not
    :ivar span_s: how long the guest runs in each
    :ivar collections: how often pages are collected in a tracked span, before its end
    """

    strategy: str
    workload: str
    memory: int
    pairs: int
    span_s: float
    collections: int

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.strategy}, {self.workload}, {self.memory / (1 << 30):g} GiB"


def _parsed(text: object) -> object:
    return parse(text) if isinstance(text, str) else text


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True
    )


class Grid(_Strict):
    """Each strategy on each workload, in each size."""

    strategies: Annotated[list[Annotated[Strategy, BeforeValidator(_parsed)]], Field(min_length=1)]
    workloads: Annotated[list[str], Field(min_length=1)]
    memory: Annotated[list[Size], Field(min_length=1)]
    pairs: Annotated[int, in_range(ranges.RUNS)] = 5
    span_s: Annotated[float, in_range(ranges.WAIT_S)] = 0.4
    collections: Annotated[int, in_range(ranges.RUNS)] = 3

    @model_validator(mode="after")
    def _guests_make_sense(self) -> Grid:
        for workload in self.workloads:
            for memory in self.memory:
                Guest(workload, memory)
        return self

    def tasks(self) -> Iterator[Task]:
        """All cells; those of one guest one after the other."""
        for memory in self.memory:
            for workload in self.workloads:
                for strategy in self.strategies:
                    more = (self.pairs, self.span_s, self.collections)
                    yield Task(strategy.name, workload, memory, *more)


class Suite(_Strict):
    """A whole file."""

    qemu: str = "qemu-system-x86_64"
    grids: Annotated[list[Grid], Field(min_length=1)]

    def tasks(self) -> list[Task]:
        """All cells, each once."""
        return list(dict.fromkeys(task for grid in self.grids for task in grid.tasks()))


def load(path: Path) -> Suite:
    """Read a suite.

    :raise ConfigError: it cannot be read, is not YAML, or says what may not be said
    """
    said = yamlfile.read(path)
    try:
        return Suite.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        unknown = first["type"] == "extra_forbidden"
        reason = "unknown key" if unknown else first["msg"].removeprefix("Value error, ")
        raise ConfigError(reason, file=str(path), key=key) from error
