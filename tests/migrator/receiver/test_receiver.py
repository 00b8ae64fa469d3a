"""A source that lies, asks for the impossible, or for everything at once; and strangers.

The receiver is real, and so are its connections and its RAM; of QEMU there is a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import zstandard

from migrator.errors import LinkError
from migrator.link import envelope
from migrator.migration.destination import LocalDestination
from migrator.qemu.qmp import Qmp
from migrator.receiver import receiver as receiver_module
from migrator.receiver.door import listen
from migrator.receiver.incoming import Outcome
from migrator.receiver.receiver import Receiver
from migrator.transport import frames
from migrator.transport.frames import CONTENT_LIMIT, DIGESTS_LIMIT, Frame, Kind, Packing
from migrator.transport.runs import UNIT
from tests.migrator.strangers import Stranger, ask
from tests.migrator.streaming import LOOPBACK, Side, Waiting, connected
from tests.tracker.mapper import PAGE, shm_directory

SIZES = {"ram": 600, "more": 3}
OPEN: dict[str, Any] = {
    "session": "token",
    "blocks": ["ram", "more"],
    "reconnect_s": 30.0,
    "silence_s": 10.0,
}


@pytest.fixture
def shm() -> Iterator[Path]:
    with shm_directory() as directory:
        yield directory


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(body(), 60)

    asyncio.run(limited())


@dataclass
class Place:
    """A receiver.

    :ivar said: what it said for people
    """

    port: int
    side: Side
    receiver: Receiver
    receiving: asyncio.Task[Outcome]
    said: list[str] = field(default_factory=list)

    async def source(self, **changes: Any) -> Stranger:
        """A source that has opened a session."""
        stranger = await Stranger.connect(self.port, {"purpose": "migrate"})
        assert await stranger.hear() == {}
        assert await stranger.ask("open", **{**OPEN, **changes}) == {}
        return stranger

    async def stream(self, index: int = 0) -> Stranger:
        greeting = {"purpose": "stream", "session": "token", "stream": index, "round": 0}
        stranger = await Stranger.connect(self.port, greeting)
        assert await stranger.hear() == {"round": 0, "frames": 0}
        return stranger

    async def resolve(self, decide: object = None) -> dict[str, Any]:
        return await ask(self.port, {"purpose": "resolve", "session": "", "decide": decide})

    def descriptors(self) -> int:
        """How many of this process's are of the RAM."""
        found = 0
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found += os.readlink(f"/proc/self/fd/{number}").startswith("/dev/shm/")
        return found

    def memory(self) -> dict[str, bytes]:
        return {name: ram.content() for name, ram in self.side.rams.items()}


@asynccontextmanager
async def place(
    directory: Path, destination: LocalDestination | None = None
) -> AsyncIterator[Place]:
    side = Side(directory / "destination", SIZES)
    listener = listen(LOOPBACK, 0)
    try:
        waiting = Waiting(side)
        if destination is None:
            destination = LocalDestination(cast(Qmp, waiting))
        else:
            cast(Any, destination).qmp = waiting
        said: list[str] = []
        receiver = Receiver(destination, None, None, said.append)
        receiving = asyncio.create_task(receiver.serve(listener))
        yield Place(listener.getsockname()[1], side, receiver, receiving, said)
        receiver.stop()
        await receiving
    finally:
        listener.close()
        side.end()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver_module, "_TELLING_S", 0.05)


# -- what is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": ["ram", "none of this name"]},
        {"blocks": ["ram", "ram"]},
        {"blocks": "ram"},
        {"blocks": ["ram"] * 2000},
        {"blocks": [["ram"]]},
        {"blocks": None},
        {"reconnect_s": "soon"},
        {"reconnect_s": None},
        {"silence_s": 1e-9},
        {"silence_s": 10**400},
        {"reconnect_s": 10**400},
    ],
)
def test_an_open_that_makes_no_sense(shm: Path, change: dict[str, Any]) -> None:
    async def body() -> None:
        async with place(shm) as here:
            stranger = await Stranger.connect(here.port, {"purpose": "migrate"})
            assert await stranger.hear() == {}
            before = here.descriptors()
            answer = await stranger.ask("open", **{**OPEN, **change})
            assert answer.keys() == {"no"}, answer
            assert here.descriptors() == before
            # and now in earnest, on the same connection
            assert await stranger.ask("open", **OPEN) == {}
            assert here.descriptors() > before
            stranger.close()

    run(body)


def test_of_two_who_open_at_once_one_is_let_in(shm: Path) -> None:
    async def body() -> None:
        async with place(shm) as here:
            one = await here.source()
            held = here.descriptors()
            assert await one.ask("abort", reason="enough") == {}

        async with place(shm / "again") as here:
            strangers = [
                await Stranger.connect(here.port, {"purpose": "migrate"}) for _ in range(8)
            ]
            for stranger in strangers:
                assert await stranger.hear() == {}
            answers = await asyncio.gather(
                *(s.ask("open", **{**OPEN, "session": str(i)}) for i, s in enumerate(strangers))
            )
            (first,) = [i for i, answer in enumerate(answers) if answer == {}]
            others = [answer for i, answer in enumerate(answers) if i != first]
            assert others == [{"no": "another migration is being received here"}] * 7
            assert here.descriptors() == held
            assert await strangers[first].ask("look-anew") == {}
            assert "no" in await strangers[first - 1].ask("look-anew")
            assert "no" in await strangers[first - 1].ask("look")
            for stranger in strangers:
                stranger.close()

    (shm / "again").mkdir()
    run(body)


def test_steps_out_of_order_are_refused_and_change_nothing(shm: Path) -> None:
    async def body() -> None:
        async with place(shm) as here:
            source = await here.source()
            state = b"device state"
            for what, blob, arguments in (
                ("go", b"", {"run": True}),
                ("bye", b"", {}),
                ("load", state, {"end": 1, "timeout_s": 5}),
                ("load", state, {"end": 0, "timeout_s": 5}),
                ("load", state, {"end": -1, "timeout_s": 5}),
                ("load", state, {"end": 13, "timeout_s": 5}),
                ("load", state, {"end": "1", "timeout_s": []}),
                ("load", state, {"end": 10**400, "timeout_s": 5}),
                ("load", state, {}),
                ("open", b"", OPEN),
            ):
                answer = await source.ask(what, blob, **arguments)
                assert answer.keys() <= {"no", "vm"}, (what, answer)
                assert answer, what
                assert await source.ask("ping") == {}
                assert (await here.resolve())["state"] == "open"
            assert not here.receiving.done()

            # somebody else's connection has no say
            other = await Stranger.connect(here.port, {"purpose": "migrate"})
            assert await other.hear() == {}
            for what in ("prepare", "begin-loading", "look-anew", "load", "go", "abort", "bye"):
                answer = await other.ask(what, end=1, timeout_s=1, run=True, reason="")
                assert answer == {"no": "no migration was opened on this connection"}
                if what in ("abort", "bye"):
                    break
            assert (await here.resolve())["state"] == "open"
            assert await source.ask("look-anew") == {}
            assert await source.ask("abort", reason="enough") == {}
            assert (await here.receiving).state == "never"

    run(body)


def test_something_unknown_is_hung_up_on(shm: Path) -> None:
    async def body() -> None:
        async with place(shm) as here:
            for greeting in ({"purpose": "conquer"}, {}, {"purpose": ["migrate"]}):
                assert "purpose" in (await ask(here.port, greeting))["no"]
            source = await here.source()
            source.write({"do": ["open"]})
            assert await source.rest() == b""
            assert any("lost the source (open)" in line for line in here.said)

    run(body)


@pytest.mark.parametrize("session", ["another", None, ["token"], 7, ""])
@pytest.mark.parametrize("purpose", ["resume", "stream"])
def test_a_session_is_not_guessed(shm: Path, purpose: str, session: object) -> None:
    async def body() -> None:
        async with place(shm) as here:
            source = await here.source()
            greeting = {"purpose": purpose, "session": session, "stream": 0, "round": 0}
            answer = await ask(here.port, greeting)
            assert re.search("no such migration|makes no sense: session", answer["no"])
            assert await source.ask("ping") == {}
            source.close()

    run(body)


@pytest.mark.parametrize(
    "change", [{"stream": -1}, {"stream": 32}, {"stream": "x"}, {"round": None}, {"round": 1e999}]
)
def test_a_stream_that_makes_no_sense(shm: Path, change: dict[str, Any]) -> None:
    async def body() -> None:
        async with place(shm) as here:
            source = await here.source()
            greeting = {"purpose": "stream", "session": "token", "stream": 0, "round": 0, **change}
            stranger = await Stranger.connect(here.port)
            text = json.dumps(greeting).replace("Infinity", "1e999")
            stranger.writer.write(
                envelope.opening() + struct.pack("<II", len(text), 0) + text.encode()
            )
            await stranger.reader.readexactly(envelope.OPENING_SIZE)
            assert (await stranger.hear()).keys() == {"no"}
            assert await source.ask("ping") == {}
            source.close()

    run(body)


@pytest.mark.parametrize("decide", [False, 0, "", "both", [], {}, True, "Source"])
@pytest.mark.parametrize("connection", ["stays", "lost"])
def test_a_decision_for_neither_side_decides_nothing(
    shm: Path, decide: object, connection: str
) -> None:
    async def body() -> None:
        async with place(shm) as here:
            source = await here.source()
            if connection == "lost":
                source.close()
                while not here.said[-1].startswith("lost the source"):
                    await asyncio.sleep(0.01)
            assert (await here.resolve(decide)).keys() == {"no"}
            assert (await here.resolve())["state"] == "open"
            assert not here.receiving.done()
            greeting = {"purpose": "resume", "session": "token"}
            assert await ask(here.port, greeting) == {}

    run(body)


# -- a link that breaks while QEMU takes the end --------------------------------------------------


class Slow:
    """In the place of a destination whose QEMU takes its time to go."""

    def __init__(self) -> None:
        self.told = asyncio.Event()
        self.may_end = asyncio.Event()

    async def begin_loading(self) -> None:
        pass

    async def load(self, head: bytes, end: bytes, *, timeout_s: float) -> None:
        pass

    async def go(self, *, run: bool, timeout_s: float) -> float | None:
        self.told.set()
        await self.may_end.wait()
        return None

    async def close(self, reason: str = "") -> None:
        assert self.may_end.is_set(), "given up while it goes"


def test_a_lost_link_does_not_cancel_what_it_told_to_go(
    shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one who comes back is told that it runs."""
    monkeypatch.setattr(receiver_module, "_BUSY_S", 0.02)

    async def body() -> None:
        slow = Slow()
        async with place(shm, cast(LocalDestination, slow)) as here:
            source = await here.source()
            assert await source.ask("load", b"state", end=1, timeout_s=1) == {}
            source.write({"do": "go", "run": True})
            await slow.told.wait()
            source.close()
            while not here.said[-1].startswith("lost the source (going)"):
                await asyncio.sleep(0.01)
            asking = asyncio.create_task(here.resolve("source"))
            await asyncio.sleep(0.1)
            assert not asking.done()
            slow.may_end.set()
            assert (await asking)["state"] == "running"
            assert (await here.receiving).state == "running"

    run(body)


# -- pages ----------------------------------------------------------------------------------------


def frame(
    runs: list[tuple[int, int]],
    content: bytes = b"",
    *,
    kind: int = Kind.PAGES,
    packing: int = Packing.NONE,
    block: int = 0,
    count: int | None = None,
    size: int | None = None,
) -> bytes:
    """Any frame, right or not."""
    head = struct.pack(
        "<BBHIQ",
        *(kind, packing, block, len(runs) if count is None else count),
        len(content) if size is None else size,
    )
    return head + b"".join(struct.pack("<QQ", *run) for run in runs) + content


def bomb() -> bytes:
    """A gigabyte of zeros, packed, with a window that may be."""
    parameters = zstandard.ZstdCompressionParameters(window_log=20)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    pieces = [packer.compress(bytes(1 << 20)) for _ in range(1024)]
    return b"".join([*pieces, packer.flush()])


def wide(nbytes: int) -> bytes:
    """So much content, whose packing asks for a window of 128 MiB."""
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(bytes(nbytes)) + packer.flush()


PAGE_OF_ONES = b"\1" * UNIT
LAST = 2**64 - 1
PACKED = zstandard.ZstdCompressor().compress(PAGE_OF_ONES * 2)
EVIL: dict[str, tuple[bytes, str]] = {
    "behind the block": (frame([(600, 2)], PAGE_OF_ONES), "leave the block"),
    "over its end": (frame([(599, 4)], PAGE_OF_ONES * 2), "leave the block"),
    "far away": (frame([(2**51, 2)], PAGE_OF_ONES), "leave the block"),
    "around 2**64": (frame([(LAST, 4)], PAGE_OF_ONES * 2), "leave the block"),
    "before the block": (frame([(LAST - 1, 2)], PAGE_OF_ONES), "leave the block"),
    "zeros behind the block": (frame([(599, 5)]), "leave the block"),
    "the longest": (frame([(0, LAST)]), "leave the block"),
    "overlapping": (frame([(5, 4), (6, 2)], PAGE_OF_ONES * 3), "overlap"),
    "twice": (frame([(5, 2), (5, 2)], PAGE_OF_ONES * 2), "overlap"),
    "not in order": (frame([(6, 2), (5, 2)], PAGE_OF_ONES * 2), "overlap"),
    "empty": (frame([(5, 0)]), "overlap"),
    "the second behind": (frame([(5, 2), (700, 2)], PAGE_OF_ONES * 2), "leave the block"),
    "no such block": (frame([(0, 2)], PAGE_OF_ONES, block=2), "block 2 of 2"),
    "of the other block": (frame([(3, 2)], PAGE_OF_ONES, block=1), "leave the block"),
    "no runs": (frame([]), "0 runs"),
    "too many runs": (frame([(0, 2)], count=2**32 - 1), "4294967295 runs"),
    "too much content": (frame([(0, 514)], size=CONTENT_LIMIT + UNIT), "bytes"),
    "a huge size": (frame([(0, 2)], size=LAST), "bytes"),
    "too little content": (frame([(0, 4)], size=UNIT), "for 2 units"),
    "content for zeros": (frame([(0, 3)], PAGE_OF_ONES), "for 0 units"),
    "unknown kind": (frame([(0, 2)], PAGE_OF_ONES, kind=9), "kind 9"),
    "unknown packing": (frame([(0, 2)], PAGE_OF_ONES, packing=9), "packed by 9"),
    "a round with runs": (frame([(0, 2)], kind=Kind.ROUND), "round with runs"),
    "a bomb": (frame([(0, 2 * 32)], bomb(), packing=Packing.ZSTD), "another size"),
    "one unit too many": (frame([(0, 2)], PACKED, packing=Packing.ZSTD), "another size"),
    "one unit too few": (frame([(0, 6)], PACKED, packing=Packing.ZSTD), "another size"),
    "cut": (frame([(0, 4)], PACKED[:-3], packing=Packing.ZSTD), "unpack"),
    "noise": (frame([(0, 4)], b"noise" * 9, packing=Packing.ZSTD), "does not unpack"),
    "a wide window": (frame([(0, 512)], wide(256 * UNIT), packing=Packing.ZSTD), "not unpack"),
    "digests behind": (frame([(599, 4)], bytes(8), kind=Kind.DIGESTS), "leave the block"),
    "chunks behind": (frame([(512, 1024)], bytes(8), kind=Kind.CHUNKS), "leave the block"),
    "part of a chunk": (frame([(5, 1024)], bytes(8), kind=Kind.CHUNKS), "part of a chunk"),
    "several chunks": (frame([(0, 2), (512, 2)], bytes(8), kind=Kind.CHUNKS), "not known"),
    "digests without seed": (frame([(0, 2)], size=7, kind=Kind.DIGESTS), "not known"),
    "packed digests": (frame([(0, 2)], bytes(8), kind=Kind.DIGESTS, packing=1), "not known"),
}


@pytest.mark.parametrize("name", EVIL)
def test_a_frame_that_makes_no_sense_ends_the_migration(shm: Path, name: str) -> None:
    """What came before it is there, of it nothing is, and the one that comes after is not heard."""
    evil, why = EVIL[name]

    async def body() -> None:
        async with place(shm) as here:
            source, stream = await here.source(), await here.stream()
            before = here.memory()
            wanted = {**before}
            wanted["ram"] = bytes(9 * UNIT) + PAGE_OF_ONES + bytes(590 * UNIT)
            stream.writer.write(frame([(9, 2)], PAGE_OF_ONES) + evil)
            stream.writer.write(frame([(10, 2)], PAGE_OF_ONES))
            assert await stream.rest() == b""
            assert here.memory() in (wanted, before)  # all that came is given back soon after
            assert [ram.path.stat().st_size for ram in here.side.rams.values()] == [
                npages * PAGE for npages in SIZES.values()
            ]
            told = await here.resolve()
            assert told["state"] == "never"
            assert why in told["reason"], told["reason"]
            assert f"gave up: {told['reason']}" in here.said
            for what in ("prepare", "begin-loading", "look-anew", "load", "go"):
                answer = await source.ask(what, b"x", end=1, timeout_s=1, run=True)
                assert answer == {"no": f"cannot go on: {told['reason']}"}
            answer = await ask(here.port, {"purpose": "resume", "session": "token"})
            assert answer == {"no": f"cannot go on: {told['reason']}"}
            assert await source.ask("abort", reason="found out") == {}
            assert (await here.receiving).state == "never"

    run(body)


def test_frames_that_make_sense_are_taken(shm: Path) -> None:
    """As above, but for what is wrong there."""

    async def body() -> None:
        async with place(shm) as here:
            await here.source()
            stream = await here.stream()
            ones = zstandard.ZstdCompressor().compress(PAGE_OF_ONES * 256)
            stream.writer.write(frame([(599, 2)], PAGE_OF_ONES))
            stream.writer.write(frame([(0, 512)], ones, packing=Packing.ZSTD))
            stream.writer.write(frame([(1, 3), (2, 2)], PAGE_OF_ONES))
            stream.writer.write(frame([(0, 2)], PAGE_OF_ONES, block=1))
            stream.writer.write(frame([(0, 1024)], bytes(8), kind=Kind.CHUNKS))
            stream.writer.write(frame([(598, 4)], bytes(8), kind=Kind.DIGESTS))
            stream.writer.write(frame([], kind=Kind.ROUND, size=0))
            answer = await stream.reader.readexactly(8 + 2 * 8 + frames.FRAME_SIZE)
            assert answer[-frames.FRAME_SIZE :] == Frame(Kind.ROUND, Packing.NONE, 0, 0, 0).pack()
            memory = here.memory()
            model = PAGE_OF_ONES + bytes(UNIT) + PAGE_OF_ONES * 254 + bytes(343 * UNIT)
            assert memory["ram"] == model + PAGE_OF_ONES
            assert memory["more"] == PAGE_OF_ONES + bytes(2 * UNIT)
            assert DIGESTS_LIMIT > 600
            stream.close()

    run(body)


def test_random_frames_change_no_more_than_the_block(shm: Path) -> None:
    """Runs at every edge, and noise behind them."""
    choose = random.Random(4)

    async def body() -> None:
        for number in range(60):
            (shm / str(number)).mkdir()
            async with place(shm / str(number)) as here:
                source, stream = await here.source(), await here.stream()
                edges = [0, 598, 599, 600, 2**52, LAST]
                runs = [
                    (choose.choice(edges), choose.randrange(2**10))
                    for _ in range(choose.choice([1, 2, 5]))
                ]
                stream.writer.write(frame(runs, choose.randbytes(CONTENT_LIMIT)))
                stream.writer.write(choose.randbytes(10_000))
                with contextlib.suppress(OSError):  # it may have hung up by now
                    stream.writer.write_eof()
                await stream.rest()
                assert here.memory()["more"] == bytes(3 * UNIT)
                assert [ram.path.stat().st_size for ram in here.side.rams.values()] == [
                    npages * PAGE for npages in SIZES.values()
                ]
                await source.ask("abort", reason="enough")

    run(body)


def test_nothing_is_written_once_the_vm_is_ready(shm: Path) -> None:
    """Its pages are the guest's from then on."""

    async def body() -> None:
        slow = Slow()
        slow.may_end.set()
        async with place(shm, cast(LocalDestination, slow)) as here:
            source, stream = await here.source(), await here.stream()
            assert await source.ask("load", b"state", end=1, timeout_s=1) == {}
            before = here.memory()
            stream.writer.write(frame([(9, 2)], PAGE_OF_ONES))
            assert await stream.rest() == b""
            greeting = {"purpose": "stream", "session": "token", "stream": 1, "round": 0}
            assert "no" in await ask(here.port, greeting)
            assert here.memory() == before
            assert (await source.ask("go", run=True))["state"] == "running"
            assert await source.ask("bye") == {}

    run(body)


def test_many_streams_for_one_place_leave_one(shm: Path) -> None:
    async def body() -> None:
        async with place(shm) as here:
            await here.source()
            greeting = {"purpose": "stream", "session": "token", "stream": 0, "round": 0}
            strangers = [await Stranger.connect(here.port, greeting) for _ in range(20)]
            for stranger in strangers:
                assert await stranger.hear() == {"round": 0, "frames": 0}
            hung_up = [asyncio.create_task(s.reader.read(1)) for s in strangers]
            await asyncio.wait(hung_up, timeout=1)
            assert sum(not task.done() for task in hung_up) == 1
            for task in hung_up:
                task.cancel()

    run(body)


# -- the other way round: a receiver that lies ----------------------------------------------------


@asynccontextmanager
async def liar(answers: Callable[[dict[str, Any]], dict[str, Any]]) -> AsyncIterator[int]:
    """Somebody who listens, and answers whatever is said like this."""

    async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stranger = Stranger(reader, writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            writer.write(envelope.opening())
            await reader.readexactly(envelope.OPENING_SIZE)
            while True:
                said = await stranger.hear()
                stranger.write(answers(said))

    server = await asyncio.start_server(attend, LOOPBACK, 0)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


@pytest.mark.parametrize(
    "answer",
    [{}, {"round": None, "frames": 0}, {"round": "x", "frames": 1}, {"round": 0, "frames": -1}],
)
def test_a_receiver_whose_answer_makes_no_sense(answer: dict[str, Any]) -> None:
    from migrator.link.session import Link, Session

    async def body() -> None:
        def answers(said: dict[str, Any]) -> dict[str, Any]:
            return answer if said.get("purpose") == "stream" else {}

        async with liar(answers) as port:
            session = await Session.begin(Link(LOOPBACK, port))
            with pytest.raises(LinkError, match="makes no sense"):
                await session.open(["ram"])
            session.hang_up()

    run(body)


def test_a_receiver_that_acknowledges_another_round(
    shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a link that broke, which would be tried again and again."""

    async def body() -> None:
        def prepare(source: Side, _: Side) -> None:
            source.rams["ram"].fill(0, 1)

        async with connected(shm, {"ram": 40_000}, prepare=prepare, streams=3) as hosts:
            breaks, liar, _ = hosts.copy._streams
            waits, another = breaks._read, Frame(Kind.ROUND, Packing.NONE, 0, 0, 7).pack()
            monkeypatch.setattr(breaks, "_read", lambda size: waits(size + 1))
            monkeypatch.setattr(liar, "_read", lambda size: another)
            sent = await hosts.copy.send(hosts.source.full(), hosts.source.data())
            assert sent.error is not None
            assert "acknowledges another round" in str(sent.error)
            assert sent.undelivered == hosts.source.full()

    run(body)
