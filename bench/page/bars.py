"""Bars in groups, in as many rows as they need: medians, with lines from least to greatest."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from migrator.report.page import style

LOOKS = (
    ("#ffffff", ""),
    (style.BLUE, ""),
    (style.ORANGE, "//"),
    (style.GREEN, "\\\\"),
    (style.SKY, "||"),
    (style.PURPLE, "xx"),
    (style.YELLOW, "--"),
    (style.RED, "++"),
    (style.GREY, "///"),
)
"""Colours and hatches, for one series after the other. Dots are not among them: they take room."""
MARKERS = "o^sDvP*Xh"
_IN_A_ROW = 40
_MOST = 1.6

Scale = Literal["linear", "log", "symlog"]


@dataclass(frozen=True)
class Bar:
    """One bar.

    :ivar values: none where it could not be measured
    :ivar failed: it could be, or not, but something was not as it has to be
    """

    values: Sequence[float]
    failed: bool = False


Groups = Mapping[str, Mapping[str, Bar]]
"""Bars by name of the series, by name of the group; series may be missing in groups."""


def figure(
    groups: Groups,
    series: Sequence[str],
    label: str,
    *,
    line: float | None = None,
    scale: Scale = "linear",
) -> Figure:
    """Draw them.

    :param label: what the values are, with their unit
    :param line: where to draw one; what is far above it is cut off
    :param scale: ``log``: by powers of ten; ``symlog``: likewise, and below zero too
    """
    rows = list(_rows(groups))
    drawn_series = [name for name in series if any(name in bars for bars in groups.values())]
    drawn = Figure(figsize=(style.WIDTH, 0.7 + 2.4 * len(rows)), layout="constrained")
    found = drawn.subplots(len(rows), sharey=True, squeeze=False)[:, 0]
    width = max(_width(row) for row in rows)
    for axes, row in zip(found, rows, strict=True):
        _draw(axes, row, looks(series))
        axes.set_xlim(-1.0, width - 1.5)
        axes.set_ylabel(label)
        if line is not None:
            axes.axhline(line, color=style.BLACK, linestyle="--", linewidth=1)
        if scale == "symlog":
            axes.axhline(0, color=style.BLACK, linewidth=0.8)
    values = [v for bars in groups.values() for bar in bars.values() for v in bar.values]
    _rescale(found[0], scale, values)  # it is the scale of all
    if line is not None and found[0].get_ylim()[1] > _MOST * line:
        found[0].set_ylim(top=_MOST * line)
    patches = [
        Patch(facecolor=colour, hatch=hatch, edgecolor=style.BLACK, linewidth=0.5, label=name)
        for name, (colour, hatch) in looks(series).items()
        if name in drawn_series
    ]
    drawn.legend(handles=patches, loc="outside upper left", ncols=min(len(patches), 7))
    return drawn


def looks(series: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and hatch of each series."""
    return {name: LOOKS[at % len(LOOKS)] for at, name in enumerate(series)}


def _rows(groups: Groups) -> Iterator[dict[str, Mapping[str, Bar]]]:
    row: dict[str, Mapping[str, Bar]] = {}
    for name, bars in groups.items():
        if row and _width({**row, name: bars}) > _IN_A_ROW:
            yield row
            row = {}
        row[name] = bars
    yield row


def _width(row: Groups) -> float:
    return sum(max(len(bars), 3) + 1.5 for bars in row.values())


def _rescale(axes: Axes, scale: Scale, values: Sequence[float]) -> None:
    if scale == "symlog":
        axes.set_yscale("symlog", linthresh=100.0)
    elif scale == "log" and any(value > 0 for value in values):
        least = math.floor(math.log10(min(value for value in values if value > 0)))
        most = math.ceil(math.log10(max(values)))
        axes.set_yscale("log")
        axes.set_ylim(10**least, 10 ** max(most, least + 1))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _draw(axes: Axes, row: Groups, styles: Mapping[str, tuple[str, str]]) -> None:
    at, ticks = 0.0, []
    for bars in row.values():
        room = max(len(bars), 3)
        first = at + (room - len(bars)) / 2
        for offset, name in enumerate(name for name in styles if name in bars):
            _bar(axes, first + offset, bars[name], styles[name])
        ticks.append(at + (room - 1) / 2)
        at += room + 1.5
    axes.set_xticks(ticks, list(row))
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")


def _bar(axes: Axes, at: float, bar: Bar, look: tuple[str, str]) -> None:
    if bar.values:
        middle = statistics.median(bar.values)
        axes.bar(
            at,
            middle,
            width=0.86,
            color=look[0],
            hatch=look[1],
            edgecolor=style.BLACK,
            linewidth=0.5,
        )
        axes.vlines(at, min(bar.values), max(bar.values), style.BLACK, linewidth=1.2)
    if bar.values and not bar.failed:
        return
    axes.annotate(
        "✗" if bar.failed else "n/a",
        (at, 0.02),
        xycoords=axes.get_xaxis_transform(),
        ha="center",
        va="bottom",
        rotation=0 if bar.failed else 90,
        fontsize=13 if bar.failed else 7,
        fontweight="bold" if bar.failed else "normal",
        color=style.RED if bar.failed else style.BLACK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )
