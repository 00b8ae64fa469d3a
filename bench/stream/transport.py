"""Our stream beside bare loops, over one link, between two processes.

Every sample is one sending of a file. After each, what arrived is compared with what was sent: a
difference is an error, and there are no results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.hosts.twohosts import TwoHosts
from bench.hosts.worker import PORT, Worker
from bench.stream import loops, streaming
from bench.stream.content import SHAPES, Shape, differing, fill
from bench.stream.loops import Loop
from migrator.link.session import Link


class Differs(Exception):
    """What arrived is not what was sent."""


@dataclass(frozen=True)
class Case:
    """One way to send.

    :ivar what: ``hot loop``, ``file loop`` or ``stream``
    """

    what: str
    tls: bool
    connections: int
    shape: Shape = SHAPES[0]

    def to_json(self) -> dict[str, Any]:
        """What it is."""
        return {
            "what": self.what,
            "tls": self.tls,
            "connections": self.connections,
            "memory": self.shape.name,
        }


def cases() -> list[Case]:
    """All of them, neighbours to be compared with each other."""
    return [
        Case(what, tls, connections, shape)
        for tls in (False, True)
        for connections in (1, 2)
        for what, shape in (
            ("hot loop", SHAPES[0]),
            ("file loop", SHAPES[0]),
            *(("stream", shape) for shape in SHAPES),
        )
    ]


class Rig:
    """Two workers, and the files.

    :param keys: directories with keys, of the sender and of the receiver
    :param directory: on tmpfs
    :param size: bytes of memory to send
    """

    def __init__(self, hosts: TwoHosts, keys: tuple[str, str], directory: Path, size: int) -> None:
        self._address = hosts.b.address
        self._keys, self._size = keys, size
        self._sources = {share: directory / f"source-{share}" for share in _contents()}
        self._destination = directory / "destination"
        self._near, self._far = Worker(hosts.a), Worker(hosts.b)

    def __enter__(self) -> Rig:
        for share, path in self._sources.items():
            fill(path, self._size, share)
        return self

    def __exit__(self, *_: object) -> None:
        self._near.close()
        self._far.close()

    def sample(self, case: Case) -> dict[str, Any]:
        """Send once.

        :return: seconds, CPU seconds of both ends, and bytes
        :raise Differs: what arrived is something else
        :raise TaskFailed: it did not
        """
        source = self._sources[case.shape.content]
        keys = self._keys if case.tls else None
        if case.what == "stream":
            link = Link(
                self._address,
                PORT,
                tls=keys[0] if keys else None,
                streams=case.connections,
            )
            self._far.begin(
                streaming.receive,
                keys[1] if keys else None,
                self._destination,
                self._size,
                case.connections,
            )
            self._near.begin(streaming.send, link, source, case.shape)
        else:
            loop = Loop(self._size, case.connections, case.what == "hot loop", self._address, keys)
            self._far.begin(loops.receive, loop, self._destination)
            self._near.begin(loops.send, loop, source)
        try:
            sent = self._near.result()
            received = self._far.result()
            if case.what != "hot loop":
                self._compare(case, source)
        finally:
            self._destination.unlink(missing_ok=True)
        took = sent.took if case.what == "stream" else sent
        found = {"s": took.wall_s, "sender_cpu_s": took.cpu_s, "receiver_cpu_s": received.cpu_s}
        if case.what != "stream":
            return {**found, "guest_bytes": self._size, "content_bytes": self._size}
        details = asdict(sent)
        return {
            **found,
            "guest_bytes": details["pages"] * 4096,
            "content_bytes": details["content_bytes"],
            "wire_bytes": details["wire_bytes"],
        }

    def _compare(self, case: Case, source: Path) -> None:
        count = differing(source, self._destination, case.shape)
        if count:
            raise Differs(f"{case}: {count} pages differ")


def _contents() -> set[float]:
    return {shape.content for shape in SHAPES}


def measure(
    rig: Rig, wanted: list[Case], runs: int, step: Callable[[str], None]
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Samples: each case once, then all of them again, ``runs`` times.

    A first sending, in which kernels are compiled or loaded, is none of them.

    :param step: called before each
    """
    rig.sample(next(case for case in wanted if case.what == "stream"))
    for number in range(runs):
        for case in wanted:
            step(f"run {number + 1}: {case.what}, {case.shape.name}")
            yield case, rig.sample(case)
