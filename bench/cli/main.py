"""The command ``migrator-bench``: Markdown on stdout, words for people on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click  # everything slower is imported where it is used

from bench.cli import foresight as cli_foresight
from bench.cli import page as cli_page
from bench.cli import simulate as cli_simulate
from bench.cli.shared import heed_sigterm, json_option, measuring, runs_option, write
from bench.cli.strategies import strategies
from migrator import ranges
from migrator.cli import output
from migrator.cli.shared import Group, Number, SizeType
from migrator.harmless import harmless


class _Group(Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. It has failed if its results could not be printed."""
        done = super().invoke(ctx)
        if problem := output.unwritten():
            raise click.ClickException(problem)
        return done


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure the migrator. What arrives is always compared with what was sent."""


cli_foresight.add_to(main)
cli_simulate.add_to(main)


class _WholeMib(SizeType):
    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        size = super().convert(value, param, ctx)
        if size <= 0 or size % (1 << 20):
            self.fail("expected whole MiB", param, ctx)
        return size


@main.command()
@click.option("--quick", is_flag=True, help="A little of it, once: whether all is right.")
@json_option
@runs_option
@click.option(
    "--size", type=_WholeMib(), default="1G", show_default=True, help="Memory to be streamed."
)
@click.option(
    "--qemu", default="qemu-system-x86_64", show_default=True, help="The QEMU to migrate."
)
def stream(quick: bool, file: Path | None, runs: int, size: int, qemu: str) -> None:
    """Migrations between two hosts, beside bare loops and beside QEMU's own.

    Needs root: the hosts are two network namespaces, made for it and removed. First the stream of
    pages between two processes beside loops of send and receive, plain and with TLS; then whole
    migrations of a guest that writes, as fast as the link is and at 1 Gbit/s. All in turn, so that
    what else runs here disturbs all alike. Takes 15 minutes or more, and 4 GiB of /dev/shm.
    """
    heed_sigterm()
    from bench.hosts import twohosts
    from bench.stream import run as room

    extent = room.quick() if quick else room.whole(size, runs)
    if problem := twohosts.missing() or room.room_missing(extent):
        raise click.ClickException(problem)
    try:
        with measuring(extent.steps) as step:
            results = room.measure(extent, qemu, step)
    except room.ERRORS as error:
        raise click.ClickException(str(error)) from error
    write(file, results)
    _print(results)


class _WorkloadType(click.ParamType[str]):
    name = "name"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        from bench.versus.run import WORKLOADS

        if value not in WORKLOADS:
            self.fail(f"{value!r} is none of {', '.join(WORKLOADS)}", param, ctx)
        return str(value)


@main.command()
@click.option("--quick", is_flag=True, help="Two workloads, once: whether all is right.")
@json_option
@click.option(
    "--runs",
    type=Number(ranges.RUNS),
    help="Samples of each, and of what of QEMU's was the best in something.  [default: 3]",
)
@click.option(
    "--qemu",
    "qemus",
    multiple=True,
    default=["qemu-system-x86_64"],
    show_default=True,
    help="The QEMU to migrate, and to compare with; may be given again.",
)
@click.option(
    "--workload",
    "workloads",
    multiple=True,
    type=_WorkloadType(),
    help="What the guest does; may be given again. docs/benchmarks.md has the names.",
)
@cli_page.html_option
def versus(
    quick: bool,
    file: Path | None,
    runs: int | None,
    qemus: tuple[str, ...],
    workloads: tuple[str, ...],
    page: Path | None,
) -> None:
    """Our migration against QEMU's own, with the same guests, links and machine.

    Needs root: the hosts are two network namespaces, made for it and removed. Guests are moved from
    one QEMU to the next, on one host and between both, by the migrator and by QEMU with each of its
    settings, in turn. What arrives is looked at: what QEMU loses is told; if we lose anything, the
    exit code is 1. Takes about five minutes for each QEMU, and 1 GiB of /dev/shm.
    """
    heed_sigterm()
    from bench.versus import run as room
    from bench.versus.targets import broken_by_us

    extent = room.Extent(
        qemus,
        workloads or (room.QUICK if quick else room.DEFAULT),
        runs or (1 if quick else 3),
    )
    if problem := room.missing(extent):
        raise click.ClickException(problem)
    try:
        results = room.measure(extent, lambda text: click.echo(text, err=True))
    except room.ERRORS as error:
        raise click.ClickException(str(error)) from error
    write(file, results)
    _print(results)
    cli_page.write(page, results)
    if broken := broken_by_us(results["entries"]):
        raise click.ClickException("\n".join(["the migrator did not bring over:", *broken]))


@main.command()
@click.option("--quick", is_flag=True, help="A few cases, small: whether all is right.")
@json_option
@runs_option
def kernels(quick: bool, file: Path | None, runs: int) -> None:
    """The compiled loops over bitmaps and pages, beside numpy and the memory itself.

    Merging, counting, runs, rescaling, the test for zeros, digests: from 1 GiB to 1 TiB of guest,
    and from one page in ten thousand to nine in ten. Takes about five minutes, and 3 GiB.
    """
    from bench import machine
    from bench.kernels import run as room

    wanted = room.cases(quick=quick)
    try:
        with measuring(len(wanted)) as step:
            found = list(room.measure(wanted, runs, step))
    except room.Differs as error:
        raise click.ClickException(str(error)) from error
    results = {"kind": "kernels", "machine": machine.describe(""), "samples": found}
    write(file, results)
    _print(results)


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def show(file: Path) -> None:
    """Print the tables of an earlier run's --json FILE."""
    try:
        results = json.loads(file.read_text())
    except ValueError as error:
        raise click.ClickException(f"{file}: {error}") from error
    _print(results)


def _print(results: dict[str, Any]) -> None:
    from bench.parts import Part, to_markdown

    parts: Callable[[dict[str, Any]], list[Part]]
    if results.get("kind") == "strategies":
        from bench.strategies.tables import parts
    elif results.get("kind") == "kernels":
        from bench.kernels.tables import parts
    elif "versus" in results:
        from bench.versus.tables import parts
    elif "cases" in results:
        from bench.cli.foresight import parts
    elif "moves" in results:
        from bench.tables import parts
    else:
        raise click.ClickException("nothing is known of what was measured there")

    click.echo(harmless(to_markdown(parts(results)), newline="\n"), nl=False)


main.add_command(strategies)
main.add_command(cli_page.page)
