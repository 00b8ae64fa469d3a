"""``--report FILE.html``: a page about one migration, written when it is over."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrator.harmless import say

if TYPE_CHECKING:
    from migrator.report.report import Report


def report_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--report``."""
    return click.option(
        "--report",
        "page",
        type=click.Path(path_type=Path),
        metavar="FILE.html",
        help="Write a page with pictures there, however the migration ends.",
    )(command)


def check(page: Path | None, option: str = "--report") -> None:
    """Check that a page can be written, before anything is begun.

    :param option: where it was asked for
    :raise ConfigError: it cannot
    """
    from migrator.errors import ConfigError

    if page is None:
        return
    new = not page.exists()
    try:
        os.close(os.open(page, os.O_WRONLY | os.O_CREAT, 0o666))
        if new:
            page.unlink()
    except OSError as error:
        raise ConfigError(f"{page}: cannot be written: {error.strerror}", key=option) from error


def write(page: Path | None, report: Report | None, what: str) -> None:
    """Write a page. If it cannot be, that is said, and nothing else comes of it.

    :param report: of a migration, if there was one
    """
    if page is None:
        return
    if report is None:
        say(f"{page} is not written: no migration was begun")
        return
    try:
        from migrator.report.page import migration

        page.write_text(migration.page(report, what), encoding="utf-8")
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (it has moved, or has not)
        said = str(error) or type(error).__name__
        say(f"warning: {page} could not be written: {said}")
