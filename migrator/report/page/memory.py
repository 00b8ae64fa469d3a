"""A heat map of guest memory: where it was dirty, round by round."""

from __future__ import annotations

import itertools

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from migrator.harmless import harmless
from migrator.report.page import style
from migrator.report.report import DirtyMap, MappedBlock
from tracker.bits import regions

_TICKS = 16
_LINED = 40  # columns; more are too narrow for lines between them
_MIB = 1 << 20
_LABEL = {"facecolor": "white", "edgecolor": style.GREY, "boxstyle": "round,pad=0.3"}


def figure(drawn_map: DirtyMap) -> Figure:
    """Draw it: memory upwards, rounds to the right."""
    drawn = Figure(figsize=(style.WIDTH, 5.6), layout="constrained")
    axes = drawn.subplots()
    shares = dirty_shares(drawn_map)
    least = max(float(np.min(shares[shares > 0], initial=1.0)), 1e-6)
    mesh = axes.pcolormesh(
        np.arange(len(drawn_map.rows) + 1),
        _edges_mib(drawn_map),
        np.ma.masked_equal(shares.T, 0.0) * 100,
        cmap="cividis_r",
        norm=LogNorm(min(least, 0.5) * 100, 100.0),
        rasterized=True,
    )
    axes.set_facecolor("#ffffff")
    axes.grid(visible=False)
    bar = drawn.colorbar(mesh, ax=axes, pad=0.01, format=FuncFormatter(lambda v, _: f"{v:g}"))
    bar.set_label("dirty pages of a range, % (white: none)")
    _rounds(drawn, drawn_map)
    _blocks(drawn, drawn_map)
    return drawn


def alt(drawn_map: DirtyMap) -> str:
    """What it shows."""
    blocks = ", ".join(f"{b.name} {b.bytes / _MIB:,.0f} MiB" for b in drawn_map.blocks)
    pages = [sum(row.dirty_pages) for row in drawn_map.rows]
    return (
        f"Heat map of guest memory ({blocks}): where pages were dirty, in {len(pages)} columns of "
        f"one round each or more; {pages[0]:,} pages in the first, {pages[-1]:,} in the last."
    )


def dirty_shares(drawn_map: DirtyMap) -> NDArray[np.float64]:
    """How much of each region was dirty; shape ``(rows, regions)``, 0 to 1."""
    pages = np.concatenate([np.diff(_edges(block)) for block in drawn_map.blocks])
    shares: NDArray[np.float64] = [row.dirty_pages for row in drawn_map.rows] / pages
    return shares


def _edges(block: MappedBlock) -> NDArray[np.int64]:
    return regions.edges(block.bytes // block.page_size, block.regions)


def _edges_mib(drawn_map: DirtyMap) -> NDArray[np.float64]:
    """Where regions begin, one block above the other, and where the last ends."""
    edges, start = [np.zeros(1)], 0
    for block in drawn_map.blocks:
        edges.append((start + _edges(block)[1:] * block.page_size) / _MIB)
        start += block.bytes
    return np.concatenate(edges)


def _rounds(drawn: Figure, drawn_map: DirtyMap) -> None:
    axes, rows = drawn.axes[0], drawn_map.rows
    step = -(-len(rows) // _TICKS)
    shown = range(0, len(rows), step)
    axes.set_xticks(
        [at + 0.5 for at in shown],
        [f"{rows[at].first_round}\n{rows[at].began_s:.2f}" for at in shown],
    )
    axes.set_xlabel("round, and when it began (seconds)")
    if len(rows) <= _LINED:
        axes.vlines(
            range(1, len(rows)), 0, 1, style.GREY, lw=0.4, transform=axes.get_xaxis_transform()
        )
    standing = [at for at, row in enumerate(rows) if row.guest_stood]
    if standing:
        axes.plot(
            [standing[0] + 0.05, standing[-1] + 0.95],
            [1.012, 1.012],
            transform=axes.get_xaxis_transform(),
            color=style.RED,
            linewidth=4,
            solid_capstyle="butt",
            clip_on=False,
        )
        axes.annotate(
            "the guest stands",
            ((standing[0] + standing[-1] + 1) / 2, 1.02),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right" if standing[-1] == len(rows) - 1 and len(rows) > 20 else "center",
        )


def _blocks(drawn: Figure, drawn_map: DirtyMap) -> None:
    axes = drawn.axes[0]
    ends = list(itertools.accumulate(b.bytes / _MIB for b in drawn_map.blocks))
    axes.set_ylim(0, ends[-1])
    where = "from its beginning" if len(ends) == 1 else "(one block above the other)"
    axes.set_ylabel(f"guest memory, MiB {where}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    for end in ends[:-1]:
        axes.axhline(end, color=style.BLACK, linewidth=0.8)
    if len(ends) > 1:
        for block, end in zip(drawn_map.blocks, ends, strict=True):
            middle = end - block.bytes / _MIB / 2
            axes.annotate(
                harmless(block.name),
                (0, middle),
                (5, 0),
                va="center",
                bbox=_LABEL,
                textcoords="offset points",
            )
