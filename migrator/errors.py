"""Everything a migration can end with but success, one tree::

    MigratorError
    ├── ConfigError         what was asked for makes no sense              exit code 2
    ├── TraceError          a recording is none, or cannot be kept         exit code 2
    ├── AccelUnavailable    guests do not run under it here                exit code 2
    ├── ControlError        a running migration cannot be asked            exit code 1
    │   └── EndedSilently   the process that was told to cancel has ended   exit code 4
    ├── VmError             a QEMU that we started, or its QMP, failed     exit code 1
    │   ├── QmpUnreachable  nobody answers at that socket
    │   │   └── SourceUnreachable  nothing was begun, nothing is known      exit code 6
    │   ├── SourceRuns      no destination may be let run beside it
    │   ├── CommandFailed   QEMU refused a command
    │   ├── Unconfirmed     it may run by now, or not
    │   ├── NotStanding     it ran, was reset or ended while it was handed over
    │   └── StoodTooLong    the time for which the guest may stand was over
    ├── LinkError           the other host, or the way to it, failed       exit code 1
    │   ├── LinkLost        the connection broke, or nothing comes
    │   ├── WireError       what came makes no sense
    │   └── PeerRefused     the host there is not the one that is wanted
    ├── NoSpace             a file system is too full for RAM              exit code 1
    ├── Refused             preflight found a reason not to begin          exit code 3
    └── MigrationError      it began, and did not end well
        ├── Aborted         given up on purpose; the source runs           exit code 1
        ├── Failed          something broke; the source runs               exit code 1
        ├── GuestEnded      the guest ended by itself: no side has it      exit code 5
        └── Undecided       which side may run is for the operator to say  exit code 4

Errors carry data: see the attributes of each. Errors of :mod:`tracker` do not pass through a
migration as they are; they become the cause of a :class:`Failed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from migrator.report.report import Report, Status


@dataclass(frozen=True)
class Finding:
    """A reason not to migrate.

    :ivar check: short name of the check
    :ivar problem: what was found
    :ivar mend: what to do about it
    """

    check: str
    problem: str
    mend: str


class MigratorError(Exception):
    """Base of all errors of this package.

    :cvar exit_code: what the command line ends with
    """

    exit_code = 1


class ConfigError(MigratorError):
    """What was asked for makes no sense.

    :ivar file: the configuration file, or ``None`` where it came from elsewhere
    :ivar key: path of the key, such as ``source.command``, or ``""`` for the whole
    :ivar expected: what was expected there
    """

    exit_code = 2

    def __init__(self, expected: str, *, file: str | None = None, key: str = "") -> None:
        super().__init__(": ".join(part for part in (file, key, expected) if part))
        self.file = file
        self.key = key
        self.expected = expected


class TraceError(MigratorError):
    """A recording cannot be read, or not be written.

    :ivar path: its file
    """

    exit_code = 2

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class AccelUnavailable(MigratorError):
    """The accelerator that was asked for does not run guests here.

    :ivar accel: its name
    :ivar reason: what happened when it was tried
    """

    exit_code = 2

    def __init__(self, accel: str, reason: str) -> None:
        super().__init__(f"accelerator {accel}: {reason}; use tcg, or auto to have it chosen")
        self.accel = accel
        self.reason = reason


class ControlError(MigratorError):
    """A control socket cannot be made, or nobody answers there.

    :ivar path: the socket, or its directory
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class EndedSilently(ControlError):
    """The process that was asked to cancel its migration ended, and did not say how."""

    exit_code = 4


class VmError(MigratorError):
    """A QEMU could not be started, ended too early, or did not answer.

    :ivar vm: which one: ``source``, ``destination``, or a path
    """

    def __init__(self, vm: str, reason: str) -> None:
        super().__init__(f"{vm}: {reason}")
        self.vm = vm
        self.reason = reason


class QmpUnreachable(VmError):
    """Nobody answers at a QMP socket, or the connection was lost."""


class SourceUnreachable(QmpUnreachable):
    """The source cannot be asked, before anything was begun: nothing is known, and unchanged."""

    exit_code = 6


