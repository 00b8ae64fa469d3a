"""What happened in a migration: the object that is returned, and its JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["completed", "aborted", "failed"]


@dataclass
class Round:
    """One collection and the sending of what it found.

    :ivar dirty_pages_by_source: as each source reported them; a page may be in several
    :ivar only_by_source: of these, pages that no other source reported
    :ivar pages_by_several: pages that more than one source reported
    :ivar dirty_pages: what is sent: the union of what exact sources reported, what was owed from
        before, and pages that differed
    :ivar compared_pages: pages that only an inexact source reported, or that were read into past
        the page cache: compared, once nothing could write them any more
    :ivar differing_pages: of these, pages that differed
    :ivar sent_pages: pages whose content the destination now has: copied, zero or discarded
    :ivar zero_pages: of these, pages of zeros, which cost no copy
    :ivar sent_bytes: bytes copied
    :ivar collect_ms: reading the sources
    :ivar merge_ms: making the union
    :ivar compare_ms: comparing
    :ivar send_ms: sending
    """

    number: int
    dirty_pages_by_source: dict[str, int]
    only_by_source: dict[str, int]
    dirty_pages: int
    pages_by_several: int = 0
    compared_pages: int = 0
    differing_pages: int = 0
    sent_pages: int = 0
    zero_pages: int = 0
    sent_bytes: int = 0
    collect_ms: float = 0.0
    merge_ms: float = 0.0
    compare_ms: float = 0.0
    send_ms: float = 0.0
    expected_downtime_ms: float | None = None
    decision: str = ""


@dataclass
class Report:
    """All about one migration; every member is in the JSON under the same name.

    :ivar status: ``completed``, ``aborted`` or ``failed``
    :ivar memory_only: a rehearsal: nothing was handed over, and the source runs on
    :ivar downtime_ms: from the source's vCPUs stopping to the destination's running (or the
        source's own, in a rehearsal), by the time stamps of QEMU's own events, less ``verify_ms``;
        null unless completed, or if the guest did not run
    :ivar rounds: round 0 is the copy of everything; the last ones were sent in the downtime
    :ivar final_pages: pages sent while the guest stood still
    :ivar compared_pages: pages compared instead of being sent, while it stood still
    :ivar differing_pages: of these, pages that differed, and were sent
    :ivar verified_pages: pages compared on both sides, null unless verified
    :ivar mismatched_pages: of these, pages that differ, null unless verified
    :ivar phases: milliseconds by phase; their sum is ``total_ms``
    :ivar downtime_phases: the names of those that make up the downtime
    :ivar stopped_by: who stopped the guest: ``migrate``, QEMU's own migration; or ``stop``, the
        command, because that migration would have taken the devices' dirty bits away
    :ivar device_state_bytes: what QEMU's own migration sent
    :ivar qemu_ram_transferred: bytes of RAM that QEMU sent itself (ROMs, video memory)
    """

    status: Status = "failed"
    reason: str = ""
    memory_only: bool = False
    total_ms: float = 0.0
    downtime_ms: float | None = None
    verify_ms: float | None = None
    guest_bytes: int = 0
    pages_sent: int = 0
    bytes_sent: int = 0
    final_pages: int = 0
    compared_pages: int = 0
    differing_pages: int = 0
    verified_pages: int | None = None
    mismatched_pages: int | None = None
    device_state_bytes: int | None = None
    qemu_ram_transferred: int | None = None
    rounds: list[Round] = field(default_factory=list)
    stopped_by: str | None = None
    phases: dict[str, float] = field(default_factory=dict)
    downtime_phases: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    guest: dict[str, Any] | None = None

    def add(self, finished: Round) -> None:
        """Add a round whose pages have been sent."""
        self.rounds.append(finished)
        self.pages_sent += finished.sent_pages
        self.bytes_sent += finished.sent_bytes
        self.compared_pages += finished.compared_pages
        self.differing_pages += finished.differing_pages

    def to_json(self) -> str:
        """One line of JSON; milliseconds with three digits."""
        return json.dumps(_rounded(asdict(self)), separators=(", ", ": "))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


@dataclass(frozen=True)
class Progress:
    """Where a running migration is; given to whoever watches it.

    :ivar phase: name of the phase
    :ivar round: number of the round
    :ivar dirty_pages: to be sent in this round
    :ivar sent_pages: of these, sent
    :ivar total_sent_pages: in all rounds
    :ivar bytes_per_s: of the last sending
    """

    phase: str
    round: int
    dirty_pages: int
    sent_pages: int
    total_sent_pages: int
    bytes_per_s: float
