"""Pictures of :mod:`bench.strategies.run`: what each strategy misses, and costs, by workload."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from bench.page import bars
from bench.page.bars import Bar
from bench.strategies import growth
from migrator.report.page import html, style

_GIB = 1 << 30

Cell = dict[str, Any]


def pictures(results: dict[str, Any]) -> Iterator[str]:
    """All of them, each with its heading."""
    cells = results["cells"]
    if cells:
        yield html.heading("Changed pages that were reported", 3)
        yield html.picture(style.svg(recall(cells)), _recall_alt(cells), _RECALL)
        measured = [cell for cell in cells if cell["strategy"] != "none"]
        for heading, of, label, line, scale, caption in _COSTS:
            some = cells if of is _progress else measured
            if any("rounds" in cell and of(cell) for cell in some):
                yield html.heading(heading, 3)
                drawn = bars.figure(
                    _groups(some, of), _strategies(cells), label, line=line, scale=scale
                )
                yield html.picture(style.svg(drawn), _alt(heading, some, of), caption)
    if results["growth"]:
        yield html.heading("Growth with the guest's RAM", 3)
        fits = results["growth"]
        yield html.picture(style.svg(lines(fits)), _lines_alt(fits), _LINES)


# -- what is drawn of a cell ----------------------------------------------------------------------


def _progress(cell: Cell) -> list[float]:
    return [100 * ratio for ratio in cell["progress"] if ratio is not None]


def _stalls(cell: Cell) -> list[float]:
    return [span["longest_silence_ms"] for span in cell["tracked"]]


def _ns(cell: Cell) -> list[float]:
    return growth.ns_per_page(cell)


_WHISKERS = "Bars are medians, lines go from the least to the greatest. ✗: pages were missed, or it"
_WHISKERS += " could not be measured; n/a: not on this kernel."
_RECALL = (
    "Of the pages that had changed, how many were reported, each compared byte by byte. Anything "
    "less than all loses memory. –: nothing changed, or nobody tracked."
)
_LINES = (
    "Dots are measured, lines fitted: a + b · GiB, by least squares; beyond what was measured they "
    "are dashed, up to 1 TiB. Both scales go by powers of ten, so that straight lines are bent."
)
_COSTS: tuple[
    tuple[str, Callable[[Cell], list[float]], str, float | None, bars.Scale, str], ...
] = (
    (
        "The guest's progress while it is tracked",
        _progress,
        "% of without",
        100.0,
        "linear",
        f"Work of the guest per second, tracked against not, in pairs. {_WHISKERS} "
        "Lines that go beyond the picture are of guests whose work comes in lumps.",
    ),
    (
        "Longest stall of the guest",
        _stalls,
        "ms",
        None,
        "log",
        f"Longest time without a heartbeat in a tracked span; they come every 10 ms. {_WHISKERS}",
    ),
    (
        "Cost of a dirty page",
        _ns,
        "ns per dirty page",
        None,
        "symlog",
        "What a page that is reported adds to a collection; little is within the noise, and may be "
        f"negative. {_WHISKERS}",
    ),
)


# -- the pictures ---------------------------------------------------------------------------------


def recall(cells: Sequence[Cell]) -> Figure:
    """A field for each strategy and guest; what was missed in red."""
    guests, strategies = list(dict.fromkeys(map(_guest, cells))), _strategies(cells)
    drawn = Figure(figsize=(style.WIDTH, 0.8 + 0.36 * len(guests)), layout="constrained")
    axes = drawn.subplots()
    for cell in cells:
        x, y = strategies.index(cell["strategy"]), guests.index(_guest(cell))
        colour, hatch, text = _field(cell)
        missed = bool(hatch)
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, hatch=hatch, edgecolor="white"))
        axes.text(
            x + 0.5,
            y + 0.5,
            text,
            ha="center",
            va="center",
            fontweight="bold" if missed else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1} if missed else None,
        )
    axes.set_xlim(0, len(strategies))
    axes.set_ylim(len(guests), 0)
    axes.set_xticks(np.arange(len(strategies)) + 0.5, strategies)
    axes.set_yticks(np.arange(len(guests)) + 0.5, [guest.replace("\n", ", ") for guest in guests])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return drawn


def lines(fits: Sequence[dict[str, Any]]) -> Figure:
    """A panel for each quantity, a line for each strategy and guest."""
    quantities = list(dict.fromkeys(fit["what"] for fit in fits))
    names = list(dict.fromkeys(map(_fit_name, fits)))
    drawn = Figure(figsize=(style.WIDTH, 3.9), layout="constrained")
    panels = drawn.subplots(1, len(quantities), squeeze=False)[0]
    for axes, what in zip(panels, quantities, strict=True):
        for fit in (fit for fit in fits if fit["what"] == what):
            at = names.index(_fit_name(fit))
            colour, marker = _LINE_COLOURS[at % len(_LINE_COLOURS)], bars.MARKERS[at]
            gib, values = np.array(fit["samples"], float).T
            within = np.geomspace(gib.min(), gib.max(), 50)
            beyond = np.geomspace(gib.max(), 1024, 50)
            axes.plot(gib, values, marker, color=colour, markersize=5, label=_fit_name(fit))
            for x, dashes in ((within, "-"), (beyond, "--")):
                y = fit["a"] + fit["b"] * x
                axes.plot(x, np.where(y > 0, y, np.nan), dashes, color=colour, linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_xlabel("guest RAM, GiB")
        axes.set_title(what)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower left", ncols=4)
    return drawn


_LINE_COLOURS = (style.BLUE, style.RED, style.GREEN, style.PURPLE, style.BLACK, style.ORANGE)


def _field(cell: Cell) -> tuple[str, str, str]:
    """Colour, hatch and text of a cell: a hatch where something was missed."""
    if cell["state"] == "unavailable":
        return "#eeeeee", "", "n/a"
    if "rounds" not in cell:
        return style.RED, "xx", "failed"
    if cell["recall"] is None:
        return "#f5f5f5", "", "–"
    if cell["recall"] < 1:
        missed = sum(round_["missed"] for round_ in cell["rounds"])
        return style.RED, "xx", f"{cell['recall']:.4f}: {missed:,} missed"
    return "#cfe8f5", "", "all"


def _strategies(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell["strategy"] for cell in cells))


def _guest(cell: Cell) -> str:
    return f"{cell['workload']}\n{cell['memory'] / _GIB:g} GiB"


def _fit_name(fit: dict[str, Any]) -> str:
    return f"{fit['strategy']}, {fit['workload']}"


def _groups(cells: Sequence[Cell], of: Callable[[Cell], list[float]]) -> bars.Groups:
    found: dict[str, dict[str, Bar]] = {}
    for cell in cells:
        values = of(cell) if "rounds" in cell else []
        if values or cell["state"] != "complete":
            bar = Bar(values, failed=cell["state"] == "failed")
            found.setdefault(_guest(cell), {})[cell["strategy"]] = bar
    return found


def _alt(heading: str, cells: Sequence[Cell], of: Callable[[Cell], list[float]]) -> str:
    guests, strategies = dict.fromkeys(map(_guest, cells)), _strategies(cells)
    values = [value for cell in cells if "rounds" in cell for value in of(cell)]
    return (
        f"{heading}: bars of {len(strategies)} strategies ({', '.join(strategies)}) on "
        f"{len(guests)} guests, from {min(values):,.1f} to {max(values):,.1f}. The table below has "
        "the numbers."
    )


def _recall_alt(cells: Sequence[Cell]) -> str:
    bad = [cell for cell in cells if cell["state"] == "failed"]
    said = "; ".join(f"{c['strategy']} on {c['workload']}: {c['reason']}" for c in bad)
    return (
        f"Fields of {len(cells)} strategies and guests: which reported all pages that changed. "
        + (f"Failed: {said}." if bad else "None missed any.")
    )


def _lines_alt(fits: Sequence[dict[str, Any]]) -> str:
    said = "; ".join(f"{_fit_name(f)}: {f['what']} {f['at_1_tib']:,.0f} at 1 TiB" for f in fits)
    return f"Lines of what grows with the guest's RAM. {said}."
