"""The Markdown of our own tables, as parts of a page: paragraphs, lists, tables, bold cells."""

from __future__ import annotations

from collections.abc import Iterator

from migrator.report.page import html


def parts(markdown: str) -> Iterator[str]:
    """Each paragraph, list and table; a paragraph right before a table is its caption."""
    caption = ""
    for block in markdown.strip().split("\n\n"):
        lines = block.split("\n")
        if lines[0].startswith("| "):
            yield _table(lines, caption)
            caption = ""
            continue
        if caption:
            yield html.paragraph(caption)
            caption = ""
        if lines[0].startswith("- "):
            yield html.bullets(line.removeprefix("- ").replace("**", "") for line in lines)
        else:
            caption = " ".join(lines).replace("**", "")
    if caption:
        yield html.paragraph(caption)


def _table(lines: list[str], caption: str) -> str:
    heads, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    return html.table(heads, [[_cell(text) for text in row] for row in rows], caption)


def _cell(text: str) -> html.Cell:
    bold = text.startswith("**") and text.endswith("**")
    return (text.strip("*"), "bad") if bold else text
