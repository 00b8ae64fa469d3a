"""A migration from its beginning to its end: phases, what was dirty and sent, what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from migrator.report.page import spans, style
from migrator.report.page.spans import Span
from migrator.report.phases import DOWNTIME, Phase
from migrator.report.report import Report, Round

_MIB = 1 << 20
_LEAST_MIB = 1.0  # from here on the axis is logarithmic
_MANY = 300  # rounds; a picture of more of them is smaller as dots than as curves
_DOWNTIME = {phase.value for phase in DOWNTIME}
_KINDS = {  # of phases: colour, hatch
    "preparing": ("#e4e4e4", ""),
    "copy": (style.SKY, ""),
    "rounds": (style.GREEN, "//"),
    "switchover": (style.YELLOW, "--"),
    "downtime": (style.RED, "xx"),
    "comparison": (style.PURPLE, "||"),
    "after it": ("#ffffff", ""),
    "rollback": (style.ORANGE, "\\\\"),
}
_KIND_OF = {
    Phase.COPY.value: "copy",
    Phase.ROUNDS.value: "rounds",
    Phase.SWITCHOVER.value: "switchover",
    Phase.VERIFY.value: "comparison",
    Phase.FINISH.value: "after it",
    Phase.ROLLBACK.value: "rollback",
    **dict.fromkeys(_DOWNTIME, "downtime"),
}
_SHADE: Any = {"facecolor": style.RED, "edgecolor": style.RED, "alpha": 0.22, "hatch": "xx"}
_STANDS = Patch(label="the guest stands", **_SHADE)


def _waiting(r: Round) -> int:
    return r.waiting_bytes


_SERIES: tuple[tuple[str, Callable[[Round], int], str, dict[str, Any]], ...] = (
    # the largest first: what lies upon it hides a part of it only
    (
        "dirty, to be sent",
        lambda r: r.dirty_bytes,
        style.BLUE,
        {"marker": "o", "markersize": 10, "markerfacecolor": "white", "linewidth": 1.5},
    ),
    (
        "sent",
        lambda r: r.sent_bytes,
        style.GREEN,
        {"marker": "s", "markersize": 5, "linestyle": "--", "linewidth": 1},
    ),
    (
        "of what is dirty, waiting for the end",
        _waiting,
        style.BLACK,
        {"marker": "x", "markersize": 6, "linestyle": "", "linewidth": 0.4},
    ),
)


def figure(report: Report) -> Figure:
    """Draw it."""
    heights = [0.35, 2.4, 1.5, *([0.8] if _slowed(report) else [])]
    drawn = Figure(figsize=(style.WIDTH, 1.5 * sum(heights)), layout="constrained")
    strip, pages, expected, *slowed = drawn.subplots(
        len(heights), sharex=True, gridspec_kw={"height_ratios": heights}
    )
    _phases(strip, report)
    _pages(pages, report.rounds)
    _expected(expected, report)
    for axes in slowed:
        _slowing(axes, report.rounds)
    for axes in (pages, expected, *slowed):
        _shade(axes, report)
        _legend(axes, *([_STANDS] if spans.stood(report) is not None else []))
    last = drawn.axes[-1]
    last.set_xlabel("seconds since the migration began")
    last.set_xlim(*_shown(report))
    return drawn


def _shown(report: Report) -> tuple[float, float]:
    """The time that is drawn: of preparing only the end, as nothing is sent in it."""
    ended_s = max(report.total_ms / 1000, 1e-3)
    copied_s = next((s.began_s for s in spans.phases(report) if s.name == Phase.COPY.value), 0.0)
    return max(copied_s - 0.05 * (ended_s - copied_s), 0.0), ended_s


def alt(report: Report) -> str:
    """What it shows."""
    sent = ", ".join(f"{r.sent_bytes / _MIB:,.1f}" for r in report.rounds[:8])
    more = " …" if len(report.rounds) > 8 else ""
    return (
        f"Timeline of {report.total_ms / 1000:.2f} s: phases; MiB that were dirty, waited and were "
        f"sent in each of {len(report.rounds)} rounds (sent: {sent}{more}); the downtime that was "
        "expected in each round, and the one that was."
    ) + (f" Writers waited up to {_slowed(report)} % of their time." if _slowed(report) else "")


def _slowed(report: Report) -> int:
    """The most that writers were made to wait, in percent of their time."""
    return max((r.throttle_percent for r in report.rounds), default=0)


def _phases(axes: Axes, report: Report) -> None:
    found = list(spans.phases(report))
    for kind, (colour, hatch) in _KINDS.items():
        some = [s for s in found if _KIND_OF.get(s.name, "preparing") == kind]
        if some:
            axes.broken_barh(
                [(s.began_s, s.ended_s - s.began_s) for s in some],
                (0, 1),
                facecolor=colour,
                edgecolor="#333333",
                linewidth=0.5,
                hatch=hatch,
                label=kind,
            )
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    began_s = _shown(report)[0]
    axes.set_title(f"phases, after {began_s:.1f} s of preparing" if began_s else "phases", pad=22)
    _legend(axes)


def _pages(axes: Axes, rounds: Sequence[Round]) -> None:
    scale = 1.0 if len(rounds) <= 20 else 0.6
    for name, of, colour, look in _SERIES:
        some = [r for r in rounds if of(r) or of is not _waiting]
        if not some:
            continue
        mib = [of(r) / _MIB for r in some]
        axes.hlines(
            mib,
            [r.began_s for r in some],
            [r.ended_s for r in some],
            colour,
            linewidth=look["linewidth"] * 3,
            alpha=0.5,
            rasterized=len(rounds) > _MANY,
        )
        axes.plot(
            [(r.began_s + r.ended_s) / 2 for r in some],
            mib,
            color=colour,
            label=name,
            rasterized=len(rounds) > _MANY,
            **{**look, "markersize": look["markersize"] * scale},
        )
    most = max((r.dirty_bytes for r in rounds), default=0) / _MIB
    axes.set_yscale("symlog", linthresh=_LEAST_MIB, linscale=0.4)
    axes.set_ylim(0, max(most, 1.0) * 1.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_ylabel("MiB a round")
    axes.set_title("rounds: each line is as long as its round took", pad=22)


def _expected(axes: Axes, report: Report) -> None:
    known = [(r.ended_s, r.expected_downtime_ms) for r in report.rounds]
    decided = [(at, ms) for at, ms in known if ms is not None]
    if decided:
        axes.plot(
            *zip(*decided, strict=True),
            color=style.BLUE,
            marker="D",
            markersize=5,
            linewidth=1,
            label="expected, as of each decision",
            rasterized=len(decided) > _MANY,
        )
    values = [ms for _, ms in decided]
    if report.downtime_limit_ms is not None:
        axes.axhline(report.downtime_limit_ms, color=style.BLACK, linestyle="--", linewidth=1)
        axes.annotate(
            f" limit {report.downtime_limit_ms:g} ms",
            (0, report.downtime_limit_ms),
            xycoords=("axes fraction", "data"),
            xytext=(2, 3),
            textcoords="offset points",
        )
        values.append(report.downtime_limit_ms)
    stood = spans.stood(report)
    if report.downtime_ms is not None and stood is not None:
        axes.plot(
            [stood.ended_s],
            [report.downtime_ms],
            color=style.RED,
            marker="*",
            markersize=13,
            linestyle="",
            label=f"as it was: {report.downtime_ms:.1f} ms",
            clip_on=False,
            zorder=5,
        )
        values.append(report.downtime_ms)
    _scale(axes, values)
    axes.set_ylabel("downtime, ms")
    axes.set_title("downtime", pad=22)


def _slowing(axes: Axes, rounds: Sequence[Round]) -> None:
    axes.hlines(
        [r.throttle_percent for r in rounds],
        [r.began_s for r in rounds],
        [r.ended_s for r in rounds],
        style.PURPLE,
        linewidth=3,
    )
    axes.plot(
        [(r.began_s + r.ended_s) / 2 for r in rounds],
        [r.throttle_percent for r in rounds],
        color=style.PURPLE,
        marker="v",
        markersize=5,
        linestyle="",
        label="how much of their time writers are made to wait",
        rasterized=len(rounds) > _MANY,
    )
    axes.set_ylim(0, 100)
    axes.set_ylabel("%")
    axes.set_title("slowing", pad=22)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    positive = [value for value in values if value > 0]
    if positive and max(positive) / min(positive) > 20:
        axes.set_yscale("log")
        axes.set_ylim(
            10 ** math.floor(math.log10(min(positive))), 10 ** math.ceil(math.log10(max(positive)))
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    else:
        axes.set_ylim(0, max(positive, default=1.0) * 1.25)
        axes.yaxis.set_major_locator(MaxNLocator(5))


def _shade(axes: Axes, report: Report) -> None:
    """Where the guest stands."""
    for span in (spans.drained(report), spans.stood(report)):
        if span is not None:
            axes.axvspan(*_visible(span, report), linewidth=0, zorder=0, **_SHADE)


def _legend(axes: Axes, *more: Patch) -> None:
    handles, _ = axes.get_legend_handles_labels()
    if found := [*handles, *more]:
        axes.legend(
            handles=found, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=8, borderaxespad=0.2
        )


def _visible(span: Span, report: Report) -> tuple[float, float]:
    """Its bounds, a little apart if they are too close to be seen."""
    began_s, ended_s = _shown(report)
    least_s = (ended_s - began_s) * 0.002
    return span.began_s, max(span.ended_s, span.began_s + least_s)
