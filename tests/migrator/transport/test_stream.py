"""Pages over real connections, from the RAM of one process to that of another.

What arrived is found by looking at all bytes of both.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from migrator.errors import LinkError, LinkLost
from migrator.link import envelope, keys
from migrator.link.session import Applied
from migrator.transport import Sent, frames, stream
from migrator.transport.arrivals import Target
from migrator.transport.stream import StreamCopy
from tests.live.conftest import hugetlbfs  # noqa: F401 (a fixture)
from tests.migrator.streaming import LOOPBACK, NEVER, Cut, Hosts, Side, connected
from tests.pagesets import page_set
from tests.tracker import naive
from tests.tracker.mapper import PAGE, shm_directory, small_tmpfs
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet

_T = TypeVar("_T")
ODD = 512 * 2 + 64 + 7
"""Pages: two chunks of 2 MiB and a part of one, a word of pages and a part of one."""
SIZES = {"ram": ODD, "more": 3, "most": 20_000}
"""The last is more than one part of the work."""


@pytest.fixture
def shm() -> Iterator[Path]:
    with shm_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of this host."""
    home = tmp_path_factory.mktemp("keys") / "ca"
    keys.init(home, [LOOPBACK])
    return home / LOOPBACK


def run(body: Callable[[], Awaitable[_T]]) -> _T:
    async def limited() -> _T:
        return await asyncio.wait_for(body(), 120)

    return asyncio.run(limited())


def noise(seed: int, npages: int = 1) -> bytes:
    return random.Random(seed).randbytes(npages * PAGE)


def scatter(source: Side, destination: Side) -> None:
    """Data, zeros and holes of every kind on either side, at every edge."""
    choose = random.Random(7)
    for name in source.rams:
        for ram in (source.rams[name], destination.rams[name]):
            npages = ram.npages
            edges = {0, 1, 63, 64, 511, 512, 1023, 1024, npages - 2, npages - 1}
            for page in sorted({p for p in edges if 0 <= p < npages} | some(choose, npages)):
                kind = choose.choice(["noise", "noise", "same", "zeros"])
                if kind == "zeros":
                    ram.fill(page, 0)
                else:
                    ram.write(page, noise(page if kind == "same" else choose.randrange(10**9)))


def some(choose: random.Random, npages: int) -> set[int]:
    first = choose.randrange(npages)
    return {*range(first, min(first + 300, npages)), *(choose.randrange(npages) for _ in range(40))}


def everywhere(source: Side, _: Side) -> None:
    """Every page of the source has a content of its own."""
    for ram in source.rams.values():
        ram.path.write_bytes(noise(ram.npages, ram.npages))


NOTHING: dict[str, set[int]] = {name: set() for name in SIZES}


# -- what is dirty arrives ------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("secured", [False, True])
@pytest.mark.parametrize("compress", ["none", "zstd", "auto"])
def test_everything_arrives(
    shm: Path, certified: Path, secured: bool, compress: str, streams: int
) -> None:
    async def body() -> None:
        link: dict[str, Any] = {"streams": streams, "compress": compress}
        secure = certified if secured else None
        async with connected(shm, SIZES, keys=secure, prepare=scatter, **link) as hosts:
            allocated = {n: ram.allocated() for n, ram in hosts.source.rams.items()}
            sent = await hosts.copy.send(hosts.source.full(), hosts.source.data())
            assert (sent.error, sent.undelivered, sent.reconnected) == (None, None, False)
            assert hosts.differing() == NOTHING
            assert sent.pages == sum(SIZES.values()) == hosts.copy.sent_pages
            assert sent.bytes == (sent.pages - sent.zero_pages) * PAGE
            assert sent.wire_bytes > (sent.bytes if compress == "none" else 0)
            assert {n: r.allocated() for n, r in hosts.source.rams.items()} == allocated
            found = await hosts.copy.compare()
            assert (found.pages, found.mismatched) == (sum(SIZES.values()), 0)
            # a destination's page of zeros may stay; what it had where the source has a hole not
            for name, ram in hosts.destination.rams.items():
                assert ram.allocated() <= allocated[name] + ram.content().count(bytes(PAGE))

    run(body)


