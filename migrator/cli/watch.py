"""The command ``watch``: the tracker alone, on a VM that goes on."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from migrator import choices, ranges
from migrator.cli import output
from migrator.cli.command import Command
from migrator.cli.shared import Number, fail

if TYPE_CHECKING:
    from migrator.watch.sample import Sight
    from migrator.watch.watch import Options


def add_to(group: click.Group) -> None:
    """Add the command to a group."""
    group.add_command(watch)


@click.command(cls=Command)
@click.option("--source", required=True, metavar="QMP", help="QMP socket of the running QEMU.")
@click.option(
    "--seconds",
    type=Number(ranges.WATCH_S),
    metavar="N",
    help="How long to watch. Default: until Ctrl-C.",
)
@click.option(
    "--interval",
    type=Number(ranges.INTERVAL_S),
    default=1.0,
    show_default=True,
    metavar="S",
    help="How often to tell.",
)
@click.option(
    "--bandwidth",
    type=Number(ranges.BANDWIDTH_MIB_PER_S),
    default=1000.0,
    show_default=True,
    metavar="MiB/s",
    help="How fast pages would be sent in a migration.",
)
@click.option(
    "--downtime-limit",
    type=Number(ranges.DOWNTIME_MS),
    default=choices.DOWNTIME_LIMIT_MS,
    show_default=True,
    metavar="MS",
    help="How long the VM might stand still.",
)
@click.option(
    "--strategy",
    type=click.Choice(choices.STRATEGIES),
    default=choices.DEFAULT_TRACKER,
    show_default=True,
    help="How writes are noticed.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object each interval on stdout.",
)
def watch(
    source: str,
    seconds: float | None,
    interval: float,
    bandwidth: float,
    downtime_limit: float,
    strategy: str,
    as_json: bool,
) -> None:
    """Show how much a running VM writes, where, and what moving it would take.

    Nothing is moved and nothing is changed: only writes are tracked, as in a migration, until the
    watch ends, however it does. RAM need not be a shared file. While it lasts, the VM cannot be
    migrated, or watched a second time.

    \b
    Strategies:
      auto          uffd, or uffd-sync on a kernel where that does not work
      uffd          write-protection, asynchronous (Linux 6.7): page by page
      uffd-sync     write-protection whose faults are answered (5.19): chunks of 64 KiB
      soft-dirty    bits in the page tables (CONFIG_MEM_SOFT_DIRTY); QEMU stands still
                    while they are read
      content-hash  all memory is read each time: what changed, whoever changed it
      coarse        uffd-sync, and of its chunks the pages that changed
    All but uffd need RAM that is a shared file.

    \b
    Members of each JSON object:
      at_s, over_s         end of the interval since the beginning, and its length
      state                QEMU's run state
      tracker              which strategy notes the CPU's writes
      notes                what cannot be seen or moved
      dirty_pages_per_s    by source
      dirty_bytes_per_s    by all exact sources together
      working_set_bytes    distinct pages written in the last "1", "10", "60" seconds,
                           or null
      blocks               name, bytes, page_size, file, data_bytes, heat: 64 ranges,
                           each 0 (never written) to 1 (all of it, all the time)
      forecast             bytes_per_s, downtime_limit_ms, converges, rounds, total_s,
                           downtime_ms, sent_bytes, reason
    If it fails, the last line has status and reason instead.
    """
    from migrator.policy.judge import Limits
    from migrator.watch.watch import Options

    limits = Limits(downtime_limit)
    options = Options(seconds, interval, bandwidth * (1 << 20), limits, strategy)
    _conclude(source, options, as_json)


def _conclude(source: str, options: Options, as_json: bool) -> None:
    """Watch until it is over or interrupted. It may not return."""
    from migrator.aio import run
    from migrator.errors import MigratorError
    from migrator.watch.view import View
    from migrator.watch.watch import watch as do_watch

    with View() as view:

        def show(sight: Sight) -> None:
            view.show(sight)
            if as_json:
                print(json.dumps(sight.to_json()), flush=True)
            if output.reader_is_gone(sys.stdout if as_json else sys.stderr):
                raise BrokenPipeError

        try:
            run(do_watch(source, options, show))
        except MigratorError as error:
            view.__exit__()
            fail(error, as_json)
        except KeyboardInterrupt:
            view.__exit__()
            click.echo("no longer watched; the VM goes on", err=True)
        except BrokenPipeError:  # as of "| head": no need to say more
            view.__exit__()
            if problem := output.unwritten():
                raise click.ClickException(problem) from None
