"""``migrator-bench strategies``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click  # everything slower is imported where it is used

from bench.cli import page as cli_page
from bench.cli.shared import heed_sigterm
from migrator.harmless import harmless

if TYPE_CHECKING:
    from bench.strategies.suite import Suite, Task


@click.command()
@click.argument("suite", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--json",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write every sample there, after each cell; cells that are there are not measured again.",
)
@cli_page.html_option
def strategies(suite: Path, file: Path | None, page: Path | None) -> None:
    """Every way to track writes on every guest of SUITE: is it complete, and what does it cost?

    Each cell is a VM of its own, whose RAM is compared, byte by byte, with a copy from before: a
    page that changed and was not reported fails the cell, and the command. Needs root. Interrupted,
    it goes on where it was, given the same FILE.
    """
    heed_sigterm()
    from bench.guests.guests import GuestError
    from bench.parts import to_markdown
    from bench.strategies import run as room
    from bench.strategies.suite import load
    from bench.strategies.tables import parts
    from migrator.errors import ConfigError

    try:
        wanted = load(suite)
        results = room.resume(file, wanted.qemu)
    except (ConfigError, room.OtherResults) as error:
        raise click.UsageError(str(error)) from error
    try:
        _measure(wanted, results, file)
    except GuestError as error:
        raise click.ClickException(str(error)) from error
    click.echo(to_markdown(parts(results)), nl=False)
    cli_page.write(page, results)
    if broken := room.failed(results["cells"]):
        click.secho(f"{len(broken)} cells failed", fg="red", err=True)
        sys.exit(1)


def _measure(wanted: Suite, results: dict[str, Any], file: Path | None) -> None:
    from bench.strategies import run as room

    tasks = room.left(wanted, results)
    if done := len(wanted.tasks()) - len(tasks):
        click.echo(f"{done} cells are in {file} already", err=True)
    with click.progressbar(
        length=len(tasks),
        label="measuring",
        file=sys.stderr,
        item_show_func=lambda text: text or "",
    ) as bar:

        def step(task: Task) -> None:
            bar.update(0, str(task))
            if not sys.stderr.isatty():  # where there is no bar
                click.echo(str(task), err=True)

        for cell in room.run(wanted, results, file, step):
            bar.update(1)
            if cell["state"] == "failed":
                what = f"{cell['strategy']}, {cell['workload']}: {cell['reason']}"
                click.secho(f"\n{harmless(what)}", fg="red", err=True)
