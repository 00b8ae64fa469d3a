"""Our migration against QEMU's own: the same guest, links and machine, in turn."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import machine
from bench.guests import guests
from bench.guests.guests import Guest, GuestError
from bench.hosts import twohosts
from bench.hosts.twohosts import TwoHosts
from bench.moving.by_us import can_throttle
from bench.moving.moves import Mover, Spans
from bench.moving.traveller import Traveller
from bench.moving.ways import GuestBroken, Terms, Way
from bench.versus.targets import completed, finalists
from migrator import aio
from migrator.errors import VmError

_SHM = Path("/dev/shm")
_MIB = 1 << 20

OUTRUN = "outrun"
"""A guest that writes more than its link carries, 1 Gbit/s."""

WORKLOADS = (*guests.WORKLOADS, OUTRUN)
DEFAULT = ("sequential", "zipf", "read-mostly", "linux-sqlite", OUTRUN)
QUICK = ("sequential", "zipf")

ERRORS = (GuestError, GuestBroken, VmError)

_SETTINGS = (
    Way("QEMU"),
    Way("QEMU", multifd=2),
    Way("QEMU", xbzrle=True),
    Way("QEMU", auto_converge=True),
)
_LIMIT_S = 8.0
_SLOWING_LIMIT_S = 20.0  # to slow a guest as far as it takes is done in small steps
_SPANS = Spans(before_s=0.8, after_s=0.4)


@dataclass(frozen=True)
class Link:
    """What a guest is moved over.

    :ivar bits_per_s: ``None``: as fast as it goes
    """

    name: str
    local: bool = False
    bits_per_s: int | None = None


_LINKS = (Link("local", local=True), Link("veth"))
_SLOW = (Link("1 Gbit/s", bits_per_s=1_000_000_000),)


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    :ivar qemus: programs
    :ivar workloads: of :data:`WORKLOADS`
    :ivar runs: timed samples of what is the best of something in the first
    """

    qemus: Sequence[str]
    workloads: Sequence[str]
    runs: int
    downtime_ms: float = 300.0  # QEMU's default

    @property
    def shm_bytes(self) -> int:
        """What has to fit into /dev/shm at once."""
        memory = max(_guest(name, self.qemus[0]).memory for name in self.workloads)
        return 2 * memory + 64 * _MIB


def missing(extent: Extent) -> str:
    """Why it cannot be measured here; empty if it can."""
    if problem := twohosts.missing():
        return problem
    for qemu in extent.qemus:
        if not shutil.which(qemu):
            return (
                f"there is no {qemu!r}; install QEMU (Debian: qemu-system-x86) or name its binary"
            )
    free = shutil.disk_usage(_SHM).free
    if free < extent.shm_bytes:
        return f"{_SHM} has {free // _MIB} MiB left, {extent.shm_bytes // _MIB} MiB are needed"
    return ""


def measure(extent: Extent, step: Callable[[str], None]) -> dict[str, Any]:
    """Move each guest in every way, again and again, and look each time what became of it.

    The object that is returned, and written as JSON, has

    - ``machine``: of :func:`bench.machine.describe`; ``qemu`` has the versions of all
    - ``versus``: ``runs``, ``throttle`` (whether ours could slow a guest)
    - ``entries``, one for each QEMU, guest, link and way: ``qemu`` (its version), ``workload``,
      ``link``, ``who`` (``migrator`` or ``QEMU``), ``setting`` (of QEMU; empty: none),
      ``downtime_limit_ms``, ``limit_s`` (then it was called off), ``samples``, ``checks``

    A sample has ``run``; ``problem``, why the move did not come to its end, empty if it did;
    ``gave_up``, whether that is because it did not converge; ``lost``, what of the guest was not as
    it was, empty if nothing. One that came to its end has also ``total_s``; ``downtime_ms``, by
    QEMU's events; ``felt_ms``, the longest time without a heartbeat, and ``usual_gap_ms``, that
    before; ``rounds``; ``ram_bytes``, said to be sent, ``wire_bytes``, that left the interface, and
    ``bytes``, the former of local moves, else the latter; ``work_per_s_before`` and ``…_during``,
    in units of the guest's own, and ``progress``, their ratio; ``throttle_percent``. What is not
    known is null.

    A check is a sample of a move that is not timed: memory was compared before the guest ran on.

    :param step: called before each move
    :raise GuestError: a guest cannot be made; the text says what to do
    :raise GuestBroken, VmError: a guest does not come up
    """
    return aio.run(_measure(extent, step))


