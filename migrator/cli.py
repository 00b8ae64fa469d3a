"""The command ``migrator``: JSON on stdout, words for people on stderr."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click  # everything slower is imported where it is used, where Ctrl-C is click's to catch

if TYPE_CHECKING:
    from migrator.config import Config
    from migrator.display import Display
    from migrator.report import Report

EPILOG = """\b
Exit codes:
  0  done
  1  failed or aborted; the source still runs
  2  usage or configuration
  3  refused by preflight; nothing was changed
  4  cannot say which side may run, or neither does: what is known is printed
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.option("-v", "--verbose", count=True, help="Log to stderr; twice for every event of QEMU.")
@click.version_option(package_name="qemu-migrator")
def main(verbose: int) -> None:
    """Move running QEMU VMs, from outside QEMU, without losing a page."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logging.basicConfig(level=level, format="%(relativeCreated)8.0f ms %(name)s: %(message)s")
    # a lost connection reaches us as an exception
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout."
    )(command)


def _limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.option(
                "--downtime-limit",
                type=click.FloatRange(min=0, min_open=True),
                default=100.0,
                show_default=True,
                metavar="MS",
                help="Switch over once the expected downtime is not above this.",
            ),
            click.option(
                "--max-rounds",
                type=click.IntRange(min=1),
                default=60,
                show_default=True,
                help="Give up after so many rounds.",
            ),
            click.option(
                "--max-seconds",
                type=click.FloatRange(min=0, min_open=True),
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
        ]
    ):
        command = option(command)
    return command


def _memory_only_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--memory-only",
        is_flag=True,
        help="Rehearse: move and compare RAM, hand nothing over, let the source go on.",
    )(command)


class _SizeType(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        from migrator.config import parse_size

        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@main.command()
@click.option("--memory", type=_SizeType(), default="1G", show_default=True, help="Guest RAM.")
@click.option(
    "--working-set",
    type=_SizeType(),
    default="64M",
    show_default=True,
    help="How much of it the guest writes, over and over.",
)
@click.option(
    "--write-rate",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="PAGES/S",
    help="How fast it writes; 0 is as fast as it can.",
)
@click.option(
    "--qemu", default="qemu-system-x86_64", show_default=True, help="The QEMU to run, twice."
)
@click.option(
    "--accel",
    type=click.Choice(["auto", "kvm", "tcg"]),
    default="auto",
    show_default=True,
    help="auto takes KVM where a guest really runs under it.",
)
@_limit_options
@_json_option
def demo(
    memory: int,
    working_set: int,
    write_rate: int,
    qemu: str,
    accel: str,
    downtime_limit: float,
    max_rounds: int,
    max_seconds: float,
    on_limit: str,
    as_json: bool,
) -> None:
    """Start two QEMUs, let a guest write, and move it while it writes.

    Always compares all of the guest's RAM on both sides, and checks that the guest's heartbeat goes
    on where it stopped. Nothing is left behind.
    """
    from migrator.config import Config
    from migrator.guest import Workload, guest_args

    try:
        Workload(working_set_bytes=working_set).check_fits(memory, "q35")
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    command = [
        *[qemu, "-accel", "{accel}", "-machine", "q35,memory-backend=ram", "-m", f"{memory}B"],
        *["-object", f"memory-backend-file,id=ram,size={memory}B,share=on,mem-path=/dev/shm"],
        *["-serial", "file:{console}", *guest_args("{guest}")],
    ]
    config = Config.model_validate(
        {
            "accel": accel,
            "guest": {"working_set": working_set, "pages_per_s": write_rate},
            "source": {"command": command},
            "destination": {"command": command},
            "migration": {
                "downtime_limit_ms": downtime_limit,
                "max_rounds": max_rounds,
                "max_seconds": max_seconds,
                "on_limit": on_limit,
                "verify": True,
            },
        }
    )
    _run_config(config, Path.cwd(), as_json)


@main.command()
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--verify", is_flag=True, help="Compare all RAM, whatever the file says.")
@_memory_only_option
@_json_option
def run(config: Path, verify: bool, memory_only: bool, as_json: bool) -> None:
    """Migrate as a YAML file says: start its command lines, or attach to its sockets.

    configs/demo.yaml explains every key.
    """
    from migrator.config import load
    from migrator.errors import ConfigError

    try:
        wanted = load(config)
    except ConfigError as error:
        _fail(error, as_json)
    said = {"verify": verify, "memory_only": memory_only}
    if overrides := {key: True for key, asked in said.items() if asked}:
        migration = wanted.migration.model_copy(update=overrides)
        wanted = wanted.model_copy(update={"migration": migration})
    _run_config(wanted, config.resolve().parent, as_json)


@main.command()
@click.option("--source", required=True, metavar="QMP", help="QMP socket of the running QEMU.")
@click.option(
    "--destination",
    required=True,
    metavar="QMP",
    help="QMP socket of a QEMU with the same command line, RAM files of its own, and "
    "-incoming defer.",
)
@click.option("--verify", is_flag=True, help="Compare all RAM before the destination runs.")
@_memory_only_option
@_limit_options
@_json_option
def migrate(
    source: str,
    destination: str,
    verify: bool,
    memory_only: bool,
    downtime_limit: float,
    max_rounds: int,
    max_seconds: float,
    on_limit: str,
    as_json: bool,
) -> None:
    """Move the VM of one running QEMU into another that waits, on this host.

    Both may have been started by anybody: their processes, RAM and files are found by the sockets.
    The source is left stopped (QEMU's state "postmigrate") for you to end.
    """
    from migrator.display import Display
    from migrator.orchestrator import Options
    from migrator.orchestrator import migrate as do_migrate
    from migrator.policy import Limits

    options = Options(
        limits=Limits(downtime_limit, max_rounds, max_seconds, on_limit),  # type: ignore[arg-type]
        verify=verify,
        memory_only=memory_only,
    )
    with Display() as display:
        _conclude(do_migrate(source, destination, options, watch=display.show), display, as_json)


@main.command()
@click.option("--qemu", default="qemu-system-x86_64", show_default=True, help="The QEMU to try.")
@click.option(
    "--pins", is_flag=True, help="Try what this kernel does with pinned pages instead; no QEMU."
)
@_json_option
def doctor(qemu: str, pins: bool, as_json: bool) -> None:
    """Check whether this host is able to: each check passed, or with its mend.

    With --pins: a table of what pins and write-protection owe each other, made by trying it on
    every kind of memory. It exits with 1 if something that migrations rely on does not hold.
    """
    import asyncio

    # as Ctrl-C, which leaves nothing behind
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if pins:
        _pins(as_json)
    from migrator import doctor as room

    checks = asyncio.run(room.examine(qemu))
    room.show(checks)
    if as_json:
        print(json.dumps(room.as_json(checks)))
    sys.exit(0 if room.able(checks) else 1)


def _pins(as_json: bool) -> NoReturn:
    from migrator import pins as room

    experiments = room.try_pins()
    room.show(experiments)
    if as_json:
        print(json.dumps(room.as_json(experiments)))
    sys.exit(1 if room.trouble(experiments) else 0)


def _run_config(config: Config, here: Path, as_json: bool) -> None:
    from migrator.display import Display
    from migrator.runner import run as do_run

    with Display() as display:
        work = do_run(config, here=here, say=display.say, watch=display.show)
        _conclude(work, display, as_json)


def _conclude(work: Coroutine[Any, Any, Report], display: Display, as_json: bool) -> None:
    import asyncio

    from migrator.display import summary
    from migrator.errors import MigratorError

    try:
        report = asyncio.run(_interruptible(work))
    except MigratorError as error:
        display.__exit__()
        _fail(error, as_json)
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


async def _interruptible(work: Coroutine[Any, Any, Report]) -> Report:
    import asyncio

    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        return await task
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _fail(error: Any, as_json: bool) -> NoReturn:
    from rich.console import Console

    from migrator.display import findings, summary
    from migrator.errors import MigrationError, Refused, Undecided

    console = Console(stderr=True, highlight=False)
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
                console.print(f"  - {sentence}", markup=False)
        said = json.loads(error.report.to_json())
    else:
        console.print("[bold red]error[/]: ", end="")
        console.print(str(error), markup=False)
    if as_json:
        print(json.dumps(said), flush=True)
    sys.exit(error.exit_code)
