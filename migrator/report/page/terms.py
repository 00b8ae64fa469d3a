"""What a downtime was made of, beside what it was expected to be made of."""

from __future__ import annotations

from matplotlib.figure import Figure

from migrator.report import facts
from migrator.report.page import style
from migrator.report.report import Report

_HEIGHT = 0.38


def figure(report: Report) -> Figure:
    """Draw it: two bars a phase."""
    rows = list(facts.downtime(report))
    drawn = Figure(figsize=(style.WIDTH, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes = drawn.subplots()
    for at, (_, was, expected) in enumerate(rows):
        for value, offset, colour, hatch in (
            (was, -_HEIGHT / 2, style.BLUE, ""),
            (expected, _HEIGHT / 2, "#ffffff", "///"),
        ):
            axes.barh(
                at + offset,
                value or 0.0,
                height=_HEIGHT,
                color=colour,
                edgecolor=style.BLACK,
                linewidth=0.5,
                hatch=hatch,
                label=("was" if offset < 0 else "was expected") if at == 0 else None,
            )
            axes.annotate(
                facts.ms(value),
                (value or 0.0, at + offset),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("ms")
    drawn.legend(loc="outside upper left", ncols=2)
    return drawn


def alt(report: Report) -> str:
    """What it shows."""
    parts = "; ".join(
        f"{name} {facts.ms(was)}, expected {facts.ms(expected)}"
        for name, was, expected in facts.downtime(report)
    )
    return f"Bars of each phase of the downtime: {parts}."
