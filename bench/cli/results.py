"""One page of one or several files of results, whatever was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench import tables
from bench.kernels import pictures as kernels
from bench.kernels import tables as kerneltables
from bench.parts import Part, to_html
from bench.simulate import pictures as simulate
from bench.strategies import pictures as strategies
from bench.strategies import tables as strategytables
from bench.stream import pictures as stream
from bench.versus import pictures as versus
from bench.versus import tables as versus_tables
from migrator.report.page import html, style

Results = dict[str, Any]
Kind = tuple[str, Callable[[Results], Iterator[str]], Callable[[Results], list[Part]]]
"""Title, what makes pictures, and what makes tables."""


class UnknownResults(Exception):
    """Nothing is known of what was measured there."""


def kind(results: Results) -> Kind:
    """What results are of.

    :raise UnknownResults: they are of nothing that can be drawn
    """
    if results.get("kind") == "strategies":
        return "strategies", strategies.pictures, strategytables.parts
    if "versus" in results:
        return "versus QEMU", versus.pictures, versus_tables.parts
    if {"trace", "plans"} <= results.keys():
        return "simulated migrations", simulate.pictures, simulate.parts
    if {"transport", "moves"} <= results.keys():
        return "between two hosts", stream.pictures, tables.parts
    if results.get("samples") and "numpy_s" in results["samples"][0]:
        return "kernels", kernels.pictures, kerneltables.parts
    raise UnknownResults("expected results of strategies, versus, simulate, stream or kernels")


def page(results: Sequence[Results]) -> str:
    """Make a page: a section for each.

    :raise UnknownResults: see :func:`kind`
    """
    kinds = [kind(found) for found in results]
    with style.styled():
        parts = [
            part for found, its in zip(results, kinds, strict=True) for part in _section(found, its)
        ]
    titles = ", ".join(dict.fromkeys(title for title, _, _ in kinds))
    return html.document(f"Measurements: {titles}", "qemu-migrator", parts)


def _section(results: Results, its: Kind) -> Iterator[str]:
    title, pictures, numbers = its
    head, *rest = to_html(numbers(results))
    yield html.heading(title[0].upper() + title[1:])
    yield head
    yield from pictures(results)
    yield html.heading("In numbers", 3)
    yield from rest
