"""What the guest notices of a migration: when its heart beats, and how far it gets meanwhile."""

from __future__ import annotations

import os
import re
import select
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, nan
from pathlib import Path

_SAMPLE_S = 0.005  # less than 256 passes
_CHUNK = 1 << 16
_BEAT = re.compile(rb"(?P<hex>[0-9a-f]{8})|beat (?P<number>\d+) work (?P<work>\d+)\r?")


class BeatsBroken(Exception):
    """A guest's heartbeats do not count on."""


@dataclass(frozen=True)
class Beat:
    """A heartbeat.

    :ivar at: when its line was complete, in seconds of the monotonic clock
    :ivar number: which one it says it is
    :ivar work: how much the guest says it has done; ``None`` where it does not
    """

    at: float
    number: int
    work: int | None


@dataclass(frozen=True)
class Side:
    """Where one QEMU's guest can be looked at.

    :ivar console: a FIFO, made here, to be its first serial port
    :ivar ram: its RAM file
    :ivar at: offset in it of a little-endian number that counts what the guest has done; ``None``
        for a guest that says that with its heartbeats
    :ivar width: bytes of that number, which begins anew at 0 where these are not enough
    """

    console: Path
    ram: Path
    at: int | None
    width: int = 8


class Pulse(threading.Thread):
    """Listens wherever the guest may be.

    :ivar heard: what it said on each side, in the order in which it gets there
    """

    def __init__(self, *sides: Side) -> None:
        super().__init__(name="pulse", daemon=True)
        self._sides: list[Side] = []
        self.heard: list[bytearray] = []
        self._fds: list[int] = []
        self._rest = b""
        self._beats: list[Beat] = []
        self._progress: list[tuple[float, int]] = []
        self._last: int | None = None
        self._stopped = threading.Event()
        for side in sides:
            self.listen(side)

    def listen(self, side: Side) -> int:
        """Listen there too, from now on: where the guest goes next.

        :return: its place in :attr:`heard`
        """
        os.mkfifo(side.console)
        self.heard.append(bytearray())
        self._sides.append(side)
        # also for writing: there is no end of file while QEMU is not there yet, or no more
        self._fds.append(os.open(side.console, os.O_RDWR | os.O_NONBLOCK))
        return len(self._fds) - 1

    def run(self) -> None:
        """Until :meth:`stop`."""
        while not self._stopped.is_set():
            fds = self._fds[:]
            select.select(fds, [], [], _SAMPLE_S)
            now = time.monotonic()
            # read after them, but come before: all that it ever said there was there by then
            said = [_read(fd) for fd in reversed(fds)]
            for heard, data in zip(self.heard, reversed(said), strict=False):
                heard.extend(data)
                self._listen(now, data)
            self._look(now)

    def _listen(self, now: float, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if found := _BEAT.fullmatch(line):
                beat = _beat(now, found)
                self._beats.append(beat)
                if beat.work is not None:
                    self._progress.append((now, beat.work))

    def _look(self, now: float) -> None:
        spoke = [side for side, heard in zip(self._sides, self.heard, strict=False) if heard]
        if not spoke:
            return
        side = spoke[-1]
        if side.at is None:
            return
        try:
            with side.ram.open("rb", 0) as ram:
                data = os.pread(ram.fileno(), side.width, side.at)
        except FileNotFoundError:  # it was removed, as the guest has left
            return
        if len(data) < side.width:
            return
        value, before = int.from_bytes(data, "little"), self._last
        self._last = value
        done = self._progress[-1][1] if self._progress else 0
        if before is not None:
            done += (value - before) % (1 << 8 * side.width)
        self._progress.append((now, done))

    def stop(self) -> None:
        """Listen no more. May be called again."""
        self._stopped.set()
        if self.is_alive():
            self.join()
        while self._fds:
            os.close(self._fds.pop())

    def beats(self, side: int) -> int:
        """How often the heart has beaten there."""
        return len(beat_numbers(bytes(self.heard[side])))

    def check_beats(self) -> None:
        """Check that they count on from one side to the next: see :func:`check_beats`."""
        check_beats([beat.number for beat in self._beats])

    def longest_gap_s(self, since: float, until: float = inf) -> float:
        """The longest time between two heartbeats, wherever they were, in the time between."""
        times = [beat.at for beat in self._beats if since <= beat.at <= until]
        return max((b - a for a, b in pairwise(times)), default=nan)

    def longest_silence_s(self, since: float, until: float) -> float:
        """The longest time without a heartbeat, also before the first and after the last one."""
        beats = (beat.at for beat in self._beats if since <= beat.at <= until)
        return max(b - a for a, b in pairwise([since, *beats, until]))

    def work_per_s(self, since: float, until: float) -> float:
        """How much the guest did a second, in units of its own, in the time between."""
        seen = [(at, done) for at, done in self._progress if since <= at <= until]
        if len(seen) < 2:
            return nan
        (first, before), (last, after) = seen[0], seen[-1]
        return (after - before) / (last - first)


def beat_numbers(console: bytes) -> list[int]:
    """Read the heartbeats' numbers off what a guest has said; what else it says is ignored.

    :param console: of the source followed by that of the destination, as a heartbeat may have
        begun at the one and ended at the other. One that has not ended yet does not count.
    """
    found = (_BEAT.fullmatch(line) for line in console.split(b"\n")[:-1])
    return [_beat(0.0, beat).number for beat in found if beat]


def check_beats(numbers: Sequence[int]) -> None:
    """Check that heartbeats count up from 0, without gap or repetition.

    :raise BeatsBroken: they do not, or there are none
    """
    if not numbers:
        raise BeatsBroken("no heartbeat")
    for wanted, number in enumerate(numbers):
        if number != wanted:
            raise BeatsBroken(f"heartbeat {number} comes where {wanted} should")


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, _CHUNK)
    except BlockingIOError:
        return b""


def _beat(now: float, found: re.Match[bytes]) -> Beat:
    if found["hex"]:
        return Beat(now, int(found["hex"], 16), None)
    return Beat(now, int(found["number"]), int(found["work"]))
