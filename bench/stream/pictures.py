"""Pictures of :mod:`bench.stream.run`: the stream beside bare loops, and beside QEMU's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.page import bars
from bench.page.bars import Bar
from bench.tables import way
from migrator.report.page import html, style

_MB = 1_000_000
_LOOPS = ("hot loop", "file loop", "stream")
_WHISKERS = "Bars are medians, lines go from the least to the greatest."

Entry = dict[str, Any]


def pictures(results: dict[str, Any]) -> Iterator[str]:
    """All of them, each with its heading."""
    loops = [entry for entry in results["transport"] if entry["memory"] == "all"]
    yield html.heading("The stream beside bare loops", 3)
    yield html.picture(
        style.svg(bars.figure(_rates(loops), _LOOPS, "MB/s")),
        f"Bars of the rates of {', '.join(_LOOPS)}, by kind and number of connections.",
        f"Content per second, all pages dirty. {_WHISKERS}",
    )
    for heading, of, label in _MOVES:
        found = _moves(results["moves"], of)
        series = list(dict.fromkeys(name for some in found.values() for name in some))
        yield html.heading(heading, 3)
        yield html.picture(
            style.svg(bars.figure(found, series, label)),
            f"{heading}, {label}: bars of {', '.join(series)}, on links {', '.join(found)}.",
            f"{_WHISKERS} {_FORCED}" if of is _downtime else _WHISKERS,
        )


def _of(name: str, scale: float = 1.0) -> Callable[[Entry], list[float]]:
    return lambda entry: [sample[name] * scale for sample in entry["samples"]]


_downtime = _of("downtime_ms")
_FORCED = "✗: one or more had to be forced to switch over."
_MOVES = (
    ("Migrations: time in all", _of("total_s"), "s"),
    ("Migrations: downtime", _downtime, "ms"),
    ("Migrations: sent", _of("wire_bytes", 1 / _MB), "MB"),
)


def _rates(entries: Sequence[Entry]) -> bars.Groups:
    found: dict[str, dict[str, Bar]] = {}
    for entry in entries:
        group = f"{'TLS 1.3' if entry['tls'] else 'plain'}, {entry['connections']}"
        rates = [sample["content_bytes"] / sample["s"] / _MB for sample in entry["samples"]]
        found.setdefault(group, {})[entry["what"]] = Bar(rates)
    return found


def _moves(entries: Sequence[Entry], of: Callable[[Entry], list[float]]) -> bars.Groups:
    found: dict[str, dict[str, Bar]] = {}
    for entry in entries:
        group = f"{entry['link']}\nlimit {entry['downtime_limit_ms']:.0f} ms"
        forced = of is _downtime and any(sample["forced"] for sample in entry["samples"])
        found.setdefault(group, {})[way(entry)] = Bar(of(entry), failed=forced)
    return found
