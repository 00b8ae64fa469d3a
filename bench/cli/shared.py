"""What the commands of ``migrator-bench`` share: options, progress, where results go."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from migrator import ranges
from migrator.cli.shared import Number

json_option = click.option(
    "--json",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write every sample there.",
)

runs_option = click.option(
    "--runs", type=Number(ranges.RUNS), default=5, show_default=True, help="Samples of each."
)


def heed_sigterm() -> None:
    """End as with Ctrl-C, which leaves nothing behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def measuring(steps: int) -> Iterator[Callable[[str], None]]:
    """Show on stderr how far it is.

    :param steps: how many there are
    :return: what is to be called with the name of each that begins
    """
    with click.progressbar(
        length=steps, label="measuring", file=sys.stderr, item_show_func=lambda text: text or ""
    ) as bar:

        def step(text: str) -> None:
            bar.update(1, text)
            if not sys.stderr.isatty():  # where there is no bar
                click.echo(text, err=True)

        yield step


def write(file: Path | None, results: dict[str, Any]) -> None:
    """Write results as JSON, if that was asked for."""
    if file is not None:
        file.write_text(json.dumps(results, indent=1) + "\n")
