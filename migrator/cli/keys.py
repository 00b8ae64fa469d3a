"""The commands ``migrator keys``: certificates for the hosts that VMs move between."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click  # everything slower is imported where it is used

from migrator import ranges
from migrator.cli import output
from migrator.cli.command import Group
from migrator.cli.shared import Number
from migrator.harmless import say

if TYPE_CHECKING:
    from migrator.link.keys import Certificate

_directory = click.argument(
    "directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path)
)
_days = click.option(
    "--days",
    type=Number(ranges.DAYS),
    default=825,
    show_default=True,
    help="How long the hosts' certificates are valid.",
)
_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout."
)


@click.group(cls=Group)
def keys() -> None:
    """Make certificates for hosts, with which they know each other.

    All are made in one place. What is in DIR/HOST goes to HOST, by a way that nobody else can
    read; DIR/ca.key, with which hosts are made, goes nowhere.
    """


@keys.command()
@_directory
@click.argument("hosts", metavar="[HOST...]", nargs=-1)
@_days
@_json
def init(directory: Path, hosts: Sequence[str], days: int, as_json: bool) -> None:
    """Make a CA in DIR, and a certificate for each HOST: names or addresses.

    Without HOST, for this one. HOST is what others will connect to. Nothing is overwritten.
    """
    with _failing(as_json):
        from migrator.link import keys as room

        _made(room.init(directory, hosts or [room.this_host()], days), as_json)


@keys.command()
@_directory
@click.argument("hosts", metavar="HOST...", nargs=-1, required=True)
@_days
@_json
def add(directory: Path, hosts: Sequence[str], days: int, as_json: bool) -> None:
    """Make certificates for more hosts, by the CA in DIR."""
    with _failing(as_json):
        from migrator.link import keys as room

        _made(room.add(directory, hosts, days), as_json)


@keys.command()
@_directory
@_json
def show(directory: Path, as_json: bool) -> None:
    """Show the certificates in DIR: a CA's, or what was copied to a host."""
    with _failing(as_json):
        from migrator.link import keys as room

        certificates = room.show(directory)
    _table(certificates)
    if as_json:
        print(json.dumps({"certificates": [_plain(certificate) for certificate in certificates]}))
    if problem := output.unwritten():
        raise click.ClickException(problem)


@contextmanager
def _failing(as_json: bool) -> Iterator[None]:
    from migrator.cli.shared import fail
    from migrator.errors import ConfigError

    try:
        yield
    except ConfigError as error:
        fail(error, as_json)


def _made(files: Sequence[Path], as_json: bool) -> None:
    for file in files:
        say(f"made {file}")
    if as_json:
        print(json.dumps({"files": [str(file) for file in files]}))


def _plain(certificate: Certificate) -> dict[str, Any]:
    return {
        "file": str(certificate.file),
        "subject": certificate.subject,
        "names": list(certificate.names),
        "fingerprint": certificate.fingerprint,
        "not_before": certificate.not_before.isoformat(),
        "not_after": certificate.not_after.isoformat(),
    }


def _table(certificates: Sequence[Certificate]) -> None:
    from datetime import datetime, timezone

    now = datetime.now(timezone.utc)
    for certificate in certificates:
        validity = f"{certificate.not_before:%Y-%m-%d} to {certificate.not_after:%Y-%m-%d}"
        if not certificate.not_before <= now <= certificate.not_after:
            validity += ", which is not now"
        say(f"{certificate.file}: {certificate.subject}")
        say(f"  names        {', '.join(certificate.names) or '–'}")
        say(f"  fingerprint  {certificate.fingerprint}")
        say(f"  valid        {validity}")
