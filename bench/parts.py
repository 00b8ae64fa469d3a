"""What results are told in: paragraphs, lists and tables, as Markdown or as parts of a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from migrator.report.page import html


class Bad(str):
    """A cell, or the name of an item, that is to be seen at once: bold, or in the colour for it."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """A table, whose first column is to the left, and the others to the right.

    :ivar left: how many columns are to the left
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


@dataclass(frozen=True)
class Bullets:
    """A list of names, and what is said of each."""

    items: Sequence[tuple[str, str]]


Part = str | Table | Bullets


def to_markdown(parts: Sequence[Part]) -> str:
    """All parts as Markdown."""
    return "\n\n".join(map(_markdown, parts)) + "\n"


def _markdown(part: Part) -> str:
    if isinstance(part, Table):
        rule = "---|" * part.left + "---:|" * (len(part.heads) - part.left)
        lines = [f"| {' | '.join(part.heads)} |", f"|{rule}"]
        lines += [f"| {' | '.join(map(_bold, row))} |" for row in part.rows]
        return "\n".join(([part.title, ""] if part.title else []) + lines)
    if isinstance(part, Bullets):
        return "\n".join(f"- {_bold(name)}: {said}" for name, said in part.items)
    return part


def _bold(text: str) -> str:
    return f"**{text}**" if isinstance(text, Bad) else text


def to_html(parts: Sequence[Part]) -> Iterator[str]:
    """Each part as HTML."""
    for part in parts:
        if isinstance(part, Table):
            yield html.table(part.heads, [list(map(_cell, row)) for row in part.rows], part.title)
        elif isinstance(part, Bullets):
            yield html.bullets(f"{name}: {said}" for name, said in part.items)
        else:
            yield html.paragraph(part)


def _cell(text: str) -> html.Cell:
    return (str(text), "bad") if isinstance(text, Bad) else text
