"""The parts of a page, as text. Whatever is given is escaped, but for what was made here."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from migrator.harmless import harmless

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.45 system-ui, sans-serif; }
body { max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; }
.about { margin-top: .3rem; opacity: .75; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0; }
caption { text-align: left; padding-bottom: .3rem; font-weight: 600; }
th, td { padding: .15rem .8rem .15rem 0; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1px solid; font-weight: 600; }
.facts td, .facts th { text-align: left; font-weight: normal; }
.facts th { opacity: .75; padding-right: 1.5rem; white-space: nowrap; }
.good::before { content: "✓ "; }
.bad { font-weight: 700; color: #d55e00; }
.bad::before { content: "✗ "; }
figure { margin: 1rem 0; break-inside: avoid; }
figure img { width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { opacity: .85; font-size: .92rem; }
@media print { body { margin: 0; max-width: none; font-size: 11pt; } h2 { break-after: avoid; } }
"""

Cell = str | tuple[str, str]
"""What stands in a table: a text, or one with a mark as :func:`paragraph` takes."""


def document(title: str, about: str, parts: Iterable[str]) -> str:
    """A whole page.

    :param about: a line below the title
    :param parts: what the other functions made
    """
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{_escaped(title)}</h1>\n<p class="about">{_escaped(about)}</p>\n'
        f"{body}\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """The heading of a section."""
    return f"<h{level}>{_escaped(text)}</h{level}>"


def paragraph(text: str, mark: str = "") -> str:
    """A paragraph.

    :param mark: ``good``, ``bad``, or nothing
    """
    return f"<p{_class(mark)}>{_escaped(text)}</p>"


def bullets(items: Iterable[str]) -> str:
    """A list."""
    return f"<ul>{''.join(f'<li>{_escaped(item)}</li>' for item in items)}</ul>"


def facts(rows: Iterable[tuple[str, str, str]]) -> str:
    """A table of names and what is to be said of each, with a mark as :func:`paragraph` takes."""
    lines = "\n".join(
        f'<tr><th scope="row">{_escaped(name)}</th><td{_class(mark)}>{_escaped(text)}</td></tr>'
        for name, text, mark in rows
    )
    return f'<table class="facts">\n{lines}\n</table>'


def table(heads: Sequence[str], rows: Iterable[Sequence[Cell]], caption: str = "") -> str:
    """A table of numbers; the first column is of words. Short rows are filled up."""
    titled = f"<caption>{_escaped(caption)}</caption>" if caption else ""
    head = "".join(f'<th scope="col">{_escaped(text)}</th>' for text in heads)
    body = "\n".join(
        "<tr>" + "".join(_td(cell) for cell in [*row, *[""] * (len(heads) - len(row))]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table>{titled}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def picture(svg: bytes, alt: str, caption: str) -> str:
    """A figure.

    As an image of its own, and not as elements of the page: so its identifiers are its own too.

    :param alt: what it shows, for those who do not see it
    """
    data = base64.b64encode(svg).decode()
    return (
        f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{_escaped(alt)}">'
        f"<figcaption>{_escaped(caption)}</figcaption></figure>"
    )


def _escaped(text: str) -> str:
    return html.escape(harmless(text, newline="\n"))


def _td(cell: Cell) -> str:
    text, mark = (cell, "") if isinstance(cell, str) else cell
    return f"<td{_class(mark)}>{_escaped(text)}</td>"


def _class(mark: str) -> str:
    return f' class="{mark}"' if mark else ""
