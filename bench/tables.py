"""Results in tables: medians, spread, and ratios of what was measured side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from bench.parts import Part, Table

_MB = 1_000_000


def parts(results: dict[str, Any]) -> list[Part]:
    """All tables."""
    return [
        head(results["machine"]),
        _loops(results["transport"], results["size"]),
        _shapes(results["transport"]),
        *(_moves(results["moves"], link) for link in _links(results["moves"])),
    ]


def head(machine: dict[str, Any]) -> str:
    """One line: what it was measured on (:func:`bench.machine.describe`)."""
    memory = machine["memory_bytes"] / (1 << 30)
    software = [f"Linux {machine['kernel']}", f"Python {machine['python']}", machine["qemu"]]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {memory:.0f} GiB; "
        f"{', '.join(filter(None, software))}; revision {machine['revision']}."
    )


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median (least–greatest)."""
    middle, least, greatest = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} ({least:,.{digits}f}–{greatest:,.{digits}f})"


def _of(name: str, scale: float = 1.0) -> Callable[[dict[str, Any]], list[float]]:
    return lambda entry: [sample[name] * scale for sample in entry["samples"]]


# -- the stream ----------------------------------------------------------------------------------


def _rates(entry: dict[str, Any], what: str = "content_bytes") -> list[float]:
    return [sample[what] / sample["s"] / _MB for sample in entry["samples"]]


def ratios(entry: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """Rates by rates of another way to send, each pair of the same run."""
    return [a / b for a, b in zip(_rates(entry), _rates(other), strict=True)]


def _loops(entries: Sequence[dict[str, Any]], size: int) -> Table:
    rows = []
    for tls in (False, True):
        for connections in sorted({entry["connections"] for entry in entries}):
            hot, cold, ours = (
                _find(entries, what, tls, connections, "all")
                for what in ("hot loop", "file loop", "stream")
            )
            rows.append(
                [
                    f"{'TLS 1.3' if tls else 'plain'}, {connections}",
                    *(spread(_rates(entry)) for entry in (hot, cold, ours)),
                    *(spread(ratios(ours, loop), 2) for loop in (hot, cold)),
                ]
            )
    return Table(
        f"{size >> 20} MiB, all dirty, no zeros; MB/s.",
        ["connections", "hot loop", "file loop", "stream", "stream : hot", "stream : file"],
        rows,
    )


def _shapes(entries: Sequence[dict[str, Any]]) -> Table:
    ours = [entry for entry in entries if entry["what"] == "stream"]
    rows = [
        [
            f"{entry['memory']}, {'TLS 1.3' if entry['tls'] else 'plain'}, {entry['connections']}",
            spread(_rates(entry)),
            spread(_rates(entry, "guest_bytes")),
        ]
        for entry in ours
    ]
    return Table(
        "The stream, by what is dirty and what is in it; MB/s.",
        ["memory, connections", "content", "guest memory"],
        rows,
    )


def _find(
    entries: Sequence[dict[str, Any]], what: str, tls: bool, connections: int, memory: str
) -> dict[str, Any]:
    wanted = {"what": what, "tls": tls, "connections": connections, "memory": memory}
    return next(entry for entry in entries if wanted.items() <= entry.items())


# -- whole migrations ----------------------------------------------------------------------------


def _links(entries: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(entry["link"] for entry in entries))


def _moves(entries: Sequence[dict[str, Any]], link: str) -> Table:
    some = [entry for entry in entries if entry["link"] == link]
    rows = [
        [
            way(entry),
            spread(_of("total_s")(entry), 1),
            spread(_of("downtime_ms")(entry)),
            spread(_of("felt_ms")(entry)),
            spread(_of("wire_bytes", 1 / _MB)(entry)),
            spread(_speeds(entry)),
            spread(_of("rounds")(entry)),
            str(sum(sample["forced"] for sample in entry["samples"])),
        ]
        for entry in some
    ]
    limit = some[0]["downtime_limit_ms"]
    heads = ["total s", "downtime ms", "longest gap ms", "MB sent", "guest %", "rounds", "forced"]
    return Table(f"Migrations, {link}, downtime limit {limit:.0f} ms.", ["", *heads], rows)


def way(entry: dict[str, Any]) -> str:
    """Who moves it, and how."""
    multifd = f", multifd {entry['multifd']}" if entry["multifd"] else ""
    return f"{entry['who']}{multifd}, {'TLS' if entry['tls'] else 'plain'}"


def _speeds(entry: dict[str, Any]) -> list[float]:
    """The guest's speed meanwhile, in percent of before."""
    return [
        100 * sample["work_per_s_during"] / sample["work_per_s_before"]
        for sample in entry["samples"]
    ]
