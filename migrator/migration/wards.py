"""The two VMs that a guard looks after, and how it finds them: what it is told at its start."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from migrator.qemu.rollback import Before
from migrator.qemu.settings import Settings


@dataclass(frozen=True)
class LocalWard:
    """A destination on this host.

    :ivar qmp: its QMP socket
    :ivar pid: its process
    :ivar settings: its capabilities and parameters of before
    """

    qmp: str
    pid: int
    settings: Settings


@dataclass(frozen=True)
class RemoteWard:
    """A destination on another host, which its receiver looks after.

    :ivar link: what :meth:`migrator.link.session.Link.to_json` gave
    :ivar session: names the migration there
    """

    link: dict[str, Any]
    session: str


@dataclass(frozen=True)
class Wards:
    """Both.

    :ivar source: the source's QMP socket
    :ivar before: the source, as it was
    """

    source: str
    destination: LocalWard | RemoteWard
    before: Before

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Wards:
        """What :meth:`to_json` gave."""
        told = json.loads(line)
        there, before = told["destination"], told["before"]
        destination: LocalWard | RemoteWard
        if "pid" in there:
            destination = LocalWard(**{**there, "settings": Settings(**there["settings"])})
        else:
            destination = RemoteWard(**there)
        return cls(
            told["source"],
            destination,
            Before(**{**before, "settings": Settings(**before["settings"])}),
        )
