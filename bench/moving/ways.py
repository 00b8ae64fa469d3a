"""How a guest can be moved, and on what terms."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


class GuestBroken(Exception):
    """A guest is not what it was before it was moved, or was not moved."""


class GivenUp(Exception):
    """Whoever was to move a guest did not get to the end, or refused; the guest is where it was."""


@dataclass(frozen=True)
class Way:
    """How to migrate.

    :ivar who: ``migrator`` or ``QEMU``
    :ivar multifd: QEMU's channels for pages; 0: it sends them over its main one
    :ivar xbzrle: QEMU sends differences from what it sent before
    :ivar auto_converge: QEMU slows the guest where it does not converge
    :ivar throttle: likewise the migrator, the guest's writes only
    """

    who: str
    tls: bool = False
    multifd: int = 0
    xbzrle: bool = False
    auto_converge: bool = False
    throttle: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is the migrator that moves it."""
        return self.who == "migrator"

    @property
    def setting(self) -> str:
        """What is set, TLS aside; empty if nothing is."""
        return ", ".join(
            name
            for name, wanted in (
                (f"multifd {self.multifd}", self.multifd),
                ("xbzrle", self.xbzrle),
                ("auto-converge", self.auto_converge),
                ("throttle", self.throttle),
            )
            if wanted
        )

    def to_json(self) -> dict[str, Any]:
        """What it is."""
        return asdict(self)

    def __str__(self) -> str:
        more = [self.setting] if self.setting else []
        return ", ".join([self.who, *more, "TLS" if self.tls else "plain"])


@dataclass(frozen=True)
class Terms:
    """On what terms to migrate.

    :ivar downtime_ms: the limit that is set
    :ivar limit_s: who has not switched over by then
    :ivar forces: is forced to; otherwise it is called off
    :ivar local: from one QEMU to another on the same host, not over the link
    :ivar checked: the migrator compares the memory of both before the guest runs
    """

    downtime_ms: float
    limit_s: float = 60.0
    forces: bool = True
    local: bool = False
    checked: bool = False


@dataclass(frozen=True)
class Moved:
    """What came of it.

    :ivar began: in seconds of the monotonic clock
    :ivar total_s: as whoever moved it says
    :ivar downtime_ms: from the source's STOP to the destination's RESUME
    :ivar ram_bytes: of RAM, sent
    :ivar throttle_percent: how much the guest was slowed in the end; ``None`` if it was not
    """

    began: float
    total_s: float
    downtime_ms: float
    rounds: int
    ram_bytes: int
    throttle_percent: int | None = None

    @property
    def ended(self) -> float:
        """In seconds of the monotonic clock."""
        return self.began + self.total_s
