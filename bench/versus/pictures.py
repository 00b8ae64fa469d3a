"""Pictures of :mod:`bench.versus.run`: ratios to QEMU's best, targets, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.page import bars
from bench.page.bars import Bar
from bench.versus.targets import TARGETS, Entry, Ratio, Target, completed, ratio
from migrator.report.page import html, style

Case = Sequence[Entry]
"""Entries of one guest over one link, ours first."""

_RATIOS = (
    "Small dots are runs, large marks their medians. A target is met on the shaded side of the "
    "dashed line: a blue disk is met, a red cross is not. –: no run in which both completed. "
    "Scales go by powers of ten."
)
_MEASURES = (("time in all", "total_s", "s"), ("downtime", "downtime_ms", "ms"))
_MEASURED = "Bars are medians, lines go from the least to the greatest."
_NOT_ALL = "✗: not every move came to its end, or something was lost."


def pictures(results: dict[str, Any]) -> Iterator[str]:
    """All of them, each with its heading."""
    entries = results["entries"]
    for qemu in dict.fromkeys(entry["qemu"] for entry in entries):
        cases = _cases([entry for entry in entries if entry["qemu"] == qemu])
        yield html.heading(f"The migrator : {qemu} with its best setting in each measure", 3)
        yield html.picture(style.svg(ratios(cases)), _alt(qemu, cases), _RATIOS)
        ways = list(dict.fromkeys(_way(entry) for case in cases for entry in case))
        for title, measure, unit in _MEASURES:
            groups = {_name(case[0]): {_way(e): _bar(e, measure) for e in case} for case in cases}
            yield html.heading(f"{qemu}: {title}", 3)
            yield html.picture(
                style.svg(bars.figure(groups, ways, unit, scale="log")),
                f"{title}, {unit}: bars of {'; '.join(ways)} for {len(groups)} guests and links.",
                f"{_MEASURED} {_NOT_ALL}",
            )


def ratios(cases: Sequence[Case]) -> Figure:
    """A panel for each target, a line for each guest and link."""
    drawn = Figure(figsize=(style.WIDTH, 1.1 + 0.34 * len(cases)), layout="constrained")
    panels = drawn.subplots(1, len(TARGETS), sharey=True, squeeze=False)[0]
    for axes, target in zip(panels, TARGETS, strict=True):
        found = [ratio(target, ours, theirs) for ours, *theirs in cases]
        _panel(axes, target, found)
    panels[0].set_yticks(range(len(cases)), [_name(case[0]) for case in cases])
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    drawn.supxlabel("ours : QEMU's", fontsize=9)
    return drawn


def _panel(axes: Axes, target: Target, found: Sequence[Ratio | None]) -> None:
    values = [value for each in found if each for value in each.values]
    least, most = min([*values, target.limit]) / 1.5, max([*values, target.limit]) * 1.5
    axes.set_xscale("log")
    axes.set_xlim(least, most)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most / least < 30 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvspan(*((target.limit, most) if target.more else (least, target.limit)), color="#e3f0f8")
    axes.axvline(target.limit, color=style.BLACK, linestyle="--", linewidth=1)
    axes.set_title(str(target))
    axes.tick_params(axis="y", length=0)
    for y, each in enumerate(found):
        if each is None:
            axes.text((least * most) ** 0.5, y, "–", ha="center", va="center", fontsize=14)
            continue
        colour = style.BLUE if each.met else style.RED
        axes.plot(each.values, [y] * len(each.values), ".", color=colour, markersize=4)
        axes.plot(
            each.median,
            y,
            "o" if each.met else "X",
            color=colour,
            markersize=9,
            markerfacecolor=colour if each.met else "white",
            markeredgewidth=1.5,
        )


def _cases(entries: Sequence[Entry]) -> list[list[Entry]]:
    names = dict.fromkeys(map(_name, entries))
    return [[entry for entry in entries if _name(entry) == name] for name in names]


def _name(entry: Entry) -> str:
    return f"{entry['workload']}\n{entry['link']}"


def _way(entry: Entry) -> str:
    return ", ".join(part for part in (entry["who"], entry["setting"]) if part)


def _bar(entry: Entry, measure: str) -> Bar:
    values = [s[measure] for s in completed(entry) if s[measure] is not None]
    return Bar(values, failed=any(s["problem"] or s["lost"] for s in entry["samples"]))


def _alt(qemu: str, cases: Sequence[Case]) -> str:
    found = [
        (case, each)
        for case in cases
        for target in TARGETS
        if (each := ratio(target, case[0], case[1:])) is not None
    ]
    said = "; ".join(
        f"{_name(case[0]).replace(chr(10), ', ')}: {each.target.name} {each.median:.2f}"
        for case, each in found
    )
    met = sum(each.met for _, each in found)
    return f"Ratios of the migrator to {qemu}: {met} of {len(found)} targets met. {said}."
