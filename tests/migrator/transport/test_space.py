"""Space for RAM files: how much is needed, reserved, given back."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrator.errors import Aborted, LinkError, NoSpace, VmError
from migrator.report.phases import Phase, Phases
from migrator.transport import reservation
from migrator.transport.local import LocalCopy
from migrator.transport.reservation import Reservation, reserve_all
from migrator.transport.space import (
    Growth,
    Room,
    Shortage,
    given_up_in_time,
    growth_bytes,
    margins,
    room_of,
    to_hold,
    to_run,
)
from tests.migrator.streaming import connected
from tests.migrator.transport.test_local import Sides, data_of, everything, noise, pages, put
from tests.tracker import naive
from tests.tracker.mapper import PAGE, Ram, shm_directory, small_tmpfs
from tracker.bits.bitmap import DirtyBitmap

MIB = 1 << 20
GIB = 1 << 30
HERE, THERE = 1, 2  # file systems


def room(filesystem: int, size: int, allocated: int, free: int | None) -> Room:
    return Room(filesystem, size * MIB, allocated * MIB, None if free is None else free * MIB)


# -- how much is needed -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rooms", "expected"),
    [
        ([room(HERE, 100, 30, 1000)], 70),
        ([room(HERE, 100, 30, 50)], 50),
        ([room(HERE, 100, 30, 100), room(HERE, 100, 30, 100)], 100),
        ([room(HERE, 100, 30, 60), room(THERE, 100, 30, 60)], 120),
        ([room(HERE, 100, 30, None)], 70),
        ([room(HERE, 100, 101, 50)], 0),  # a disk's file, with its extents
    ],
)
def test_growth_is_bounded_by_the_file_system(rooms: list[Room], expected: int) -> None:
    assert growth_bytes(rooms) == expected * MIB


def test_the_margin_is_no_more_than_the_guest_may_touch() -> None:
    assert margins([room(HERE, 1000, 100, 5000)]) == {HERE: 64 * MIB}
    assert margins([room(HERE, 10_000, 100, 5000)]) == {HERE: 200 * MIB}
    assert margins([room(HERE, 1000, 990, 5000)]) == {HERE: 10 * MIB}
    assert margins([room(HERE, 1000, 100, 5000)], 300 * MIB) == {HERE: 300 * MIB}
    assert margins([room(HERE, 1000, 900, 5000)], 300 * MIB) == {HERE: 100 * MIB}
    assert margins([room(HERE, 1000, 100, None)]) == {}


def test_the_destination_needs_what_the_source_holds() -> None:
    there = [room(THERE, 500, 0, 150), room(THERE, 500, 60, 150)]
    assert to_hold([100 * MIB, 110 * MIB], there, {}) is None
    assert to_hold([100 * MIB, 111 * MIB], there, {}) == Shortage(151 * MIB, 150 * MIB)
    # one that has too much lends nothing to the other
    assert to_hold([151 * MIB, 0], there, {}) == Shortage(151 * MIB, 150 * MIB)
    assert to_hold([500 * MIB], [room(THERE, 500, 0, None)], {}) is None


def test_on_a_shared_file_system_the_margin_stays_free_too() -> None:
    there = [room(HERE, 500, 0, 150)]
    assert to_hold([100 * MIB], there, {HERE: 50 * MIB}) is None
    lack = to_hold([100 * MIB], there, {HERE: 51 * MIB})
    assert lack == Shortage(151 * MIB, 150 * MIB, shared=True)
    assert to_hold([100 * MIB], there, {THERE: 51 * MIB}) is None


def test_the_guest_may_grow_at_the_destination_as_at_the_source() -> None:
    there = [room(THERE, 500, 90, 110)]
    assert to_run([100 * MIB], 100 * MIB, there, {}) is None
    assert to_run([100 * MIB], 101 * MIB, there, {}) == Shortage(111 * MIB, 110 * MIB)
    # never more than all of it
    assert to_run([100 * MIB], 101 * MIB, [room(THERE, 200, 90, 110)], {}) is None
    # the source's memory is free once its QEMU has ended
    assert to_run([100 * MIB], 400 * MIB, [room(HERE, 500, 90, 110)], {HERE: 64 * MIB}) is None
    lack = to_run([100 * MIB], 400 * MIB, [room(HERE, 500, 90, 60)], {HERE: 64 * MIB})
    assert lack == Shortage(64 * MIB, 60 * MIB, shared=True)


def test_growth_of_the_last_half_second() -> None:
    now = [0.0]
    growth = Growth(lambda: now[0])
    found = []
    for time, held in [(0.0, 10), (0.2, 30), (0.4, 35), (0.6, 40), (1.0, 40), (1.3, 20)]:
        now[0] = time
        found.append(growth.lately(held))
    assert found == [0, 20, 25, 30, 5, 0]


# -- giving up in time --------------------------------------------------------------------------


def given_up(phase: Phase, looks_before: int) -> int:
    """Report a shortage after some looks.

    :return: how many looks were taken
    """
    looks = [0]

    def shortage() -> NoSpace | None:
        looks[0] += 1
        return NoSpace("it needs", 3 * MIB, MIB) if looks[0] > looks_before else None

    async def body() -> None:
        phases = Phases(lambda _: None)
        for one in list(Phase)[1 : list(Phase).index(phase) + 1]:
            phases.enter(one)
        async with given_up_in_time(shortage, phases):
            await asyncio.sleep(0.3)

    asyncio.run(asyncio.wait_for(body(), 60))
    return looks[0]


@pytest.mark.parametrize("phase", [Phase.ATTACH, Phase.COPY, Phase.ROUNDS, Phase.SWITCHOVER])
def test_the_body_is_cancelled_while_the_guest_runs(phase: Phase) -> None:
    with pytest.raises(Aborted, match=r"it needs 3 MiB more.*1 MiB left: 2 MiB are") as error:
        given_up(phase, 2)
    assert error.value.phase == phase.value


def test_a_guest_that_stands_does_not_grow() -> None:
    assert given_up(Phase.STOP, 0) == 0


def test_nothing_is_given_up_where_nothing_is_short() -> None:
    assert given_up(Phase.COPY, 1_000_000) > 2


def test_a_cancellation_by_others_stays_one() -> None:
    async def body() -> None:
        async with given_up_in_time(lambda: None, Phases(lambda _: None)):
            await asyncio.sleep(60)

    async def cancelled() -> None:
        task = asyncio.create_task(body())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())


def test_a_body_that_has_ended_is_not_cancelled_any_more() -> None:
    """The destination runs: a signal that comes just then must not make it undecided."""

    async def body() -> str:
        task = asyncio.current_task()
        assert task is not None
        async with given_up_in_time(lambda: None, Phases(lambda _: None)):
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(task.cancel)  # at the next step of the loop
        return "handed over"

    assert asyncio.run(body()) == "handed over"


# -- reserving, on one host ---------------------------------------------------------------------


@dataclass
class Tight:
    """Two sides, the destination on a file system of its own.

    :ivar sides: 200 pages each
    """

    sides: Sides
    directory: Path

    def fill(self) -> None:
        """Take all that is left."""
        with (self.directory / "filler").open("wb") as file, contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(PAGE))

    def free(self) -> int:
        """Pages that are left."""
        space = os.statvfs(self.directory)
        return space.f_bavail * space.f_frsize // PAGE

    @property
    def copy(self) -> LocalCopy:
        return self.sides.transport()


@pytest.fixture
def tight(tmp_path: Path) -> Iterator[Tight]:
    with small_tmpfs(tmp_path / "small", f"{100 * PAGE}") as small, shm_directory() as directory:
        sides = Sides(directory / "source", small / "destination")
        try:
            yield Tight(sides, small)
        finally:
            sides.end()


def test_reserved_pages_can_be_sent_to_a_file_system_that_is_full(tight: Tight) -> None:
    source, destination = tight.sides.source, tight.sides.destination
    put(source, {page: noise(page) for page in range(0, 180, 2)})

    async def body() -> None:
        copy = tight.copy
        await copy.open()
        try:
            assert destination.allocated() == 90
            assert data_of(destination)["ram"].count() == 0
            tight.fill()
            assert tight.free() == 0
            sent = await copy.send(everything(), data_of(source))
            assert sent.error is None
            assert tight.sides.differing() == set()
        finally:
            await copy.close()

    asyncio.run(body())


def test_too_little_space_is_said_before_anything_is_copied(tight: Tight) -> None:
    put(tight.sides.source, {page: noise(page) for page in range(130)})

    async def body() -> None:
        copy = tight.copy
        try:
            with pytest.raises(NoSpace, match="destination's RAM needs") as error:
                await copy.open()
            assert error.value.needed_bytes == 130 * PAGE
            assert error.value.missing_bytes == 30 * PAGE
        finally:
            await copy.close()

    asyncio.run(body())
    assert tight.sides.destination.allocated() == 0


def opened(ram: Ram) -> tuple[int, Reservation]:
    fd = os.open(ram.path, os.O_RDWR)
    held = DirtyBitmap.from_pages(ram.npages, sorted(naive.data(fd, ram.npages, PAGE)))
    return fd, Reservation(fd, ram.block, held)


def test_a_reservation_that_fails_half_way_is_undone(tight: Tight) -> None:
    """Another process takes the space between the look and the allocation."""
    destination = tight.sides.destination
    put(destination, {5: noise(5)})
    fd, made = opened(destination)
    try:
        with pytest.raises(NoSpace) as error:
            reserve_all([made], [DirtyBitmap.full(200)], lambda: None)
        assert error.value.missing_bytes == 100 * PAGE
    finally:
        os.close(fd)
    assert destination.allocated() == 1
    assert destination.content()[5 * PAGE : 6 * PAGE] == noise(5)


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_reserves_nothing(
    tight: Tight, error: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No such file system that could be tried is at hand in every kernel."""
    monkeypatch.setattr(reservation, "reserve_pages", lambda *_: error)
    put(tight.sides.source, {1: noise(1)})

    async def body() -> None:
        copy = tight.copy
        try:
            with caplog.at_level(logging.WARNING):
                await copy.open()
            assert "reserves nothing" in caplog.text
            assert (await copy.send(everything(), data_of(tight.sides.source))).error is None
            assert tight.sides.differing() == set()
        finally:
            await copy.close()

    asyncio.run(body())


