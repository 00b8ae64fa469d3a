"""What a receiver tells its witness (:mod:`migrator.receiver.witness`), step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Post:
    """What a witness has to know from the beginning.

    :ivar qmp: QMP socket of the QEMU that waits
    :ivar pid: its process
    :ivar directory: the private directory of a QEMU that the receiver started; ``None``: it did not
    :ivar keys: directory of this host's keys; ``None``: not secured
    :ivar peer: the host that may connect
    """

    qmp: str
    pid: int
    directory: str | None
    keys: str | None
    peer: str | None


@dataclass(frozen=True)
class Opened:
    """The migration that was opened.

    :ivar token: names it
    :ivar opened_by: fingerprint of the certificate that opened it, if one was shown
    :ivar wait_s: how long the source tries to reach the receiver again, at most
    :ivar settings: of QEMU, from before the migration
    """

    token: str
    opened_by: str | None
    wait_s: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """What the receiver did before it died.

    :ivar ready: all of the VM is here, but the end of QEMU's stream
    :ivar told_to_go: QEMU may have been given the end of its stream
    :ivar run: its guest is to run then
    :ivar ran: QEMU has said that its guest runs, or that all was loaded where it is not to
    """

    opened: Opened | None = None
    ready: bool = False
    told_to_go: bool = False
    run: bool = True
    ran: bool = False
