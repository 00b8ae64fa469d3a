"""Results of strategies (:mod:`bench.strategies.run`) in tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.parts import Bad, Bullets, Part, Table
from bench.strategies import growth
from bench.tables import head, spread

_GIB = 1 << 30
_MIB = 1 << 20

Cell = dict[str, Any]


def parts(results: dict[str, Any]) -> list[Part]:
    """All tables."""
    cells = results["cells"]
    return [
        head(results["machine"]),
        _matrix("Changed pages that were missed, of all that changed.", cells, _missed),
        _matrix("Of the pages that were reported, % that had changed.", cells, _precision),
        _matrix("The guest's progress while it is tracked, in % of without.", cells, _progress),
        _matrix("Longest time without a heartbeat in a tracked span, ms.", cells, _stall),
        _costs(cells),
        *([_growth(results["growth"])] if results["growth"] else []),
        *_reasons(cells),
    ]


def _matrix(title: str, cells: Sequence[Cell], text: Callable[[Cell], str]) -> Table:
    """Guests by strategies."""
    strategies = list(dict.fromkeys(cell["strategy"] for cell in cells))
    guests = dict.fromkeys((cell["workload"], cell["memory"]) for cell in cells)
    rows = []
    for workload, memory in guests:
        found = {
            c["strategy"]: c for c in cells if (c["workload"], c["memory"]) == (workload, memory)
        }
        texts = (_text(found.get(strategy), text) for strategy in strategies)
        rows.append([f"{workload}, {memory / _GIB:g} GiB", *texts])
    return Table(title, ["guest", *strategies], rows)


def _text(cell: Cell | None, text: Callable[[Cell], str]) -> str:
    if cell is None:
        return ""
    if cell["state"] == "unavailable":
        return "n/a"
    return text(cell) if "rounds" in cell else Bad("failed")


def _missed(cell: Cell) -> str:
    changed = sum(round_["changed"] for round_ in cell["rounds"])
    if cell["usage"] is None:
        return f"({changed:,} changed)"
    missed = sum(round_["missed"] for round_ in cell["rounds"])
    return Bad(f"{missed:,} of {changed:,}") if missed else f"0 of {changed:,}"


def _precision(cell: Cell) -> str:
    return "–" if cell["precision"] is None else f"{100 * cell['precision']:.1f}"


def _progress(cell: Cell) -> str:
    return _spread([100 * ratio for ratio in cell["progress"] if ratio is not None])


def _stall(cell: Cell) -> str:
    return _spread([span["longest_silence_ms"] for span in cell["tracked"]])


def _spread(values: Sequence[float], digits: int = 0) -> str:
    return spread(values, digits) if values else "–"


# -- what it costs the host ---------------------------------------------------------------------


def _costs(cells: Sequence[Cell]) -> Table:
    measured = [cell for cell in cells if cell.get("usage")]
    rows = []
    for strategy, memory in dict.fromkeys((c["strategy"], c["memory"]) for c in measured):
        some = [c for c in measured if (c["strategy"], c["memory"]) == (strategy, memory)]
        gib = memory / _GIB
        rows.append(
            [
                f"{strategy}, {gib:g} GiB",
                _spread([ms / gib for c in some for ms in growth.arm_ms(c)], 1),
                _spread([ms / gib for c in some for ms in growth.idle_ms(c)], 2),
                _spread([ns for c in some for ns in growth.ns_per_page(c)]),
                _spread([ms for c in some for ms in growth.running_ms(c)], 1),
                _spread([share for c in some for share in _busy(c)], 1),
                _spread([mib for c in some for mib in growth.tracker_mib(c)]),
            ]
        )
    heads = ["arm ms/GiB", "collect ms/GiB", "ns/dirty page", "running ms", "% of a core", "MiB"]
    return Table("What it costs the host, over all guests of a size.", ["strategy", *heads], rows)


def _busy(cell: Cell) -> list[float]:
    """Processor time of the tracker in each tracked span, in percent of its length."""
    return [
        (round_["cpu_ms"] + round_["children_cpu_ms"]) / span["s"] / 10
        for round_, span in zip(cell["rounds"], cell["tracked"], strict=True)
    ]


def _growth(fits: Sequence[dict[str, Any]]) -> Table:
    rows = [
        [
            f"{fit['strategy']}, {fit['workload']}: {fit['what']}",
            f"{fit['a']:.2f} {fit['b']:+.3f} · GiB",
            ", ".join(f"{gib:g}: {middle:,.1f}" for gib, middle in _medians(fit["samples"])),
            f"{fit['at_1_tib']:,.0f} ± {fit['at_1_tib_error']:,.0f}",
        ]
        for fit in fits
    ]
    heads = ["", "fitted", "measured, by GiB", "at 1 TiB"]
    return Table("How it grows with the guest's RAM.", heads, rows)


def _medians(samples: Sequence[Sequence[float]]) -> Iterator[tuple[float, float]]:
    for gib in sorted({size for size, _ in samples}):
        yield gib, statistics.median(value for size, value in samples if size == gib)


def _reasons(cells: Sequence[Cell]) -> list[Part]:
    """Why cells are not complete, each reason once."""
    said: dict[str, str] = {}
    for cell in cells:
        if cell["state"] == "unavailable":
            said.setdefault(cell["reason"], cell["strategy"])
        elif cell["state"] == "failed":
            said[f"{cell['workload']}: {cell['reason']}"] = Bad(cell["strategy"])
    return [Bullets([(who, reason) for reason, who in said.items()])] if said else []