def test_only_what_is_dirty_is_touched(shm: Path) -> None:
    async def body() -> None:
        async with connected(shm, SIZES, prepare=scatter) as hosts:
            before = {n: ram.content() for n, ram in hosts.destination.rams.items()}
            differed = hosts.differing()
            choose = random.Random(1)
            dirty = {n: some(choose, npages) for n, npages in SIZES.items()}
            sent = await hosts.copy.send(hosts.source.pages(dirty), hosts.source.data())
            assert sent.pages == sum(map(len, dirty.values()))
            left = {n: differed[n] - dirty[n] for n in SIZES}
            assert left != NOTHING
            assert hosts.differing() == left
            for name, ram in hosts.destination.rams.items():
                after = ram.content()
                for page in set(range(ram.npages)) - dirty[name]:
                    at = slice(page * PAGE, (page + 1) * PAGE)
                    assert after[at] == before[name][at]

    run(body)


def test_nothing_to_send_is_acknowledged_too(shm: Path) -> None:
    async def body() -> None:
        async with connected(shm, SIZES) as hosts:
            assert await hosts.copy.send(hosts.source.pages({}), hosts.source.data()) == Sent()

    run(body)


# -- what differs is found ------------------------------------------------------------------------


DIFFER: dict[str, set[int]] = {
    "ram": {0, 511, 512, 1023, 1024, ODD - 1},
    "more": {2},
    "most": {0, 16383, 16384, 19_999},
}


@pytest.mark.parametrize("secured", [False, True])
def test_what_differs_is_found_and_nothing_else(shm: Path, certified: Path, secured: bool) -> None:
    async def body() -> None:
        secure = certified if secured else None
        async with connected(shm, SIZES, keys=secure, prepare=scatter) as hosts:
            await hosts.copy.send(hosts.source.full(), hosts.source.data())
            for name, numbers in DIFFER.items():
                for number in numbers:
                    last = PAGE - 1  # one byte of it
                    byte = hosts.destination.rams[name].content()[number * PAGE + last]
                    hosts.destination.rams[name].write(number, bytes([byte ^ 1]), last)
            assert hosts.differing() == DIFFER
            found = await hosts.copy.compare()  # which looks anew at what the file holds
            assert found.mismatched == sum(map(len, DIFFER.values()))

            changed = await hosts.copy.changed(hosts.source.full(), hosts.source.data())
            assert changed == hosts.source.pages(DIFFER)
            asked = {"ram": {0, 1, 512}, "most": {5, 16384}}
            changed = await hosts.copy.changed(hosts.source.pages(asked), hosts.source.data())
            assert changed == hosts.source.pages({"ram": {0, 512}, "most": {16384}})

            sent = await hosts.copy.send(changed, hosts.source.data())
            assert sent.pages == 3
            found = await hosts.copy.compare()
            assert found.mismatched == sum(map(len, DIFFER.values())) - 3

    run(body)


def test_a_hole_is_equal_to_zeros_and_stays_one(shm: Path) -> None:
    """Either side has holes where the other has zeros; data against a hole differs."""

    def prepare(source: Side, destination: Side) -> None:
        for page in (1, 600):
            source.rams["ram"].fill(page, 0)
        for page in (2, 601, ODD - 1):
            destination.rams["ram"].fill(page, 0)
        source.rams["ram"].fill(3, 9)
        destination.rams["ram"].fill(4, 9)

    async def body() -> None:
        async with connected(shm, {"ram": ODD}, prepare=prepare) as hosts:
            sides = hosts.source.rams["ram"], hosts.destination.rams["ram"]
            before = [ram.allocated() for ram in sides]
            assert (await hosts.copy.compare()).mismatched == 2
            found = await hosts.copy.changed(hosts.source.full(), hosts.source.data())
            assert found == hosts.source.pages({"ram": {3, 4}})
            assert [ram.allocated() for ram in sides] == before

    run(body)


# -- huge pages -----------------------------------------------------------------------------------


HUGE = 2 << 20


