"""Pictures of :mod:`bench.kernels.run`: the compiled loops beside numpy, and beside the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.kernels.work import Case
from bench.page import bars
from migrator.report.page import html, style

Samples = dict[Case, list[dict[str, float]]]

_RATIOS = (
    ("numpy's time : ours", "numpy_s"),
    ("our rate : memcpy's", "memcpy_s"),
    ("our rate : that of reading", "read_s"),
)
_COLOURS = (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE)
_WRITES = 0.05  # of what it reads: no kernel that only reads


def pictures(results: dict[str, Any]) -> Iterator[str]:
    """All of them."""
    samples = _samples(results)
    yield html.picture(
        style.svg(ratios(samples)),
        f"Dots of {len(samples)} cases of {len(_names(samples))} kernels: "
        + "; ".join(_said(samples, title, of) for title, of in _RATIOS),
        "A mark is the median of a case: a size of guest, a density, a number of sources. To the "
        "right of the dashed line ours is faster. Rates of reading are compared only with kernels "
        "that hardly write. Scales go by powers of ten.",
    )


def ratios(samples: Samples) -> Figure:
    """A panel for each ratio, a line for each kernel, a mark for each case."""
    names = _names(samples)
    sizes = sorted({case.guest_gib for case in samples})
    drawn = Figure(figsize=(style.WIDTH, 1.2 + 0.36 * len(names)), layout="constrained")
    panels = drawn.subplots(1, len(_RATIOS), sharey=True)
    for axes, (title, of) in zip(panels, _RATIOS, strict=True):
        for at, size in enumerate(sizes):
            points = [
                (value, names.index(case.kernel) + (at / len(sizes) - 0.4) * 0.6)
                for case, some in samples.items()
                if case.guest_gib == size and (value := _ratio(some, of)) is not None
            ]
            x, y = np.array(points, float).reshape(-1, 2).T
            look = {"color": _COLOURS[at % len(_COLOURS)], "markersize": 4.5}
            axes.plot(x, y, bars.MARKERS[at], label=f"{size:g} GiB of guest", **look)
        axes.axvline(1.0, color=style.BLACK, linestyle="--", linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=5)
    return drawn


def _samples(results: dict[str, Any]) -> Samples:
    found: Samples = {}
    for sample in results["samples"]:
        case = Case(*(sample[name] for name in ("kernel", "guest_gib", "density", "sources")))
        found.setdefault(case, []).append(sample)
    return found


def _names(samples: Samples) -> list[str]:
    return list(dict.fromkeys(case.kernel for case in samples))


def _ratio(some: Sequence[dict[str, float]], of: str) -> float | None:
    if of == "read_s" and some[0]["bytes_written"] > _WRITES * some[0]["bytes_read"]:
        return None
    return median(sample[of] / sample["s"] for sample in some)


def _said(samples: Samples, title: str, of: str) -> str:
    values = [value for some in samples.values() if (value := _ratio(some, of)) is not None]
    return f"{title} from {min(values):.2g} to {max(values):.2g}" if values else f"no {title}"
