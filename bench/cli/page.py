"""``migrator-bench page``, and ``--html`` of those that measure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click  # everything slower is imported where it is used


def html_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--html``."""
    return click.option(
        "--html",
        "page",
        type=click.Path(path_type=Path),
        callback=_checked,
        metavar="FILE",
        help="Write a page with pictures there.",
    )(command)


def _checked(context: click.Context, option: click.Parameter, page: Path | None) -> Path | None:
    from migrator.cli.report import check
    from migrator.errors import ConfigError

    try:
        check(page, option.opts[0])
    except ConfigError as error:
        raise click.UsageError(str(error), context) from error
    return page


def write(page: Path | None, *results: dict[str, Any]) -> None:
    """Write a page, if one was asked for.

    :raise click.ClickException: it cannot be written
    """
    from bench.cli import results as room

    if page is None:
        return
    text = room.page(results)
    try:
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{page}: {error.strerror}") from error


@click.command()
@click.argument(
    "files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    nargs=-1,
    required=True,
    metavar="RESULTS.json...",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE.html",
    help="Where to write it.",
)
def page(files: Sequence[Path], output: Path) -> None:
    """Make one page, with pictures, of the --json FILEs of earlier runs: any, and several."""
    from bench.cli import results as room

    found = []
    for file in files:
        try:
            found.append(json.loads(file.read_text()))
            room.kind(found[-1])
        except (ValueError, AttributeError, room.UnknownResults) as error:
            raise click.ClickException(f"{file}: {error}") from error
    write(output, *found)
