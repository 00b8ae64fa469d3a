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
    :ivar waiting_pages: of ``dirty_pages``, what is written again and again and waits for the end;
        unless it was sent all the same, in the last round before the end
    :ivar unchanged_pages: pages that were written, but held what the destination has; not in
        ``dirty_pages`` of the rounds in the downtime
    :ivar throttle_percent: of their time, how much writers were made to wait while this round was
        sent; 0 once the guest stood
    :ivar sent_pages: pages whose content the destination now has: copied, zero or discarded
    :ivar zero_pages: of these, pages of zeros, which cost no copy
    :ivar sent_bytes: bytes of pages copied
    :ivar wire_bytes: bytes that went over the network for them; 0 on one host
    :ivar collect_ms: reading the sources
    :ivar merge_ms: making the union
    :ivar compare_ms: comparing
    :ivar send_ms: sending
    :ivar began_s: when collecting began, in seconds since the migration did
    :ivar ended_s: likewise, when its pages had been sent
    :ivar dirty_bytes: bytes of ``dirty_pages``; likewise ``waiting_bytes``
    """

    number: int
    dirty_pages_by_source: dict[str, int]
    only_by_source: dict[str, int]
    dirty_pages: int
    pages_by_several: int = 0
    compared_pages: int = 0
    differing_pages: int = 0
    waiting_pages: int = 0
    unchanged_pages: int = 0
    throttle_percent: int = 0
    sent_pages: int = 0
    zero_pages: int = 0
    sent_bytes: int = 0
    wire_bytes: int = 0
    collect_ms: float = 0.0
    merge_ms: float = 0.0
    compare_ms: float = 0.0
    send_ms: float = 0.0
    began_s: float = 0.0
    ended_s: float = 0.0
    dirty_bytes: int = 0
    waiting_bytes: int = 0
    expected_downtime_ms: float | None = None
    decision: str = ""


@dataclass(frozen=True)
class MappedBlock:
    """A block of RAM in a :class:`DirtyMap`.

    :ivar regions: into how many ranges of pages it is divided, as equal as they can be: region i
        begins at page ``i * npages // regions``
    """

    name: str
    bytes: int
    page_size: int
    regions: int


@dataclass(frozen=True)
class MapRow:
    """One round in a :class:`DirtyMap`, or several that had to share a row.

    :ivar began_s: when the first of them began, in seconds since the migration did
    :ivar guest_stood: whether the guest stood still
    :ivar dirty_pages: pages that were dirty in each region, of all blocks one after the other; the
        most in any of the rounds
    """

    first_round: int
    last_round: int
    began_s: float
    guest_stood: bool
    dirty_pages: list[int]


@dataclass(frozen=True)
class DirtyMap:
    """Where memory was dirty in each round after the copy of everything."""

    blocks: list[MappedBlock]
    rows: list[MapRow]


@dataclass
class Report:
    """All about one migration; every member is in the JSON under the same name.

    :ivar status: ``completed``, ``aborted`` or ``failed``
    :ivar memory_only: a rehearsal: nothing was handed over, and the source runs on
    :ivar downtime_ms: from the source's vCPUs stopping to the destination's running (or the
        source's own, in a rehearsal), by the time stamps of QEMU's own events, less ``verify_ms``;
        null unless completed, or if the guest did not run
    :ivar downtime_limit_ms: what was allowed
    :ivar policy: what decided when to switch over, and what was sent
    :ivar throttle_percent: the most that writers were made to wait, of their time
    :ivar predicted_downtime_ms: what the last decision expected ``downtime_ms`` to be
    :ivar predicted_downtime: the same by phase; what came of it is in ``phases``
    :ivar rounds: round 0 is the copy of everything; the last ones were sent in the downtime
    :ivar wire_bytes: bytes that went over the network for pages; null on one host
    :ivar reconnects: how often a link broke and was made again
    :ivar dirty_map: where memory was dirty, null unless asked for
    :ivar final_pages: pages sent while the guest stood still
    :ivar compared_pages: pages compared instead of being sent, while it stood still
    :ivar differing_pages: of these, pages that differed, and were sent
    :ivar unchanged_pages: pages that were written, held what the destination has, and were not sent
    :ivar verified_pages: pages compared on both sides, null unless verified
    :ivar mismatched_pages: of these, pages that differ, null unless verified
    :ivar phases: milliseconds by phase; their sum is ``total_ms``
    :ivar downtime_phases: the names of those that make up the downtime
    :ivar stopped_by: who stopped the guest: ``migrate``, QEMU's own migration; or ``stop``, the
        command, because that migration would have taken the devices' dirty bits away
    :ivar device_state_bytes: what QEMU's own migration sent
    :ivar qemu_ram_transferred: bytes of RAM that QEMU sent itself (ROMs, video memory)
    :ivar warnings: sentences for people, none of which changes the status
    """

    status: Status = "failed"
    reason: str = ""
    memory_only: bool = False
    total_ms: float = 0.0
    downtime_ms: float | None = None
    downtime_limit_ms: float | None = None
    predicted_downtime_ms: float | None = None
    predicted_downtime: dict[str, float] = field(default_factory=dict)
    policy: str = ""
    throttle_percent: int = 0
    verify_ms: float | None = None
    guest_bytes: int = 0
    pages_sent: int = 0
    bytes_sent: int = 0
    wire_bytes: int | None = None
    reconnects: int = 0
    final_pages: int = 0
    compared_pages: int = 0
    differing_pages: int = 0
    unchanged_pages: int = 0
    verified_pages: int | None = None
    mismatched_pages: int | None = None
    device_state_bytes: int | None = None
    qemu_ram_transferred: int | None = None
    rounds: list[Round] = field(default_factory=list)
    dirty_map: DirtyMap | None = None
    stopped_by: str | None = None
    phases: dict[str, float] = field(default_factory=dict)
    downtime_phases: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    guest: dict[str, Any] | None = None

    def add(self, finished: Round) -> None:
        """Add a round whose pages have been sent."""
        self.rounds.append(finished)
        self.pages_sent += finished.sent_pages
        self.bytes_sent += finished.sent_bytes
        if finished.wire_bytes:
            self.wire_bytes = (self.wire_bytes or 0) + finished.wire_bytes
        self.compared_pages += finished.compared_pages
        self.differing_pages += finished.differing_pages
        self.unchanged_pages += finished.unchanged_pages

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
    :ivar expected_downtime_ms: as of the last decision; ``None`` before the first
    :ivar left_s: until the rest of this round is sent, at that rate; ``None`` where not known
    :ivar note: what people should know meanwhile
    """

    phase: str
    round: int
    dirty_pages: int
    sent_pages: int
    total_sent_pages: int
    bytes_per_s: float
    expected_downtime_ms: float | None = None
    left_s: float | None = None
    note: str = ""