async def _measure(extent: Extent, step: Callable[[str], None]) -> dict[str, Any]:
    prefix = f"migrator-bench-{os.getpid()}-"
    found: list[_Entry] = []
    about = machine.describe(extent.qemus[0])
    with (
        twohosts.two_hosts() as hosts,
        tempfile.TemporaryDirectory(dir=_SHM, prefix=prefix) as name,
    ):
        mover = Mover(hosts, Path(name), _SPANS)
        for qemu in extent.qemus:
            version = _version(qemu)
            for workload in extent.workloads:
                entries = _entries(version, workload, extent.downtime_ms)
                traveller = Traveller(_guest(workload, qemu), hosts, Path(name))
                try:
                    await _run(traveller, mover, hosts, entries, extent.runs, step)
                finally:
                    await traveller.end()
                found += entries
    about["qemu"] = ", ".join(dict.fromkeys(entry.qemu for entry in found))
    return {
        "machine": about,
        "versus": {"runs": extent.runs, "throttle": can_throttle()},
        "entries": [entry.to_json() for entry in found],
    }


@dataclass
class _Entry:
    qemu: str
    workload: str
    link: Link
    way: Way
    terms: Terms
    samples: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "qemu": self.qemu,
            "workload": self.workload,
            "link": self.link.name,
            "who": self.way.who,
            "setting": self.way.setting,
            "downtime_limit_ms": self.terms.downtime_ms,
            "limit_s": self.terms.limit_s,
            "samples": self.samples,
            "checks": self.checks,
        }


def _version(qemu: str) -> str:
    """``QEMU 10.0.2``, as those of the same number are alike."""
    said = str(machine.describe(qemu)["qemu"])
    number = re.search(r"version (\S+)", said)
    return f"QEMU {number[1]}" if number else said or qemu


def _guest(workload: str, qemu: str) -> Guest:
    if workload == OUTRUN:
        # twice what the link carries, and twice what fits into the downtime. A guest at full speed
        # writes all of its set in the 10 ms between two of its sleeps in QEMU: nothing helps there
        return Guest("sequential", 256 * _MIB, qemu, 64 * _MIB, pages_per_s=60_000)
    if workload.startswith("linux"):
        return Guest(workload, 512 * _MIB, qemu)
    return Guest(workload, 256 * _MIB, qemu)


def _entries(qemu: str, workload: str, downtime_ms: float) -> list[_Entry]:
    outrun = workload == OUTRUN
    ours = Way("migrator", throttle=outrun and can_throttle())
    return [
        _Entry(
            qemu, workload, link, way, Terms(downtime_ms, _limit_s(way, link), False, link.local)
        )
        for link in (_SLOW if outrun else _LINKS)
        for way in (ours, *_SETTINGS)
    ]


def _limit_s(way: Way, link: Link) -> float:
    slowing = way.auto_converge or way.throttle
    return _SLOWING_LIMIT_S if slowing and link in _SLOW else _LIMIT_S


async def _run(
    traveller: Traveller,
    mover: Mover,
    hosts: TwoHosts,
    entries: Sequence[_Entry],
    runs: int,
    step: Callable[[str], None],
) -> None:
    for number in range(runs):
        for link in dict.fromkeys(entry.link for entry in entries):
            hosts.shape(link.bits_per_s)
            turn = _still_in([entry for entry in entries if entry.link == link])
            # whoever came after whom: the other way round the next time
            for entry in turn if number % 2 == 0 else reversed(turn):
                step(f"{entry.qemu}, {entry.workload}, {link.name}, run {number + 1}: {entry.way}")
                sample = await traveller.move(mover, entry.way, entry.terms)
                entry.samples.append({"run": number, **sample})
    for entry in entries:
        if entry.way.ours and completed(entry.to_json()):
            hosts.shape(entry.link.bits_per_s)
            step(f"{entry.qemu}, {entry.workload}, {entry.link.name}, compared: {entry.way}")
            terms = replace(entry.terms, checked=True)
            entry.checks.append({"run": 0, **await traveller.move(mover, entry.way, terms)})


def _still_in(entries: Sequence[_Entry]) -> list[_Entry]:
    """Who has another turn: ours, and what of QEMU's was the best in something."""
    if not entries[0].samples:
        return list(entries)
    best = finalists(entry.to_json() for entry in entries if not entry.way.ours)
    return [entry for entry in entries if entry.way.ours or entry.way.setting in best]