def test_what_is_discarded_after_it_was_reserved_is_a_hole(tight: Tight) -> None:
    """Sent or not, zeros or not: it reads as zeros, and takes no memory."""
    source, destination = tight.sides.source, tight.sides.destination
    put(source, {page: noise(page) for page in range(8)} | dict.fromkeys((8, 9), bytes(PAGE)))

    async def body() -> None:
        copy = tight.copy
        await copy.open()
        try:
            await copy.send(pages(0, 1, 2, 3, 8), data_of(source))
            assert destination.allocated() == 10
            source.punch(0, 2)  # sent
            source.punch(4, 2)  # not sent yet
            source.punch(8, 2)  # zeros
            assert (await copy.send(everything(), data_of(source))).error is None
        finally:
            await copy.close()

    asyncio.run(body())
    assert tight.sides.differing() == set()
    assert destination.allocated() == source.allocated() == 4


def test_all_that_was_taken_is_given_back(tight: Tight) -> None:
    source, destination = tight.sides.source, tight.sides.destination
    put(source, {page: noise(page) for page in range(50)})
    put(destination, {page: noise(1000 + page) for page in (3, 100)})

    async def body() -> None:
        copy = tight.copy
        await copy.give_back()  # nothing is open: nothing to give back
        await copy.open()
        try:
            put(source, {60: noise(60)})
            await copy.send(everything(), data_of(source))
            assert destination.allocated() > 50
            await copy.give_back()
            assert destination.allocated() == 1  # 100 is a hole at the source, and became one
            await copy.give_back()
        finally:
            await copy.close()

    asyncio.run(body())


