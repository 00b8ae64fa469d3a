"""The command ``record``: what a VM writes, for migrations to be tried out on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator import ranges
from migrator.cli.command import Command
from migrator.cli.shared import Number, fail

if TYPE_CHECKING:
    from migrator.watch.record import Options, Recorded


def add_to(group: click.Group) -> None:
    """Add the command to a group."""
    group.add_command(record)


@click.command(cls=Command)
@click.option("--source", required=True, metavar="QMP", help="QMP socket of the running QEMU.")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="TRACE",
    help="The file to write; one that is there is replaced.",
)
@click.option(
    "--seconds",
    type=Number(ranges.WATCH_S),
    metavar="N",
    help="How long to record. Default: until Ctrl-C.",
)
@click.option(
    "--interval-ms",
    type=Number(ranges.INTERVAL_MS),
    default=50.0,
    show_default=True,
    metavar="M",
    help="How often to look at what was written.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def record(
    source: str, output: Path, seconds: float | None, interval_ms: float, as_json: bool
) -> None:
    """Record which pages a running VM writes, and when.

    Nothing is moved and nothing is changed: only writes are tracked, as in a migration, until the
    recording ends, however it does. What was recorded until then is good. RAM need not be a shared
    file. While it lasts, the VM cannot be migrated, or watched.

    migrator-bench simulate tries out on it what a migration would be, over any link.

    \b
    Members of the JSON object:
      seconds, records     how long it is, and of how many intervals
      written_bytes        in all intervals together
      longest_s            the longest interval
      file_bytes           size of the file
    If it fails, the object has status and reason instead.
    """
    from migrator.watch.record import Options

    _conclude(source, output, Options(seconds, interval_ms / 1000), as_json)


def _conclude(source: str, output: Path, options: Options, as_json: bool) -> None:
    """Record until it is over or interrupted. It may not return."""
    from migrator.aio import run
    from migrator.errors import MigratorError
    from migrator.watch.record import Recorded
    from migrator.watch.record import record as do_record

    last = Recorded()

    def show(so_far: Recorded) -> None:
        nonlocal last
        last = so_far
        click.echo(
            f"{so_far.seconds:.1f} s  {so_far.records:,} records  "
            f"{so_far.written_bytes / (1 << 20):,.1f} MiB written  "
            f"file {so_far.file_bytes / (1 << 20):,.2f} MiB",
            err=True,
        )

    try:
        run(do_record(source, output, options, show))
    except MigratorError as error:
        fail(error, as_json)
    except KeyboardInterrupt:
        click.echo("no longer recorded; the VM goes on", err=True)
    if as_json:
        print(json.dumps(last.to_json()), flush=True)