@pytest.mark.live
@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_huge_pages(hugetlbfs: Path, compress: str) -> None:  # noqa: F811
    """Sent unit by unit, told page by page; a page that nobody has stays away."""

    def write(side: Side, page: int, unit: int, byte: int, nunits: int = 1) -> None:
        at = side.rams["ram"].hva + page * HUGE + unit * PAGE
        side.mapper(f"write({at}, {byte}, {nunits * PAGE})")

    def prepare(source: Side, destination: Side) -> None:
        write(source, 0, 3, 7)
        write(source, 0, 511, 7)
        write(destination, 1, 5, 9)
        for side in (source, destination):
            write(side, 2, 0, 8, 512)
        write(destination, 2, 100, 0)

    def some(*pages: int) -> PageSet:
        return page_set({"ram": DirtyBitmap.from_pages(4, list(pages))}, 2 << 20)

    async def body() -> None:
        async with connected(
            hugetlbfs, {"ram": 4 * 512}, prepare=prepare, compress=compress
        ) as hosts:
            data = some(0, 2)
            assert await hosts.copy.changed(some(0, 1, 2, 3), data) == some(0, 1, 2)
            sent = await hosts.copy.send(some(0, 1, 2, 3), data)
            assert (sent.error, sent.pages, sent.bytes) == (None, 4, (2 + 512) * PAGE)
            assert hosts.differing() == {"ram": set()}
            file = hosts.destination.rams["ram"].path.stat()
            assert file.st_blocks * 512 == 3 * HUGE
            assert (await hosts.copy.compare()).mismatched == 0

            write(hosts.destination, 1, 511, 1)
            assert (await hosts.copy.compare()).mismatched == 1
            assert await hosts.copy.changed(some(0, 1, 2, 3), data) == some(1)

    run(body)


# -- a connection that breaks ---------------------------------------------------------------------


def first_bytes(*, secured: bool = False) -> int:
    """How much a stream's connection says before its first frame, roughly if it is secured."""
    greeting = envelope.message({"purpose": "stream", "session": "0" * 32, "stream": 0, "round": 0})
    return len(envelope.opening()) + len(greeting) + (2500 if secured else 0)


FIRST_ANSWER = len(envelope.opening()) + len(envelope.message({"round": 0, "frames": 0}))
FRAME = (
    frames.FRAME_SIZE + frames.RUN_SIZE + frames.CONTENT_LIMIT
)  # of pages that follow each other
BIG = {"ram": 256 * 24 + 7}


def pages_in(bitmaps: PageSet | None) -> dict[str, set[int]]:
    assert bitmaps is not None
    return {name: naive.pages_of(bitmap.words) for name, bitmap in bitmaps.items()}


async def check_undelivered(hosts: Hosts, sent: Sent) -> set[int]:
    """Nothing is missing at the destination but what is said to be; return that."""
    assert sent.error is None
    missing = pages_in(sent.undelivered)["ram"] if sent.undelivered is not None else set()
    assert hosts.differing()["ram"] <= missing
    return missing


async def deliver(hosts: Hosts, sent: Sent) -> None:
    """What was undelivered arrives with the next sending."""
    assert sent.undelivered is not None
    again = await hosts.copy.send(sent.undelivered, hosts.source.data())
    assert (again.error, again.undelivered) == (None, None)
    assert hosts.differing() == {"ram": set()}


@pytest.mark.parametrize("frame", [0, 1, 5, 11])
@pytest.mark.parametrize("into", [0, 1, frames.FRAME_SIZE, frames.FRAME_SIZE + 17, FRAME - 1])
def test_what_did_not_arrive_is_known(shm: Path, frame: int, into: int) -> None:
    """Cut after so many frames, and so many bytes of the next: one stream, so it is exact."""

    async def body() -> None:
        cut = Cut(up=first_bytes() + frame * FRAME + into)
        async with connected(shm, BIG, prepare=everywhere, cuts=[NEVER, cut], streams=1) as hosts:
            sent = await hosts.copy.send(hosts.source.full(), hosts.source.data())
            missing = await check_undelivered(hosts, sent)
            assert missing == set(range(frame * 256, BIG["ram"])) == hosts.differing()["ram"]
            assert "the source is back" in hosts.said
            await deliver(hosts, sent)

    run(body)


