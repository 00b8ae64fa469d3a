"""The commands for two hosts: ``receive``, ``send``, and ``resolve`` where they lost each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrator import choices, ranges
from migrator.cli import output
from migrator.cli.command import DecidingCommand, MigratingCommand
from migrator.cli.report import report_option
from migrator.cli.shared import (
    Number,
    conclude,
    fail,
    json_option,
    limit_options,
    memory_only_option,
)
from migrator.harmless import say

if TYPE_CHECKING:
    from migrator.link.session import Link
    from migrator.receiver.receive import Received
    from migrator.receiver.resolution import Resolution


def add_to(group: click.Group) -> None:
    """Add the commands to a group."""
    for command in (receive, send, resolve):
        group.add_command(command)


class _Address(click.ParamType[tuple[str, int]]):
    name = "host:port"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        from migrator.config import parse_address

        try:
            return parse_address(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _secured(tls: Path | None, insecure: bool) -> str | None:
    """The directory of keys; ``None`` where it is to go without."""
    if tls is None and not insecure:
        raise click.UsageError(
            "say --tls DIR (migrator keys init makes one), or --insecure, which lets everybody on "
            "the network read the guest's memory, and replace it"
        )
    if tls is not None and insecure:
        raise click.UsageError("say either --tls or --insecure")
    if insecure:
        with output.impatient():
            click.echo("warning: not encrypted, and whoever connects is believed", err=True)
    return str(tls.resolve()) if tls is not None else None


def _tls_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--insecure", is_flag=True, help="Neither encrypt nor authenticate."),
        click.option(
            "--tls",
            type=click.Path(file_okay=False, path_type=Path),
            metavar="DIR",
            help="Keys of this host, from migrator keys.",
        ),
    ):
        command = option(command)
    return command


_to = click.option(
    "--to", type=_Address(), required=True, metavar="HOST:PORT", help="Where it is received."
)
_peer = click.option(
    "--peer",
    metavar="NAME|sha256:…",
    help="Whose certificate to expect there, if not HOST's: a name, or a fingerprint.",
)


@click.command(cls=MigratingCommand)
@click.option(
    "--listen", type=_Address(), required=True, metavar="HOST:PORT", help="Where to wait for it."
)
@click.option(
    "--destination", metavar="QMP", help="A QEMU that waits already, instead of one after --."
)
@click.option(
    "--from",
    "peer",
    metavar="NAME|sha256:…",
    help="Who may send: a host by its certificate's name, or a fingerprint. Default: every host "
    "with a certificate of the same CA.",
)
@click.option(
    "--patience-seconds",
    type=Number(ranges.WAIT_S),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="A source that says and sends nothing for so long is lost; and the longest that a source "
    "may have itself waited for.",
)
@_tls_options
@json_option
@click.argument("command", nargs=-1, metavar="[-- QEMU...]")
def receive(
    listen: tuple[str, int],
    destination: str | None,
    peer: str | None,
    patience_seconds: float,
    tls: Path | None,
    insecure: bool,
    as_json: bool,
    command: Sequence[str],
) -> None:
    """Receive one VM from another host.

    Starts QEMU with the command line after --, to which -qmp and -incoming are added, and waits.
    It has to be the source's command line, with RAM in a shared file of its own. {run} in it is a
    private directory, {console} a file in it, {accel} kvm or tcg. When the VM has moved, this
    command ends, and QEMU goes on.
    """
    import asyncio

    from migrator.cli.display import Display
    from migrator.errors import MigratorError
    from migrator.receiver.receive import receive as do_receive

    waiting = False

    if (destination is None) == (not command):
        raise click.UsageError("give either --destination QMP, or -- and QEMU's command line")
    keys = _secured(tls, insecure)
    ending = output.Ending()
    with Display() as display:

        def say(text: str) -> None:
            nonlocal waiting
            waiting = True
            display.say(text)

        async def until_decided() -> Received:
            received = await do_receive(
                listen,
                destination or list(command),
                keys=keys,
                peer=peer,
                say=say,
                patience_s=patience_seconds,
            )
            ending.decide(received.exit_code)
            return received

        try:
            with output.impatient():
                received = asyncio.run(until_decided())
        except MigratorError as error:
            fail(error, as_json, 4 if waiting and error.exit_code == 1 else error.exit_code)
        except (asyncio.CancelledError, KeyboardInterrupt):
            # a signal after the first word is for the receiver, which ends well: this was another
            ending.decide(4 if waiting else 1)
            ending.leave(lambda: _tell("interrupted", as_json, status="aborted"))
    ending.leave(lambda: _tell(received.words(), as_json, **received.to_json()))


def _tell(words: str, as_json: bool, **said: Any) -> None:
    say(words)
    if as_json:
        print(json.dumps({"reason": words, **said}), flush=True)


@click.command(cls=MigratingCommand)
@click.option("--source", required=True, metavar="QMP", help="QMP socket of the running QEMU.")
@_to
@_tls_options
@_peer
@click.option(
    "--streams",
    type=Number(ranges.STREAMS),
    default=choices.STREAMS,
    show_default=True,
    help="Connections for pages.",
)
@click.option(
    "--compress",
    default=choices.COMPRESS,
    show_default=True,
    metavar="none|auto|zstd[:LEVEL]",
    help="auto measures, and compresses where the link is slower than the compressor.",
)
@click.option(
    "--bandwidth",
    type=Number(ranges.BANDWIDTH_MIB_PER_S),
    metavar="MiB/s",
    help="Send no faster than this.",
)
@click.option(
    "--reconnect-seconds",
    type=Number(ranges.RECONNECT_S),
    default=choices.RECONNECT_S,
    show_default=True,
    help="How long to try to reach a host again that was lost while the guest runs.",
)
@click.option(
    "--silence-seconds",
    type=Number(ranges.SILENCE_S),
    default=choices.SILENCE_S,
    show_default=True,
    help="A host that acknowledges nothing for so long is lost.",
)
@click.option("--verify", is_flag=True, help="Compare all RAM before the destination runs.")
@memory_only_option
@limit_options
@report_option
@json_option
def send(
    source: str,
    to: tuple[str, int],
    tls: Path | None,
    insecure: bool,
    peer: str | None,
    streams: int,
    compress: str,
    bandwidth: float | None,
    reconnect_seconds: float,
    silence_seconds: float,
    verify: bool,
    memory_only: bool,
    limits: dict[str, Any],
    page: Path | None,
    as_json: bool,
) -> None:
    """Move a running VM to another host, where migrator receive waits for it.

    One connection for words and some for pages, all to the same port; QEMU's own device state goes
    through them too. The source is left stopped (QEMU's state "postmigrate") for you to end.
    """
    from migrator.cli.display import Display
    from migrator.config import MigrationConfig
    from migrator.errors import ConfigError
    from migrator.link.session import Link
    from migrator.migration.orchestrator import migrate as do_migrate
    from migrator.scenario import options_of
    from migrator.transport.packing import parse_compression

    try:
        parse_compression(compress)
    except ConfigError as error:
        raise click.BadParameter(error.expected, param_hint="--compress") from error
    host, port = to
    link = Link(
        host,
        port,
        tls=_secured(tls, insecure),
        peer=peer,
        streams=streams,
        compress=compress,
        bandwidth_bytes_per_s=bandwidth * (1 << 20) if bandwidth else None,
        reconnect_s=reconnect_seconds,
        silence_s=silence_seconds,
    )
    chosen = MigrationConfig(verify=verify, memory_only=memory_only, **limits)
    options = options_of(chosen, dirty_map=page is not None)
    with Display() as display:
        conclude(
            lambda watch: do_migrate(source, link, options, watch=watch),
            what=f"{source} → {host}:{port}",
            display=display,
            as_json=as_json,
            page=page,
        )


@click.command(cls=DecidingCommand)
@click.option("--source", metavar="QMP", help="QMP socket of the source, on this host.")
@click.option("--to", type=_Address(), metavar="HOST:PORT", help="Where it is received.")
@_tls_options
@_peer
@click.option(
    "--decide",
    type=click.Choice(["source", "destination"]),
    help="Which side is to run from now on. The other one must not: it is told so first.",
)
@click.option(
    "--destination-is-gone",
    is_flag=True,
    help="With --decide source: you have seen to it that the destination does not run.",
)
@json_option
def resolve(
    source: str | None,
    to: tuple[str, int] | None,
    tls: Path | None,
    insecure: bool,
    peer: str | None,
    decide: str | None,
    destination_is_gone: bool,
    as_json: bool,
) -> None:
    """Tell what each side holds after a migration that ended with exit code 4, and let you decide.

    Without --decide no side is chosen; but a source that was left before its state was saved, so
    that no destination can run, is let run, and settings that a killed migration left in it are put
    back. A destination that was told to go cannot be taken back; one that was not never runs once
    the source was decided for.
    """
    from migrator.aio import run
    from migrator.errors import MigratorError, SourceRuns
    from migrator.link.session import Link
    from migrator.receiver.resolution import resolve as do_resolve

    if source is None and to is None:
        raise click.UsageError("give --source, --to, or both")
    if decide is not None and to is None and not destination_is_gone:
        raise click.UsageError(
            "the destination has to be told: give --to; or --destination-is-gone, if you have "
            "ended it"
        )
    if decide == "source" and source is None:
        raise click.UsageError("--decide source lets the source run: give --source")
    link: Link | None = None
    if to is not None:
        link = Link(*to, tls=_secured(tls, insecure), peer=peer)
    ending = output.Ending()

    async def until_decided() -> Resolution:
        found = await do_resolve(source, link, decide, gone=destination_is_gone)
        ending.decide(found.exit_code)
        return found

    try:
        found = run(until_decided())
    except SourceRuns as error:
        fail(error, as_json)
    except MigratorError as error:  # "the source runs" is not what these say
        fail(error, as_json, 4 if error.exit_code == 1 else error.exit_code)

    def tell_all() -> None:
        for sentence in found.sentences:
            say(sentence)
        if as_json:
            print(json.dumps(found.to_json()), flush=True)

    ending.leave(tell_all)
