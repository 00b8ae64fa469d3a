"""The kind of command that ours are: whatever ends one, it says so, and with an honest status."""

from __future__ import annotations

import json
import logging
from typing import Any

import click

from migrator.cli import output

_log = logging.getLogger(__name__)


class Command(click.Command):
    """A command that ends with words, a status and, under ``--json``, an object.

    This is for what the command itself does not expect: an interruption, and any exception, which
    is a defect. Errors of usage stay click's.

    :ivar interrupted_status: exit code of a command that was interrupted
    :ivar unexpected_status: exit code after any other exception
    """

    interrupted_status = 1
    unexpected_status = 1

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; it may not return."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            self._leave(ctx, self.interrupted_status, "aborted", "interrupted")
        except Exception as error:  # noqa: BLE001
            _log.exception("unexpected")
            self._leave(ctx, self.unexpected_status, "failed", repr(error))

    def _leave(self, ctx: click.Context, code: int, status: str, reason: str) -> None:
        ending = output.Ending()
        ending.decide(code)

        def tell() -> None:
            defect = "" if status == "aborted" else "unexpected, a defect of this program: "
            click.echo(f"{defect}{reason}", err=True)
            if ctx.params.get("as_json"):
                print(json.dumps({"status": status, "reason": reason}), flush=True)

        ending.leave(tell)


class MigratingCommand(Command):
    """A command that changes which side of a migration runs: after a defect, that is not known."""

    unexpected_status = 4


class DecidingCommand(MigratingCommand):
    """A command that settles which side runs: interrupted, it has not, or it is not known."""

    interrupted_status = 4


class Group(click.Group):
    """A group of such commands, whose output never fails."""

    command_class = Command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command line, its help and errors of usage included."""
        output.install()
        return super().main(*args, **kwargs)