@pytest.mark.parametrize("secured", [False, True])
@pytest.mark.parametrize("streams", [1, 3])
def test_cut_wherever_it_may_be(shm: Path, certified: Path, streams: int, secured: bool) -> None:
    """Some stream, some byte, again and again; the guest writes meanwhile."""

    async def body() -> None:
        choose = random.Random(streams)
        begun = first_bytes(secured=secured)

        def cuts() -> list[Cut]:
            each = [Cut(up=begun + choose.randrange(9 * FRAME)) for _ in range(streams)]
            return [NEVER, *[cut if choose.random() < 0.7 else NEVER for cut in each]]

        async with connected(
            shm,
            BIG,
            prepare=everywhere,
            cuts=cuts(),
            streams=streams,
            keys=certified if secured else None,
        ) as hosts:
            owed = hosts.source.full()
            broken = 0
            for number in range(8):
                hosts.way.cuts = cuts()
                sent = await hosts.copy.send(owed, hosts.source.data())
                missing = await check_undelivered(hosts, sent)
                broken += bool(missing)
                written = {choose.randrange(BIG["ram"]) for _ in range(1500)}
                for page in written:
                    hosts.source.rams["ram"].write(page, noise(1000 * number + page)[:64])
                owed = hosts.source.pages({"ram": missing | written})
            hosts.way.cuts = []
            last = await hosts.copy.send(owed, hosts.source.data())
            while last.undelivered is not None:
                last = await hosts.copy.send(last.undelivered, hosts.source.data())
            assert last.error is None
            assert hosts.differing() == {"ram": set()}
            assert broken >= 3

    run(body)


@pytest.mark.parametrize("down", [0, 5, 15])
def test_a_lost_acknowledgement_is_made_up_for(shm: Path, down: int) -> None:
    """All has arrived, which the source learns when it is back: nothing is sent twice."""

    async def body() -> None:
        cuts = [NEVER, Cut(down=FIRST_ANSWER + down)]
        async with connected(shm, BIG, prepare=everywhere, cuts=cuts, streams=1) as hosts:
            sent = await hosts.copy.send(hosts.source.full(), hosts.source.data())
            assert hosts.differing() == {"ram": set()}
            assert sent.error is None
            assert sent.reconnected
            assert pages_in(sent.undelivered) == {"ram": set()}
            assert "the source is back" in hosts.said

    run(body)


CONTROL_ANSWER = len(envelope.opening()) + len(envelope.message({}))


@pytest.mark.parametrize(
    "again",
    [
        # nothing of the way back is heard: to resume, or of the stream
        [Cut(down=CONTROL_ANSWER - 1)],
        [NEVER, Cut(down=FIRST_ANSWER - 1)],
        [NEVER, Cut(up=5)],
        [NEVER, Cut(down=FIRST_ANSWER - 1), NEVER, Cut(down=3), Cut(up=0), NEVER, Cut(down=9)],
    ],
)
def test_the_way_back_breaks_too(shm: Path, again: list[Cut]) -> None:
    async def body() -> None:
        cuts = [NEVER, Cut(up=first_bytes() + 5 * FRAME + 100), *again]
        async with connected(shm, BIG, prepare=everywhere, cuts=cuts, streams=1) as hosts:
            sent = await hosts.copy.send(hosts.source.full(), hosts.source.data())
            missing = await check_undelivered(hosts, sent)
            assert sent.reconnected
            assert missing == set(range(5 * 256, BIG["ram"]))
            assert hosts.way.cuts == []
            assert len(hosts.way.up) > 2 + len(again)
            await deliver(hosts, sent)

    run(body)


def forgetful(self: Applied, number: int) -> int | None:
    """As if what was told of one round could be said of another."""
    return None if self.round > number else self.frames