def test_no_room_to_grow_at_the_destination(tight: Tight) -> None:
    put(tight.sides.source, {page: noise(page) for page in range(50)})

    async def body() -> None:
        copy = tight.copy
        await copy.open()
        try:
            with pytest.raises(NoSpace, match="has not touched yet") as error:
                await copy.check_room()
            assert error.value.needed_bytes == 150 * PAGE
            assert error.value.free_bytes == 50 * PAGE
        finally:
            await copy.close()

    asyncio.run(body())


def test_a_shortage_for_the_source_is_seen_on_a_shared_file_system_only(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path / "small", f"{300 * PAGE}") as small:
        sides = Sides(small / "source", small / "destination")

        async def body() -> None:
            copy = sides.transport()
            assert copy.shortage() is None
            put(sides.source, {page: noise(page) for page in range(60)})
            await copy.open()
            try:
                # 180 are left, and the source may touch 140 more
                assert copy.shortage() is None
                put(sides.source, {page: noise(page) for page in range(60, 95)})
                # 145 are left: for 105 of the source, and 35 to be copied
                assert copy.shortage() is None
                with (small / "other").open("wb") as file:
                    file.write(bytes(6 * PAGE))
                lack = copy.shortage()
                assert lack is not None
                assert (lack.needed_bytes, lack.free_bytes) == (140 * PAGE, 139 * PAGE)
                assert "share a file system" in str(lack)
            finally:
                await copy.close()

        try:
            asyncio.run(body())
        finally:
            sides.end()


