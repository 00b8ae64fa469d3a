"""What is heard on two consoles, and seen in two RAM files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bench.guests.pulse import BeatsBroken, Pulse, Side, beat_numbers, check_beats

TIMEOUT_S = 30.0


class Guest:
    """Both sides of a guest that is played by the test."""

    def __init__(self, directory: Path, at: int | None, width: int = 8) -> None:
        self.sides = [Side(directory / f"{n}.c", directory / f"{n}.r", at, width) for n in "ab"]
        self.pulse = Pulse(*self.sides)
        self.pulse.start()

    def says(self, side: int, words: bytes) -> None:
        before = len(self.pulse.heard[side])
        with self.sides[side].console.open("wb", 0) as console:
            console.write(words)
        self.until(lambda: len(self.pulse.heard[side]) >= before + len(words))

    def has_done(self, side: int, number: int) -> None:
        self.sides[side].ram.write_bytes(
            bytes(16) + number.to_bytes(self.sides[side].width, "little")
        )
        time.sleep(0.05)  # several looks

    @staticmethod
    def until(happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not happened():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def close(self) -> None:
        self.pulse.stop()


@pytest.fixture
def linux(tmp_path: Path) -> Iterator[Guest]:
    with closing(Guest(tmp_path, None)) as guest:
        yield guest


def test_a_beat_that_begins_at_the_source_and_ends_at_the_destination(linux: Guest) -> None:
    linux.says(0, b"00000000\n00000001\n0000")
    linux.says(1, b"0002\n00000003\n")
    assert (linux.pulse.beats(0), linux.pulse.beats(1)) == (2, 1)
    linux.pulse.check_beats()
    linux.says(1, b"00000005\n")
    with pytest.raises(BeatsBroken, match="heartbeat 5 comes where 4 should"):
        linux.pulse.check_beats()


def test_other_words_are_no_beats(linux: Guest) -> None:
    linux.says(0, b"[    0.1] booting\nbeat 0 work 7\r\nbeat one\nx beat 1 work 9\nbeat 1 work 9\n")
    assert linux.pulse.beats(0) == 2
    linux.pulse.check_beats()


def test_a_silent_guest_is_broken(linux: Guest) -> None:
    with pytest.raises(BeatsBroken, match="no heartbeat"):
        linux.pulse.check_beats()


def test_the_longest_gap_is_within_the_span(linux: Guest) -> None:
    times = [time.monotonic()]
    for number, pause_s in enumerate((0.0, 0.3, 0.0, 0.1)):
        time.sleep(pause_s)
        linux.says(number // 2, b"%08x\n" % number)
        times.append(time.monotonic())
    assert linux.pulse.longest_gap_s(times[0]) >= 0.3
    assert 0.1 <= linux.pulse.longest_gap_s(times[2] - 0.01) < linux.pulse.longest_gap_s(times[0])
    assert linux.pulse.longest_gap_s(times[-1]) != linux.pulse.longest_gap_s(times[-1])  # nan


def test_work_that_the_guest_tells_of(linux: Guest) -> None:
    began = time.monotonic()
    linux.says(0, b"beat 0 work 100\n")
    time.sleep(0.1)
    linux.says(1, b"beat 1 work 150\n")
    took_s = time.monotonic() - began
    assert 50 / took_s <= linux.pulse.work_per_s(began, time.monotonic()) <= 50 / 0.1


@pytest.mark.parametrize(("width", "before", "after"), [(8, 2**40, 2**40 + 60), (1, 250, 54)])
def test_work_that_is_counted_in_ram(tmp_path: Path, width: int, before: int, after: int) -> None:
    with closing(Guest(tmp_path, 16, width)) as guest:
        guest.has_done(0, 77)  # by whatever ran before the guest's first word: not looked at
        guest.has_done(0, before)
        began = time.monotonic()
        guest.says(0, b"00000000\n")
        guest.has_done(1, before)  # copied, but does not run yet
        guest.has_done(0, (before + 10) % (1 << 8 * width))
        guest.has_done(1, after)
        guest.says(1, b"00000001\n")
        time.sleep(0.05)
        took_s = time.monotonic() - began
        rate = guest.pulse.work_per_s(began, time.monotonic())
    assert 60 / took_s <= rate < 60 / 0.1


def test_stopped_twice(linux: Guest) -> None:
    before = len(os.listdir("/proc/self/fd"))
    linux.pulse.stop()
    assert len(os.listdir("/proc/self/fd")) == before - 2
    linux.pulse.stop()


def test_a_beat_that_has_not_ended_does_not_count() -> None:
    assert beat_numbers(b"00000000\n00000001") == [0]
    assert beat_numbers(b"beat 7 work 1\r\nbeat 8 wo") == [7]


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ([1, 2], "heartbeat 1 comes where 0 should"),
        ([0, 2], "heartbeat 2 comes where 1 should"),
        ([0, 1, 1], "heartbeat 1 comes where 2 should"),
        ([0, 1, 0], "heartbeat 0 comes where 2 should"),
        ([], "no heartbeat"),
    ],
)
def test_beats_that_do_not_count_on(numbers: list[int], problem: str) -> None:
    check_beats([0, 1, 2])
    with pytest.raises(BeatsBroken, match=problem):
        check_beats(numbers)
