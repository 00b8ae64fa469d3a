"""How pictures look: colours that most eyes tell apart, and hatches and shapes for print in grey.

The colours are those of Okabe and Ito, "Color Universal Design" (2008).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

BLUE = "#0072B2"
SKY = "#56B4E9"
GREEN = "#009E73"
ORANGE = "#E69F00"
RED = "#D55E00"
PURPLE = "#CC79A7"
YELLOW = "#F0E442"
GREY = "#999999"
BLACK = "#000000"

WIDTH = 8.5
"""Inches: what is 9 points in a picture is about as large as the text beside it on a screen."""

_RC: Any = {
    "svg.fonttype": "none",  # text stays text: small, sharp, and as wide as in the reader's font
    "svg.hashsalt": "migrator",  # the same picture is the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "text.parse_math": False,  # names may hold a dollar sign
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.3,
}
_NOT_DATED = {"Date": None, "Creator": None, "Format": None, "Type": None}


@contextmanager
def styled() -> Iterator[None]:
    """Pictures that are made and saved in here look like this."""
    with matplotlib.rc_context(_RC):
        yield


def svg(figure: Figure) -> bytes:
    """A picture as SVG. What is rasterized in it is PNG, at 200 dots per inch."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", dpi=200, metadata=_NOT_DATED)
    text = out.getvalue()
    return text[text.index(b"<svg") :]
