"""Migrations between two hosts: the stream beside bare loops, the whole beside QEMU's own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.guests.guests import Guest
from bench.hosts.twohosts import TwoHosts, two_hosts
from bench.moving.journey import Journey
from bench.moving.moves import Mover, Spans
from bench.moving.ways import GuestBroken, Terms, Way
from bench.stream import transport
from bench.stream.transport import Case, Rig
from migrator import aio
from migrator.link import keys

_SHM = Path("/dev/shm")
_MIB = 1 << 20
_GBIT = 1_000_000_000


@dataclass(frozen=True)
class Link:
    """A link between the hosts, and the downtime that is allowed over it.

    :ivar bits_per_s: ``None``: as fast as it goes
    :ivar downtime_ms: enough for the guest's working set: it is dirty all the time
    """

    name: str
    bits_per_s: int | None
    downtime_ms: float


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    size: int
    runs: int
    cases: tuple[Case, ...]
    guest_memory: int
    working_set: int
    ways: tuple[Way, ...]
    links: tuple[Link, ...]

    @property
    def steps(self) -> int:
        """Samples that will be taken."""
        return self.runs * (len(self.cases) + len(self.ways) * len(self.links))

    @property
    def shm_bytes(self) -> int:
        """What has to fit into /dev/shm at once."""
        return max(3 * self.size, 2 * self.guest_memory) + 16 * _MIB


_WAYS = (
    Way("migrator"),
    Way("QEMU"),
    Way("QEMU", multifd=2),
    Way("migrator", tls=True),
    Way("QEMU", tls=True),
)
_UNSHAPED = Link("unshaped", None, 300.0)


def whole(size: int, runs: int) -> Extent:
    """All of it."""
    links = (_UNSHAPED, Link("1 Gbit/s", _GBIT, 1000.0))
    cases = tuple(transport.cases())
    return Extent(size, runs, cases, 1024 * _MIB, 64 * _MIB, _WAYS, links)


def quick() -> Extent:
    """A little of it: whether all is right, not how fast it is."""
    cases = tuple(case for case in transport.cases() if case.connections == 2)
    ways = tuple(way for way in _WAYS if way.tls)
    return Extent(32 * _MIB, 1, cases, 256 * _MIB, 16 * _MIB, ways, (_UNSHAPED,))


def measure(extent: Extent, qemu: str, step: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and check what arrived.

    :param step: called before each sample
    :return: all samples, with what they are of
    :raise transport.Differs, GuestBroken: something did not arrive as it was
    :raise RuntimeError: no hosts can be made here
    """
    prefix = f"migrator-bench-{os.getpid()}-"
    with two_hosts() as hosts, tempfile.TemporaryDirectory(dir=_SHM, prefix=prefix) as name:
        directory = Path(name)
        keys.init(directory / "keys", [hosts.a.address, hosts.b.address])
        ours = [str(directory / "keys" / host.address) for host in (hosts.a, hosts.b)]
        pair = (ours[0], ours[1])
        return {
            "machine": machine.describe(qemu),
            "size": extent.size,
            "guest": {"memory": extent.guest_memory, "working_set": extent.working_set},
            "transport": _transport(extent, hosts, pair, directory, step),
            "moves": _moves(extent, hosts, pair, directory, qemu, step),
        }


def _transport(
    extent: Extent,
    hosts: TwoHosts,
    pair: tuple[str, str],
    directory: Path,
    step: Callable[[str], None],
) -> list[dict[str, Any]]:
    found: dict[Case, list[dict[str, Any]]] = {case: [] for case in extent.cases}
    with _subdirectory(directory, "transport") as files, Rig(hosts, pair, files, extent.size) as r:
        for case, sample in transport.measure(r, list(extent.cases), extent.runs, step):
            found[case].append(sample)
    return [{**case.to_json(), "samples": samples} for case, samples in found.items()]


def _moves(
    extent: Extent,
    hosts: TwoHosts,
    pair: tuple[str, str],
    directory: Path,
    qemu: str,
    step: Callable[[str], None],
) -> list[dict[str, Any]]:
    guest = Guest("sequential", extent.guest_memory, qemu, extent.working_set)
    by_address = dict(zip((hosts.a.address, hosts.b.address), pair, strict=True))
    mover = Mover(hosts, directory, Spans(before_s=2.0, after_s=1.0), by_address)
    found: dict[tuple[Link, Way], list[dict[str, Any]]] = {
        (link, way): [] for link in extent.links for way in extent.ways
    }
    for number in range(extent.runs):
        for link in extent.links:
            hosts.shape(link.bits_per_s)
            for way in extent.ways:
                step(f"run {number + 1}: {way}, {link.name}")
                with _subdirectory(directory, "move") as files:
                    terms = Terms(link.downtime_ms)
                    journey = Journey(guest, files)
                    sample = aio.run(_moved(journey, hosts, mover, way, terms))
                found[link, way].append(sample)
    return [
        {
            **way.to_json(),
            "link": link.name,
            "downtime_limit_ms": link.downtime_ms,
            "samples": samples,
        }
        for (link, way), samples in found.items()
    ]


async def _moved(
    journey: Journey, hosts: TwoHosts, mover: Mover, way: Way, terms: Terms
) -> dict[str, Any]:
    """One move of a guest that has just booted."""
    async with journey.begun(hosts.a):
        sample = await mover.sample(journey, way, terms)
    if problem := sample.pop("lost"):
        raise GuestBroken(f"{way}: {problem}")
    return sample


@contextmanager
def _subdirectory(directory: Path, name: str) -> Iterator[Path]:
    made = directory / name
    made.mkdir()
    try:
        yield made
    finally:
        shutil.rmtree(made)


def room_missing(extent: Extent) -> str:
    """Why there is not enough room for it; empty if there is."""
    free = shutil.disk_usage(_SHM).free
    if free >= extent.shm_bytes:
        return ""
    return f"{_SHM} has {free // _MIB} MiB left, {extent.shm_bytes // _MIB} MiB are needed"


ERRORS = (transport.Differs, GuestBroken)
