"""What the commands share: options, and how work that was asked for comes to its end."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from migrator import choices, ranges
from migrator.cli import command as cli_command
from migrator.cli import output
from migrator.cli import report as cli_report
from migrator.harmless import harmless, say

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from migrator.cli.display import Display
    from migrator.errors import MigratorError
    from migrator.ranges import Range
    from migrator.report.report import Progress, Report

    Begin = Callable[[Callable[[Progress], None]], Coroutine[Any, Any, Report]]


class Group(cli_command.Group):
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
                default=choices.DOWNTIME_LIMIT_MS,
                show_default=True,
                metavar="MS",
                help="Switch over once the expected downtime is not above this.",
            ),
            click.option(
                "--max-rounds",
                type=Number(ranges.ROUNDS),
                default=choices.MAX_ROUNDS,
                show_default=True,
                help="Give up after so many rounds.",
            ),
            click.option(
                "--max-seconds",
                type=Number(ranges.MIGRATION_S),
                default=choices.MAX_SECONDS,
                show_default=True,
                help="Give up after so long.",
            ),
            click.option(
                "--on-limit",
                type=click.Choice(choices.ON_LIMIT),
                default=choices.DEFAULT_ON_LIMIT,
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
                type=click.Choice(choices.TRACKERS),
                default=choices.DEFAULT_TRACKER,
                show_default=True,
                help="How CPU writes are noted: by the kernel (uffd), or by answering each fault "
                "(uffd-sync), which works from Linux 5.19 on. auto takes the first that works.",
            ),
            click.option(
                "--policy",
                type=click.Choice(choices.POLICIES),
                default=choices.DEFAULT_POLICY,
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

    from migrator.errors import MigratorError

    ending = output.Ending()
    try:
        cli_report.check(page)
        with output.impatient():
            report = asyncio.run(_migrated(begin, what, display, ending))
    except MigratorError as error:
        ended: MigratorError | None = error
        ending.decide(error.exit_code)
        ending.leave(lambda: _tell_failure(ended, what, display, as_json, page))
    except (asyncio.CancelledError, KeyboardInterrupt):
        ending.decide(1)
        ending.leave(lambda: _tell_interrupted(display, as_json))
    except Exception as error:  # noqa: BLE001 (a defect: nothing can be said of either side)
        _log.exception("unexpected")
        said = repr(error)
        ending.decide(4)
        ending.leave(lambda: _tell_unexpected(said, display, as_json))
    ending.leave(lambda: _tell_completed(report, what, display, as_json, page))


def _tell_completed(
    report: Report, what: str, display: Display, as_json: bool, page: Path | None
) -> None:
    from migrator.cli.display import summary

    display.__exit__()
    with _words_first():
        summary(report, display.console)
    if as_json:
        print(report.to_json(), flush=True)
    cli_report.write(page, report, what)


def _tell_failure(
    error: MigratorError | None, what: str, display: Display, as_json: bool, page: Path | None
) -> None:
    from migrator.errors import ConfigError, MigrationError

    display.__exit__()
    tell(error, as_json)
    if not isinstance(error, ConfigError):
        known = error.report if isinstance(error, MigrationError) else None
        cli_report.write(page, known, what)


def _tell_interrupted(display: Display, as_json: bool) -> None:
    display.__exit__()
    click.echo("interrupted", err=True)
    if as_json:
        print(json.dumps({"status": "aborted", "reason": "interrupted"}), flush=True)


def _tell_unexpected(said: str, display: Display, as_json: bool) -> None:
    display.__exit__()
    say(f"unexpected, a defect of this program: {said}; look at both VMs")
    if as_json:
        print(json.dumps({"status": "failed", "reason": said}), flush=True)


async def _migrated(begin: Begin, what: str, display: Display, ending: output.Ending) -> Report:
    """Migrate; the status is decided as soon as it is known."""
    import asyncio
    from contextlib import AsyncExitStack

    from migrator.aio import cancelled_by_signals
    from migrator.control.server import ControlSocket
    from migrator.errors import ControlError, MigratorError

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
            try:
                report = await task
            except MigratorError as error:
                ending.decide(error.exit_code)
                raise
            except asyncio.CancelledError:
                ending.decide(1)
                raise
            except Exception:
                ending.decide(4)
                raise
            ending.decide(0)
            return report


def fail(error: Any, as_json: bool, code: int | None = None) -> NoReturn:
    """Print why something failed, and exit with the code that stands for it.

    :param code: exit with this one instead
    """
    ending = output.Ending()
    ending.decide(error.exit_code if code is None else code)
    ending.leave(lambda: tell(error, as_json))


@contextlib.contextmanager
def _words_first() -> Iterator[None]:
    """Words for people must not be in the way of the object for programs."""
    try:
        yield
    except Exception:  # noqa: BLE001
        _log.exception("could not be printed")


def tell(error: Any, as_json: bool) -> None:
    """Print why something failed."""
    said: dict[str, Any] = {"status": "failed", "reason": str(error)}
    with _words_first():
        said = _tell_people(error, said)
    if as_json:
        print(json.dumps(said), flush=True)


def _tell_people(error: Any, said: dict[str, Any]) -> dict[str, Any]:
    from rich.console import Console

    from migrator.cli.display import findings, summary
    from migrator.errors import MigrationError, Refused, Undecided

    console = Console(stderr=True, highlight=False, emoji=False)
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
    return said