class SourceRuns(VmError):
    """The destination was decided for, and the source runs."""


class CommandFailed(VmError):
    """QEMU refused a QMP command.

    :ivar command: its name
    :ivar description: QEMU's own words
    """

    def __init__(self, vm: str, command: str, description: str) -> None:
        super().__init__(vm, f"QEMU refused {command}: {description}")
        self.command = command
        self.description = description


class Unconfirmed(VmError):
    """A destination that was told to go did not confirm: it may run by now, or not.

    :ivar known: what is known, a sentence an item
    """

    def __init__(self, vm: str, known: Sequence[str]) -> None:
        super().__init__(vm, "did not confirm")
        self.known = tuple(known)


class NotStanding(VmError):
    """A VM that has to stand while it is handed over was resumed, reset or ended meanwhile."""


class StoodTooLong(VmError):
    """The guest was given up for, as it had stood for as long as it may.

    :ivar limit_s: that time
    """

    def __init__(self, limit_s: float) -> None:
        super().__init__(
            "source",
            f"its guest has stood for {limit_s:g} s, the most that is allowed "
            "(--max-standstill): it goes on here",
        )
        self.limit_s = limit_s


class LinkError(MigratorError):
    """The other host said no, or cannot be reached.

    :ivar peer: which one
    """

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"{peer}: {reason}")
        self.peer = peer
        self.reason = reason


class LinkLost(LinkError):
    """A connection to the other host broke, or nothing comes from it any more."""


class WireError(LinkError):
    """The other host sent what makes no sense; the connection is given up."""


class PeerRefused(LinkError):
    """The host at the other end of a connection is not the one that is wanted there.

    :ivar peer: the names in its certificate, and the fingerprint of that
    :ivar wanted: a name, an address or a fingerprint
    """

    def __init__(self, peer: str, wanted: str) -> None:
        super().__init__(peer, f"expected {wanted} at the other end")
        self.wanted = wanted


class NoSpace(MigratorError):
    """A file system has too few bytes left for RAM that is, or may come to be, on it.

    :ivar needed_bytes: bytes that are needed
    :ivar free_bytes: bytes that are left
    """

    def __init__(self, purpose: str, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"{purpose} {-(-needed_bytes >> 20)} MiB more, and the file system has "
            f"{free_bytes >> 20} MiB left: {-(-(needed_bytes - free_bytes) >> 20)} MiB are missing"
        )
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes

    @property
    def missing_bytes(self) -> int:
        """Bytes that have to become free."""
        return self.needed_bytes - self.free_bytes


class Refused(MigratorError):
    """Preflight found reasons not to begin; nothing was changed.

    :ivar findings: each with its mend
    """

    exit_code = 3

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("; ".join(f"{f.problem} ({f.mend})" for f in findings))
        self.findings = tuple(findings)


class MigrationError(MigratorError):
    """A migration that began did not end well.

    :ivar phase: the phase in which it ended
    :ivar reason: why
    :ivar report: what had happened until then
    """

    status: Status = "failed"

    def __init__(self, phase: str, reason: str) -> None:
        super().__init__(f"{reason} (in phase {phase})")
        self.phase = phase
        self.reason = reason
        self.report: Report | None = None


class Aborted(MigrationError):
    """Given up on purpose, by the policy or by the user. The source runs, untracked."""

    status: Status = "aborted"


class Failed(MigrationError):
    """Something broke before the point of no return. The source runs, untracked."""


class GuestEnded(MigrationError):
    """The guest ended while it was moved: powered off, panicked, or ended by another client.

    :ivar end: QEMU's word for how it ended, such as ``guest-shutdown``
    """

    exit_code = 5

    def __init__(self, phase: str, reason: str, end: str) -> None:
        super().__init__(phase, reason)
        self.end = end


class Undecided(MigrationError):
    """Which side may run cannot be said, or neither does: the operator has to decide.

    :ivar known: what is known, a sentence an item
    """

    exit_code = 4

    def __init__(self, phase: str, reason: str, known: Sequence[str]) -> None:
        super().__init__(phase, f"{reason}; " + "; ".join(known))
        self.known = tuple(known)
