"""The command ``simulate``: what migrations of a recorded guest would be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrator import ranges
from migrator.cli.shared import Number, SizeType, ThrottleType

if TYPE_CHECKING:
    from bench.simulate.replay import Replay

_RATE = re.compile(r"([0-9.]{1,32}) *(MiB/s|GiB/s|Mbit/s|Gbit/s)?")
_UNITS = {"MiB/s": float(1 << 20), "GiB/s": float(1 << 30), "Mbit/s": 125e3, "Gbit/s": 125e6}
_LINKS = ("1Gbit/s", "10Gbit/s", "25Gbit/s", "100Gbit/s")
_POLICIES = ("send-all", "defer-hot", "skip-unchanged", "adaptive")


def add_to(group: click.Group) -> None:
    """Add the command to a group."""
    group.add_command(simulate)


class _Rate(click.ParamType[float]):
    name = "rate"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        found = _RATE.fullmatch(str(value))
        try:
            rate = float(found[1]) * _UNITS[found[2] or "MiB/s"] if found else 0.0
        except ValueError:
            rate = 0.0
        if not rate > 0:
            self.fail(f"expected MiB/s, or a number with Gbit/s, not {value!r}", param, ctx)
        try:
            return ranges.BANDWIDTH_BYTES_PER_S.check(round(rate))
        except ValueError as error:
            self.fail(f"{error}, not {value!r}", param, ctx)


@click.command()
@click.argument("trace", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--link",
    "links",
    type=_Rate(),
    multiple=True,
    default=_LINKS,
    metavar="RATE",
    help="What the link carries of pages: MiB/s, or with GiB/s, Mbit/s, Gbit/s. May be given "
    "again.  [default: 1, 10, 25 and 100 Gbit/s]",
)
@click.option(
    "--policy",
    "policies",
    type=click.Choice(_POLICIES),
    multiple=True,
    default=_POLICIES,
    help="May be given again.  [default: all]",
)
@click.option(
    "--memory",
    type=SizeType(),
    metavar="SIZE",
    help="RAM of the guest; what was recorded is tiled.",
)
@click.option(
    "--scale-writes/--same-writes",
    default=True,
    show_default=True,
    help="More memory writes more, in proportion; or as much as was recorded, and the rest is "
    "data that is never written.",
)
@click.option(
    "--downtime-limit",
    type=Number(ranges.DOWNTIME_MS),
    default=100.0,
    show_default=True,
    metavar="MS",
    help="Switch over once the expected downtime is not above this.",
)
@click.option("--max-rounds", type=Number(ranges.ROUNDS), default=60, show_default=True)
@click.option(
    "--max-seconds",
    type=Number(ranges.MIGRATION_S),
    default=300.0,
    show_default=True,
    help="Give up after so long.",
)
@click.option(
    "--throttle",
    type=ThrottleType(),
    default="off",
    show_default=True,
    metavar="auto|off|MAX%",
    help="Where it would not converge, slow the guest: as if it did nothing but write.",
)
@click.option(
    "--like",
    "reports",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="REPORT.json",
    help="What migrator send --json said of a migration between the hosts that are meant: what its "
    "switchover and its rounds took beside sending. Given again: the medians.",
)
@click.option(
    "--json",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write all of it there.",
)
def simulate(
    trace: Path,
    links: tuple[float, ...],
    policies: tuple[Any, ...],
    memory: int | None,
    scale_writes: bool,
    downtime_limit: float,
    max_rounds: int,
    max_seconds: float,
    throttle: int,
    reports: tuple[Path, ...],
    file: Path | None,
) -> None:
    """Try out migrations of a guest that migrator record recorded.

    The rounds and the policies are those of a migration; the guest writes what was recorded, again
    and again, and the link takes as long as it has to. What was written is taken to have changed,
    so that skip-unchanged gains nothing here.

    With --memory, a guest of any size: so many of the recorded one side by side, at its pace.
    """
    from bench.parts import to_markdown
    from bench.simulate.costs import Costs, load
    from bench.simulate.planning import plan, table
    from bench.simulate.replay import Replay, describe
    from migrator.errors import TraceError
    from migrator.policy.judge import Limits
    from migrator.policy.throttling import Throttling
    from migrator.watch.trace import read

    try:
        recorded = read(trace)
        costs = Costs.of(*map(load, reports)) if reports else Costs()
        guest = Replay(recorded, memory, scale_writes=scale_writes)
    except (TraceError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    about = describe(recorded)
    click.echo(_told(about, guest), err=True)
    if not recorded.whole:
        click.echo("warning: the recording was cut off in its last record", err=True)
    limits = Limits(downtime_limit, max_rounds, max_seconds)
    costs = costs.at(sum(block.size for block in guest.blocks))
    found = list(plan(guest, links, policies, limits, costs, Throttling(throttle)))
    if file is not None:
        said = {"trace": about, "memory": memory, "plans": [p.to_json() for p in found]}
        file.write_text(json.dumps(said, indent=1) + "\n")
    click.echo(to_markdown([table(found)]), nl=False)


def _told(about: Any, guest: Replay) -> str:
    mib = float(1 << 20)
    size = sum(block.size for block in guest.blocks)
    return (
        f"recorded {about['seconds']:.1f} s of a guest of {about['guest_bytes'] / mib:,.0f} MiB, "
        f"{about['data_bytes'] / mib:,.0f} MiB of it data; it wrote "
        f"{about['working_set_bytes'] / mib:,.1f} MiB in all, "
        f"{about['written_bytes_per_s'] / mib:,.0f} MiB/s as of {about['records']} looks; "
        f"simulated with {size / mib:,.0f} MiB"
    )
