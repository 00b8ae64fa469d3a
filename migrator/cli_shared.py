"""What the commands share: options, and how work that was asked for comes to its end."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from migrator import cli_report, ranges
from migrator.harmless import harmless

if TYPE_CHECKING:
    from migrator.display import Display
    from migrator.ranges import Range
    from migrator.report import Progress, Report

    Begin = Callable[[Callable[[Progress], None]], Coroutine[Any, Any, Report]]


class Group(click.Group):
    """A group of commands; what is wrong with their arguments or files is printed harmlessly."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; lines of an error after its first are indented."""
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            vars(error)["message"] = harmless(error.message, newline="\n  ")  # typed as final
            raise


class Number(click.FloatRange):
    """A finite number in a range; a whole one, as ``int``, where the range says so."""

    def __init__(self, numbers: Range) -> None:
        super().__init__(numbers.least, numbers.most)
        self.name = f"{'integer' if numbers.whole else 'float'} range"
        self.numbers = numbers

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """See :meth:`migrator.ranges.Range.parse`."""
        try:
            return self.numbers.parse(value)
        except ValueError as error:
            self.fail(f"{error}, not {value!r}", param, ctx)


class SizeType(click.ParamType[int]):
    """``64M``, as bytes."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """See :func:`migrator.config.parse_size`."""
        from migrator.config import parse_size

        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ThrottleType(click.ParamType[int]):
    """``auto``, ``off`` or ``MAX%``, as percent."""

    name = "throttle"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """See :func:`migrator.config.parse_throttle`."""
        from migrator.config import parse_throttle

        try:
            return parse_throttle(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--json``."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout."
    )(command)


_LIMITS = {
    "downtime_limit": "downtime_limit_ms",
    "max_standstill": "max_standstill_s",
    **{name: name for name in ("max_rounds", "max_seconds", "on_limit")},
    **{name: name for name in ("tracker", "policy", "throttle")},
}


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """When to switch over, when to give up, and how writes are tracked.

    The command gets them as one argument, ``limits``: fields of
    :class:`migrator.config.MigrationConfig`.
    """

    @functools.wraps(command)
    def with_limits(**given: Any) -> None:
        limits = {field: given.pop(name) for name, field in _LIMITS.items()}
        command(limits=limits, **given)

    wrapped: Callable[..., Any] = with_limits
    for option in reversed(
        [
            click.option(
                "--downtime-limit",
                type=Number(ranges.DOWNTIME_MS),
                default=100.0,
                show_default=True,
                metavar="MS",
                help="Switch over once the expected downtime is not above this.",
            ),
            click.option(
                "--max-rounds",
                type=Number(ranges.ROUNDS),
                default=60,
                show_default=True,
                help="Give up after so many rounds.",
            ),
            click.option(
                "--max-seconds",
                type=Number(ranges.MIGRATION_S),
                default=300.0,
                show_default=True,
                help="Give up after so long.",
            ),
            click.option(
                "--on-limit",
                type=click.Choice(["abort", "force"]),
                default="abort",
                show_default=True,
                help="What giving up means: leave the VM where it is, or accept the downtime.",
            ),
            click.option(
                "--max-standstill",
                type=Number(ranges.STANDSTILL_S),
                metavar="SECONDS",
                help="The most that the guest may stand, comparing included; after that it goes on "
                "at the source. Default: ten times the downtime limit, three times the expected "
                "downtime, or 10 s, the largest; where RAM is compared, 10 s for each GB more.",
            ),
            click.option(
                "--tracker",
                type=click.Choice(["auto", "uffd", "uffd-sync"]),
                default="auto",
                show_default=True,
                help="How CPU writes are noted: by the kernel (uffd), or by answering each fault "
                "(uffd-sync), which works from Linux 5.19 on. auto takes the first that works.",
            ),
            click.option(
                "--policy",
                type=click.Choice(["send-all", "defer-hot", "skip-unchanged", "adaptive"]),
                default="adaptive",
                show_default=True,
                help="What is sent before the end: all that is dirty; not what is written again "
                "and again; not what is at the destination already (to another host by digests, "
                "which a guest might fool); or what pays, switching over where the rest stops "
                "falling.",
            ),
            click.option(
                "--throttle",
                type=ThrottleType(),
                default="off",
                show_default=True,
                metavar="auto|off|MAX%",
                help="Where it would not converge, slow the guest's writers, and nobody else: a "
                "writer waits for up to this part of its time (auto: 99 %).",
            ),
        ]
    ):
        wrapped = option(wrapped)
    return wrapped


def memory_only_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--memory-only``."""
    return click.option(
        "--memory-only",
        is_flag=True,
        help="Rehearse: move and compare RAM, hand nothing over, let the source go on.",
    )(command)


def conclude(
    begin: Begin, what: str, display: Display, as_json: bool, page: Path | None = None
) -> None:
    """Migrate, until it is done or interrupted; print what came of it. It may not return.

    :param page: a file for it, too
    """
    import asyncio

    from migrator.display import summary
    from migrator.errors import ConfigError, MigrationError, MigratorError

    try:
        cli_report.check(page)
        report = asyncio.run(_interruptible(begin, what, display))
    except MigratorError as error:
        display.__exit__()
        with contextlib.ExitStack() as at_last:
            if not isinstance(error, ConfigError):
                known = error.report if isinstance(error, MigrationError) else None
                at_last.callback(cli_report.write, page, known, what)
            fail(error, as_json)
    except asyncio.CancelledError:
        display.__exit__()
        click.echo("interrupted", err=True)
        if as_json:
            print(json.dumps({"status": "aborted", "reason": "interrupted"}))
        sys.exit(1)
    display.__exit__()
    summary(report, display.console)
    if as_json:
        print(report.to_json(), flush=True)
    cli_report.write(page, report, what)


async def _interruptible(begin: Begin, what: str, display: Display) -> Report:
    import asyncio
    from contextlib import AsyncExitStack

    from migrator.control import ControlSocket
    from migrator.errors import ControlError
    from migrator.settle import cancelled_by_signals

    def watch(progress: Progress) -> None:
        display.show(progress)
        control.show(progress)

    task = asyncio.ensure_future(begin(watch))
    control = ControlSocket(what, task.cancel)
    with cancelled_by_signals(task):
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(control)
            except ControlError as error:
                display.say(f"warning: neither status nor cancel will find this: {error}")
            return await task


def fail(error: Any, as_json: bool) -> NoReturn:
    """Print why something failed, and exit with the code that stands for it."""
    from rich.console import Console

    from migrator.display import findings, summary
    from migrator.errors import MigrationError, Refused, Undecided

    console = Console(stderr=True, highlight=False, emoji=False)
    said: dict[str, Any] = {"status": "failed", "reason": str(error)}
    if isinstance(error, Refused):
        findings(error.findings, console)
        said["status"] = "aborted"
        said["findings"] = [vars(finding) for finding in error.findings]
    elif isinstance(error, MigrationError) and error.report is not None:
        summary(error.report, console)
        if isinstance(error, Undecided):
            console.print("[bold red]look at both VMs[/]; this is known:")
            for sentence in error.known:
                console.print(harmless(f"  - {sentence}"), markup=False)
        said = json.loads(error.report.to_json())
    else:
        console.print("[bold red]error[/]: ", end="")
        console.print(harmless(str(error)), markup=False)
    if as_json:
        print(json.dumps(said), flush=True)
    sys.exit(error.exit_code)