@pytest.mark.parametrize("remembers", [True, False])
def test_what_arrived_of_an_earlier_round_is_not_taken_for_this_one(
    shm: Path, monkeypatch: pytest.MonkeyPatch, remembers: bool
) -> None:
    """Round 0 breaks after five frames, and the next one before any: pages would be lost."""
    if not remembers:
        monkeypatch.setattr(Applied, "of_round", forgetful)

    async def body() -> None:
        cuts = [
            *(NEVER, Cut(up=first_bytes() + 5 * FRAME + 100)),
            *(NEVER, Cut(up=first_bytes() + FRAME // 2)),
        ]
        async with connected(shm, BIG, prepare=everywhere, cuts=cuts, streams=1) as hosts:
            first = await hosts.copy.send(hosts.source.full(), hosts.source.data())
            assert first.undelivered is not None
            again = await hosts.copy.send(first.undelivered, hosts.source.data())
            missing = pages_in(again.undelivered)["ram"]
            assert (hosts.differing()["ram"] <= missing) is remembers
            assert (len(missing) == BIG["ram"] - 5 * 256) is remembers

    run(body)


def test_while_the_guest_stands_nothing_is_waited_for(shm: Path) -> None:
    async def body() -> None:
        cuts = [NEVER, Cut(up=first_bytes() + 5 * FRAME)]
        async with connected(shm, BIG, prepare=everywhere, cuts=cuts, streams=1) as hosts:
            full = hosts.source.full()
            sent = await hosts.copy.send(full, hosts.source.data(), guest_stands=True)
            assert isinstance(sent.error, LinkLost)
            assert sent.undelivered == full
            assert "the source is back" not in hosts.said

    run(body)


def test_a_guest_does_not_stand_for_a_comparison_that_takes_for_ever(
    shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = threading.Event()
    digests = Target.digests

    def held(*arguments: Any) -> Any:
        slow.wait()
        return digests(*arguments)

    async def body() -> None:
        async with connected(shm, SIZES, prepare=everywhere) as hosts:
            some = hosts.source.pages({"ram": {0, 1}})
            data = hosts.source.data()
            monkeypatch.setattr(Target, "digests", held)
            monkeypatch.setattr(stream, "_STANDING_S", 0.3)
            try:
                while_it_runs = asyncio.create_task(hosts.copy.changed(some, data))
                done, _ = await asyncio.wait([while_it_runs], timeout=1.0)
                assert not done
                slow.set()
                assert await while_it_runs == some
                slow.clear()
                with pytest.raises(LinkLost, match=r"took more than 0\.3"):
                    await hosts.copy.changed(some, data, guest_stands=True)
            finally:
                slow.set()

    run(body)


def test_a_receiver_that_is_gone_is_an_error(shm: Path) -> None:
    async def body() -> None:
        cuts = [NEVER, Cut(up=first_bytes() + 5 * FRAME)]
        async with connected(
            shm, BIG, prepare=everywhere, cuts=cuts, streams=1, reconnect_s=1.0
        ) as hosts:
            hosts.way.cuts = [Cut(down=0)] * 1000
            sent = await hosts.copy.send(hosts.source.full(), hosts.source.data())
            assert isinstance(sent.error, LinkLost)
            assert sent.undelivered == hosts.source.full()

    run(body)


# -- the destination has no room ------------------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 3])
def test_a_destination_that_is_full(shm: Path, tmp_path: Path, streams: int) -> None:
    """Both sides learn why, and the receiver does not die of it."""

    async def body() -> None:
        half = BIG["ram"] // 2 * PAGE
        with small_tmpfs(tmp_path / "small", f"{half}") as small:
            async with connected(shm, BIG, destination_directory=small, streams=streams) as hosts:
                everywhere(hosts.source, hosts.destination)
                sent = await hosts.copy.send(hosts.source.full(), hosts.source.data())
                assert isinstance(sent.error, LinkError)
                assert "No space left on device" in str(sent.error)
                assert sent.undelivered == hosts.source.full()
                assert "gave up: [Errno 28] writing RAM 'ram': No space left on device" in (
                    hosts.said
                )
                assert hosts.waiting.closed == "[Errno 28] writing RAM 'ram': " + (
                    "No space left on device"
                )
            assert (await hosts.receiving).state == "never"

    run(body)


# -- how it is sent -------------------------------------------------------------------------------


def packed_bytes(copy: StreamCopy) -> int:
    return sum(stream.packer.packed_bytes for stream in copy._streams)


@pytest.mark.parametrize(
    ("compress", "packs"), [("none", "no"), ("zstd", "all"), ("zstd:9", "all"), ("auto", "some")]
)
def test_what_is_compressed(shm: Path, compress: str, packs: str) -> None:
    """Whether text is compressed; noise never is, since it gets no smaller."""
    npages = 256 * 40

    def prepare(source: Side, _: Side) -> None:
        text = b"".join(b"a line of text, and its number is %d\n" % i for i in range(200_000))
        source.rams["ram"].path.write_bytes((text * 10)[: npages * PAGE])
        source.rams["noise"].path.write_bytes(noise(5, npages))

    async def body() -> None:
        sizes = {"ram": npages, "noise": npages}
        async with connected(shm, sizes, prepare=prepare, compress=compress, streams=1) as hosts:
            data = hosts.source.data()
            dirty = hosts.source.pages({"ram": set(range(npages))})
            sent = await hosts.copy.send(dirty, data)
            assert sent.bytes == npages * PAGE
            packed = packed_bytes(hosts.copy)
            if packs == "no":
                assert packed == 0
                assert sent.wire_bytes > sent.bytes
            elif packs == "all":
                assert packed == sent.bytes
                assert sent.wire_bytes < sent.bytes / 3
            else:
                assert packed > 0

            dirty = hosts.source.pages({"noise": set(range(npages))})
            sent = await hosts.copy.send(dirty, data)
            assert packed_bytes(hosts.copy) == packed
            assert sent.wire_bytes > sent.bytes
            assert hosts.differing() == {"ram": set(), "noise": set()}

    run(body)


@pytest.mark.thorough
def test_auto_leaves_what_is_not_worth_it(shm: Path) -> None:
    """On a link this fast, content that gets hardly smaller is sent as it is, most of the time."""
    npages = 256 * 120

    def prepare(source: Side, _: Side) -> None:
        # one byte in nine is known: it can be packed, at some cost
        pieces = random.Random(3).randbytes(npages * PAGE // 9 * 8 + 8)
        content = b"".join(pieces[i : i + 8] + b"\0" for i in range(0, len(pieces), 8))
        source.rams["ram"].path.write_bytes(content[: npages * PAGE])

    async def body() -> None:
        async with connected(
            shm, {"ram": npages}, prepare=prepare, compress="auto", streams=1
        ) as hosts:
            data = hosts.source.data()
            for _ in range(4):
                sent = await hosts.copy.send(hosts.source.full(), data)
                assert sent.bytes == npages * PAGE
            packed = packed_bytes(hosts.copy)
            assert 0 < packed < 4 * sent.bytes // 2

    run(body)


@pytest.mark.parametrize("streams", [1, 3])
def test_a_limit_is_kept_by_all_streams_together(shm: Path, streams: int) -> None:
    """Generously: no faster than the limit, and, on a machine that is busy, not half as fast."""
    rate = 30e6

    async def body() -> None:
        async with connected(
            shm, BIG, prepare=everywhere, streams=streams, bandwidth_bytes_per_s=rate
        ) as hosts:
            started = time.monotonic()
            sent = await hosts.copy.send(hosts.source.full(), hosts.source.data())
            spent_s = time.monotonic() - started
            assert sent.wire_bytes / rate / 2 < spent_s < sent.wire_bytes / rate * 2 + 1
            assert sent.least_s == pytest.approx(sent.wire_bytes / rate)

    run(body)


@pytest.mark.parametrize("paced", [True, False])
def test_cancelled_in_the_middle(shm: Path, paced: bool) -> None:
    """It ends at once, also where it waits for its turn, or for a receiver that takes nothing."""

    async def body() -> None:
        link: dict[str, Any] = {"bandwidth_bytes_per_s": 1e6} if paced else {}
        async with connected(shm, BIG, prepare=everywhere, **link) as hosts:
            sending = asyncio.create_task(hosts.copy.send(hosts.source.full(), hosts.source.data()))
            while hosts.copy.sent_pages < 256:
                await asyncio.sleep(0.001)
            sending.cancel()
            started = time.monotonic()
            with pytest.raises(asyncio.CancelledError):
                await sending
            assert time.monotonic() - started < 10
            assert 0 < hosts.copy.sent_pages < BIG["ram"]

    run(body)
