"""The command ``foresight``: whether simulations come true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.cli.shared import heed_sigterm, json_option, measuring, write
from migrator import ranges
from migrator.cli.shared import Number

if TYPE_CHECKING:
    from bench.parts import Part, Table
    from bench.simulate.foresight import Foreseen

_WHAT = {"rounds": 1.0, "sent_bytes": 1 << 20, "downtime_ms": 1.0}


def add_to(group: click.Group) -> None:
    """Add the command to a group."""
    group.add_command(foresight)


@click.command()
@click.option("--quick", is_flag=True, help="One guest, once: whether all is right.")
@click.option(
    "--runs", type=Number(ranges.RUNS), default=3, show_default=True, help="Of each; medians."
)
@json_option
def foresight(quick: bool, runs: int, file: Path | None) -> None:
    """Record guests, predict their migrations, move them, and compare.

    Over the loopback device at 100 MiB/s, which is known beforehand. What a switchover takes is
    measured before, by moving other guests of the same size. Needs root, and takes six minutes.
    """
    heed_sigterm()
    from bench import machine
    from bench.parts import to_markdown
    from bench.simulate import foresight as room
    from migrator.errors import MigratorError

    workloads = room.WORKLOADS[:1] if quick else room.WORKLOADS
    policies = room.POLICIES[:1] if quick else room.POLICIES
    runs = 1 if quick else runs
    try:
        with measuring(1 + len(workloads) * len(policies) * runs) as step:
            found = list(room.foresee(workloads, policies, runs, step))
    except (room.Broken, MigratorError, OSError) as error:
        raise click.ClickException(str(error)) from error
    about = machine.describe("qemu-system-x86_64")
    results = {"machine": about, "cases": list(map(asdict, found))}
    write(file, results)
    click.echo(to_markdown(parts(results)), nl=False)


def parts(results: dict[str, Any]) -> list[Part]:
    """The machine, and the table; of what ``--json`` writes."""
    from bench.simulate.foresight import Foreseen, Seen
    from bench.tables import head

    found = [
        Foreseen(
            case["workload"],
            case["policy"],
            *([Seen(**seen) for seen in case[which]] for which in ("predicted", "actual")),
        )
        for case in results["cases"]
    ]
    return [head(results["machine"]), table(found), "Predicted → was, and their ratio."]


def table(found: Sequence[Foreseen]) -> Table:
    """A table: of each the medians, predicted and actual, and whether that is close."""
    from statistics import median

    from bench.parts import Bad, Table

    rows = []
    for one in found:
        cells = [one.workload, one.policy]
        for what, unit in _WHAT.items():
            predicted, actual = (
                median(getattr(seen, what) for seen in all_) / unit
                for all_ in (one.predicted, one.actual)
            )
            cells += [f"{predicted:,.4g} → {actual:,.4g}", f"{one.ratio(what):.2f}"]
        missed = [what.split("_")[0] for what in _WHAT if not one.came_true(what)]
        missed = missed if one.same_end else ["whether it converges"]
        cells.append("yes" if not missed else Bad(f"not {', '.join(missed)}"))
        rows.append(cells)
    heads = ["workload", "policy", "rounds", "", "MiB sent", "", "downtime, ms", "", "within 20 %"]
    return Table("", heads, rows, left=2)
