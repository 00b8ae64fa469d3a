"""The command ``migrator``: JSON on stdout, words for people on stderr."""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click  # everything slower is imported where it is used, where Ctrl-C is click's to catch

from migrator import choices, ranges
from migrator.cli import control as cli_control
from migrator.cli import hosts as cli_hosts
from migrator.cli import record as cli_record
from migrator.cli import watch as cli_watch
from migrator.cli.command import MigratingCommand
from migrator.cli.keys import keys
from migrator.cli.report import report_option
from migrator.cli.shared import (
    Group,
    Number,
    SizeType,
    conclude,
    fail,
    json_option,
    limit_options,
    memory_only_option,
)
from migrator.harmless import Formatter

if TYPE_CHECKING:
    from migrator.config import Config

EPILOG = """\b
Exit codes:
  0  done
  1  failed or aborted; the source still runs, or stands as another client left it
  2  usage or configuration
  3  refused by preflight; nothing was changed
  4  cannot say which side may run, or neither does: what is known is printed
  5  the guest ended while it was moved; neither side has it
  6  the source cannot be reached; nothing was begun, and nothing is known of it
"""


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.option("-v", "--verbose", count=True, help="Log to stderr; twice for every event of QEMU.")
@click.version_option(package_name="qemu-migrator")
def main(verbose: int) -> None:
    """Move running QEMU VMs, from outside QEMU, without losing a page."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(relativeCreated)8.0f ms %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    # a lost connection reaches us as an exception
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)


main.add_command(keys)
cli_control.add_to(main)
cli_hosts.add_to(main)
cli_record.add_to(main)
cli_watch.add_to(main)


@main.command(cls=MigratingCommand)
@click.option("--memory", type=SizeType(), default="1G", show_default=True, help="Guest RAM.")
@click.option(
    "--working-set",
    type=SizeType(),
    default="64M",
    show_default=True,
    help="How much of it the guest writes, over and over.",
)
@click.option(
    "--write-rate",
    type=Number(ranges.PAGES_PER_S),
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
    type=click.Choice(choices.ACCELS),
    default=choices.DEFAULT_ACCEL,
    show_default=True,
    help="auto takes KVM where a guest really runs under it.",
)
@limit_options
@report_option
@json_option
def demo(
    memory: int,
    working_set: int,
    write_rate: int,
    qemu: str,
    accel: str,
    limits: dict[str, Any],
    page: Path | None,
    as_json: bool,
) -> None:
    """Start two QEMUs, let a guest write, and move it while it writes.

    Always compares all of the guest's RAM on both sides, and checks that the guest's heartbeat goes
    on where it stopped. Nothing is left behind.
    """
    from migrator.config import Config
    from migrator.guest.workload import Workload, guest_args

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
            "migration": {"verify": True, **limits},
        }
    )
    _run_config(config, "demo", Path.cwd(), as_json, page)


@main.command(cls=MigratingCommand)
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--verify", is_flag=True, help="Compare all RAM, whatever the file says.")
@memory_only_option
@report_option
@json_option
def run(config: Path, verify: bool, memory_only: bool, page: Path | None, as_json: bool) -> None:
    """Migrate as a YAML file says: start its command lines, or attach to its sockets.

    configs/demo.yaml explains every key.
    """
    from migrator.config import load
    from migrator.errors import ConfigError

    try:
        wanted = load(config)
    except ConfigError as error:
        fail(error, as_json)
    said = {"verify": verify, "memory_only": memory_only}
    if overrides := {key: True for key, asked in said.items() if asked}:
        migration = wanted.migration.model_copy(update=overrides)
        wanted = wanted.model_copy(update={"migration": migration})
    _run_config(wanted, str(config), config.resolve().parent, as_json, page)


@main.command(cls=MigratingCommand)
@click.option("--source", required=True, metavar="QMP", help="QMP socket of the running QEMU.")
@click.option(
    "--destination",
    required=True,
    metavar="QMP",
    help="QMP socket of a QEMU with the same command line, RAM files of its own, and "
    "-incoming defer.",
)
@click.option("--verify", is_flag=True, help="Compare all RAM before the destination runs.")
@memory_only_option
@limit_options
@report_option
@json_option
def migrate(
    source: str,
    destination: str,
    verify: bool,
    memory_only: bool,
    limits: dict[str, Any],
    page: Path | None,
    as_json: bool,
) -> None:
    """Move the VM of one running QEMU into another that waits, on this host.

    Both may have been started by anybody: their processes, RAM and files are found by the sockets.
    The source is left stopped (QEMU's state "postmigrate") for you to end.
    """
    from migrator.cli.display import Display
    from migrator.config import MigrationConfig
    from migrator.migration.orchestrator import migrate as do_migrate
    from migrator.scenario import options_of

    chosen = MigrationConfig(verify=verify, memory_only=memory_only, **limits)
    options = options_of(chosen, dirty_map=page is not None)
    with Display() as display:
        conclude(
            lambda watch: do_migrate(source, destination, options, watch=watch),
            what=f"{source} → {destination}",
            display=display,
            as_json=as_json,
            page=page,
        )


@main.command()
@click.option("--qemu", default="qemu-system-x86_64", show_default=True, help="The QEMU to try.")
@click.option(
    "--pins", is_flag=True, help="Try what this kernel does with pinned pages instead; no QEMU."
)
@json_option
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
    from migrator.doctor.check import able, show
    from migrator.doctor.check import as_json as checks_as_json
    from migrator.doctor.examine import examine

    checks = asyncio.run(examine(qemu))
    show(checks)
    if as_json:
        print(json.dumps(checks_as_json(checks)))
    sys.exit(0 if able(checks) else 1)


def _pins(as_json: bool) -> NoReturn:
    from migrator.doctor import pins as room

    experiments = room.try_pins()
    room.show(experiments)
    if as_json:
        print(json.dumps(room.as_json(experiments)))
    sys.exit(1 if room.trouble(experiments) else 0)


def _run_config(config: Config, what: str, here: Path, as_json: bool, page: Path | None) -> None:
    from migrator.cli.display import Display
    from migrator.scenario import run as do_run

    with Display() as display:
        conclude(
            lambda watch: do_run(
                config, here=here, say=display.say, watch=watch, dirty_map=page is not None
            ),
            what=what,
            display=display,
            as_json=as_json,
            page=page,
        )