def test_a_shortage_of_the_destination_alone_is_none_of_the_source(tight: Tight) -> None:
    async def body() -> None:
        copy = tight.copy
        await copy.open()
        try:
            tight.fill()
            put(tight.sides.source, {1: noise(1)})
            assert copy.shortage() is None
        finally:
            await copy.close()

    asyncio.run(body())


def test_room_of_a_file(tight: Tight) -> None:
    ram = tight.sides.destination
    put(ram, {1: noise(1)})
    with ram.path.open("rb") as file:
        found = room_of(file.fileno(), ram.block)
    assert found == Room(os.stat(ram.path).st_dev, 200 * PAGE, PAGE, 99 * PAGE)


# -- reserving, on another host -----------------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 3])
def test_the_receiver_reserves_and_gives_back(tmp_path: Path, streams: int) -> None:
    sizes = {"ram": 200, "more": 3}

    async def body(shm: Path, small: Path) -> None:
        async with connected(
            *(shm, sizes),
            destination_directory=small,
            prepare=lambda source, _: put(
                source.rams["ram"], {page: noise(page) for page in range(0, 180, 2)}
            ),
            streams=streams,
        ) as hosts:
            ram = hosts.destination.rams["ram"]
            assert ram.allocated() == 90
            with (small / "filler").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 10 * PAGE)
            sent = await hosts.copy.send(hosts.source.full(), hosts.source.data())
            assert sent.error is None
            assert hosts.differing() == {"ram": set(), "more": set()}
            with pytest.raises(NoSpace, match="has not touched yet"):
                await hosts.copy.check_room()
            os.truncate(small / "filler", 0)
            with pytest.raises(NoSpace, match="has not touched yet") as error:
                await hosts.copy.check_room()
            assert error.value.needed_bytes == 113 * PAGE
            await hosts.copy._session.ask("abort", reason="the test is over")
            assert ram.allocated() == 0
        assert (await hosts.receiving).state == "never"

    with small_tmpfs(tmp_path / "small", f"{100 * PAGE}") as small, shm_directory() as shm:
        asyncio.run(asyncio.wait_for(body(shm, small), 120))


def test_a_receiver_without_space_says_so(tmp_path: Path) -> None:
    async def body(shm: Path, small: Path) -> None:
        with pytest.raises(NoSpace, match="destination's RAM needs") as error:
            async with connected(
                *(shm, {"ram": 200}),
                destination_directory=small,
                prepare=lambda source, _: put(
                    source.rams["ram"], {page: noise(page) for page in range(130)}
                ),
            ):
                raise AssertionError("it was opened")
        assert error.value.missing_bytes == 30 * PAGE
        assert (small / "destination" / "ram").stat().st_blocks == 0

    with small_tmpfs(tmp_path / "small", f"{100 * PAGE}") as small, shm_directory() as shm:
        asyncio.run(asyncio.wait_for(body(shm, small), 120))


@pytest.mark.parametrize(
    ("step", "blob", "arguments"),
    [
        ("reserve", b"", {}),
        ("reserve", bytes(8 * 5), {}),
        ("reserve", bytes(7), {}),
        ("reserve", b"\xff" * 8 * 4, {}),  # past the last of 200 units
        ("room", b"", {"held": [1, 2], "growth": 3}),
        ("room", b"", {"held": "x", "growth": 3}),
        ("room", b"", {"held": [1]}),
    ],
)
def test_nonsense_is_refused_and_the_receiver_goes_on(
    step: str, blob: bytes, arguments: dict[str, object]
) -> None:
    async def body(shm: Path) -> None:
        async with connected(shm, {"ram": 200}) as hosts:
            with pytest.raises((LinkError, VmError)):
                await hosts.copy._session.ask(step, blob, **arguments)
            put(hosts.source.rams["ram"], {1: noise(1)})
            sent = await hosts.copy.send(hosts.source.full(), hosts.source.data())
            assert sent.error is None
            assert hosts.differing() == {"ram": set()}
            await hosts.copy.check_room()

    with shm_directory() as shm:
        asyncio.run(asyncio.wait_for(body(shm), 120))
