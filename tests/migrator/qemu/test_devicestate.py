"""QEMU's stream on its way through us: where it is cut, and what each end does to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from migrator.errors import CommandFailed, VmError
from migrator.qemu.devicestate import Incoming, Outgoing, split_at_end
from migrator.qemu.qmp import Qmp

# -- where the end begins -----------------------------------------------------------------------


def description(json: bytes) -> bytes:
    """What follows the device state: QEMU_VM_EOF, QEMU_VM_VMDESCRIPTION, length, JSON."""
    return b"\0\6" + len(json).to_bytes(4, "big") + json


texts = st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=300).map(str.encode)


def with_decoys(state: bytes, json: bytes) -> list[bytes]:
    return [state + decoy for decoy in (b"\0\6", b"\0\6\0\0", description(json), b"\0\0\6\0\6\0")]


@given(st.binary(max_size=300), texts)
@example(b"", b"")
@example(b"\0\6", b"{}")
@example(b"\0\6\0\0\0\0", b"{}")
@example(b"\0\6\0\0\0\x0a\0\0", b"{}")  # whose length reaches into the real description
def test_the_end_begins_with_the_eof_before_the_description(state: bytes, json: bytes) -> None:
    for decoyed in (state, *with_decoys(state, json)):
        stream = decoyed + description(json)
        head, end = split_at_end(stream)
        assert head + end == stream
        # never later than the EOF that counts: a destination that has that one runs
        assert len(head) <= len(decoyed)
        assert end[0] == 0
        if head != decoyed:  # what comes before looks like a description up to the very end
            assert int.from_bytes(end[2:6], "big") == len(end) - 6


@given(st.binary(max_size=300), texts)
def test_the_end_is_no_more_than_it_has_to_be(state: bytes, json: bytes) -> None:
    """Random state does not look like a description that reaches to the end of the stream."""
    head, end = split_at_end(state + description(json))
    assert (head, end) == (state, description(json))


@pytest.mark.parametrize("length", [6, 0x06_00, 0x06_0006, 0x0006_0006 & 0xFFFFF])
def test_a_length_that_contains_the_mark(length: int) -> None:
    json = b"{" * length
    assert split_at_end(b"state" + description(json)) == (b"state", description(json))


@given(st.binary(max_size=300))
@example(b"")
@example(b"\0\6\0\0\0\5{}")
def test_without_a_description(state: bytes) -> None:
    """As of machines with suppress-vmdesc=on."""
    head, end = split_at_end(state + b"\0")
    assert head + end == state + b"\0"
    assert end[0] == 0
    assert len(head) <= len(state)


@pytest.mark.parametrize("stream", [b"", b"state", b"QEVM\0\0\0\3", b"\0\6\0\0\0\2{"])
def test_no_end(stream: bytes) -> None:
    with pytest.raises(ValueError, match="no end"):
        split_at_end(stream)


@given(st.binary(max_size=50), texts.filter(bool), st.data())
def test_a_stream_that_was_cut_in_its_description(state: bytes, json: bytes, data: Any) -> None:
    stream = state + description(json)
    cut = data.draw(st.integers(len(stream) - len(json), len(stream) - 1))
    if stream[cut - 1] == 0:  # in the length of a description that is a multiple of 256
        return
    with pytest.raises(ValueError, match="no end"):
        split_at_end(stream[:cut])


# -- both ends ----------------------------------------------------------------------------------


class FakeQemu:
    """The other end of a stream, under control: a real socket, and answers that were set.

    :ivar answers: what each command answers: an exception is raised, anything awaitable awaited
    """

    name = "fake"

    def __init__(self) -> None:
        self.executed: list[tuple[str, dict[str, Any]]] = []
        self.status = "active"
        self.answers: dict[str, Exception | Callable[[], Awaitable[object]]] = {}
        self.socket: socket.socket | None = None

    def as_qmp(self) -> Qmp:
        return cast(Qmp, self)

    @property
    def stream(self) -> socket.socket:
        assert self.socket is not None
        return self.socket

    async def hand_over(self, fd: int, name: str) -> None:
        await self.execute("getfd", fdname=name)
        self.socket = socket.socket(fileno=os.dup(fd))
        self.socket.setblocking(False)

    async def execute(self, command: str, **arguments: Any) -> object:
        self.executed.append((command, arguments))
        answer = self.answers.get(command)
        if isinstance(answer, Exception):
            raise answer
        return await answer() if answer else {}

    async def migration(self) -> dict[str, Any]:
        await self.execute("query-migrate")
        return {"status": self.status}

    async def receive(self) -> bytes:
        """Everything up to the end of the stream."""
        loop, pieces = asyncio.get_running_loop(), b""
        while piece := await loop.sock_recv(self.stream, 1 << 16):
            pieces += piece
        return pieces


@pytest.fixture
def qemu() -> FakeQemu:
    return FakeQemu()


def run(body: Callable[[], Awaitable[None]]) -> None:
    """Run a test; no descriptor may be left."""

    async def whole() -> None:
        await body()

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(whole())
    assert len(os.listdir("/proc/self/fd")) == before


STATE = bytes(range(256)) * 4000  # more than a socket holds


def test_incoming(qemu: FakeQemu) -> None:
    async def body() -> None:
        incoming = await Incoming.begin(qemu.as_qmp())
        (getfd, name), (migrate, uri) = qemu.executed
        assert (getfd, migrate) == ("getfd", "migrate")
        assert uri["uri"] == f"fd:{name['fdname']}"
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(qemu.stream, STATE)
        await loop.sock_sendall(qemu.stream, b"end")
        qemu.stream.close()
        assert await incoming.whole(timeout_s=5) == STATE + b"end"
        await incoming.close()

    run(body)


def test_incoming_that_does_not_end(qemu: FakeQemu) -> None:
    async def body() -> None:
        incoming = await Incoming.begin(qemu.as_qmp())
        qemu.stream.send(b"state")
        with pytest.raises(VmError, match=r"did not end in 0\.05 s") as caught:
            await incoming.whole(timeout_s=0.05)
        assert caught.value.vm == "source"
        await incoming.close()
        with pytest.raises(BrokenPipeError):  # which makes QEMU's migration fail
            qemu.stream.send(b"more")
        qemu.stream.close()

    run(body)


@pytest.mark.parametrize("command", ["getfd", "migrate"])
def test_incoming_that_is_refused(qemu: FakeQemu, command: str) -> None:
    async def body() -> None:
        qemu.answers[command] = CommandFailed("source", command, "no")
        with pytest.raises(CommandFailed):
            await Incoming.begin(qemu.as_qmp())
        if qemu.socket:
            assert qemu.stream.recv(1) == b""
            qemu.stream.close()

    run(body)


def test_incoming_that_is_cancelled(qemu: FakeQemu) -> None:
    async def body() -> None:
        qemu.answers["migrate"] = asyncio.Event().wait
        task = asyncio.ensure_future(Incoming.begin(qemu.as_qmp()))
        await asyncio.sleep(0.01)
        assert len(qemu.executed) == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert qemu.stream.recv(1) == b""
        qemu.stream.close()

    run(body)


def test_closing_incoming_while_it_is_read(qemu: FakeQemu) -> None:
    async def body() -> None:
        incoming = await Incoming.begin(qemu.as_qmp())
        waiting = asyncio.ensure_future(incoming.whole(timeout_s=5))
        await asyncio.sleep(0)
        await incoming.close()
        await incoming.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        qemu.stream.close()

    run(body)


def test_outgoing(qemu: FakeQemu) -> None:
    async def body() -> None:
        outgoing = await Outgoing.begin(qemu.as_qmp())
        assert [command for command, _ in qemu.executed] == ["getfd", "migrate-incoming"]
        received = asyncio.ensure_future(qemu.receive())
        await outgoing.load(STATE, timeout_s=5)
        assert not received.done()
        await outgoing.finish(b"\0end", timeout_s=5)
        assert await received == STATE + b"\0end"
        outgoing.close()
        qemu.stream.close()

    run(body)


def test_loading_waits_until_all_was_taken_in(qemu: FakeQemu) -> None:
    async def body() -> None:
        outgoing = await Outgoing.begin(qemu.as_qmp())
        load = asyncio.ensure_future(outgoing.load(b"head", timeout_s=5))
        await asyncio.sleep(0.05)
        assert not load.done()
        assert ("query-migrate", {}) not in qemu.executed  # its answer would say nothing yet
        assert qemu.stream.recv(3) == b"hea"
        await asyncio.sleep(0.05)
        assert not load.done()
        assert qemu.stream.recv(3) == b"d"
        await load
        assert ("query-migrate", {}) in qemu.executed
        outgoing.close()
        assert qemu.stream.recv(3) == b""
        qemu.stream.close()

    run(body)


@pytest.mark.parametrize("length", [10, len(STATE)])
def test_loading_that_is_never_taken_in(qemu: FakeQemu, length: int) -> None:
    async def body() -> None:
        outgoing = await Outgoing.begin(qemu.as_qmp())
        with pytest.raises(VmError, match=r"did not load in 0\.05 s") as caught:
            await outgoing.load(STATE[:length], timeout_s=0.05)
        assert caught.value.vm == "destination"
        outgoing.close()
        qemu.stream.close()

    run(body)


def test_a_destination_that_takes_all_in_and_answers_nothing(qemu: FakeQemu) -> None:
    """Its main loop hangs: the source must not stand still for ever."""

    async def body() -> None:
        qemu.answers["query-migrate"] = asyncio.Event().wait
        outgoing = await Outgoing.begin(qemu.as_qmp())
        received = asyncio.ensure_future(qemu.receive())
        try:
            with pytest.raises(VmError):
                await asyncio.wait_for(outgoing.load(b"head", timeout_s=0.05), 1.0)
        finally:
            outgoing.close()
            await received
            qemu.stream.close()

    run(body)


@pytest.mark.parametrize("after", [0, 1, 1000, len(STATE) - 1])
def test_a_destination_that_hangs_up_in_the_middle(qemu: FakeQemu, after: int) -> None:
    async def body() -> None:
        outgoing = await Outgoing.begin(qemu.as_qmp())

        async def take_some() -> None:
            taken = 0
            while taken < after:
                part = await asyncio.get_running_loop().sock_recv(qemu.stream, after - taken)
                taken += len(part)
            qemu.stream.close()

        qemu.status = "failed"
        taking = asyncio.ensure_future(take_some())
        with pytest.raises(VmError, match="refused the device state") as caught:
            await outgoing.load(STATE, timeout_s=5)
        assert caught.value.vm == "destination"
        await taking
        outgoing.close()

    run(body)


@pytest.mark.parametrize("status", ["failed", "completed", "none", "setup", ""])
def test_a_destination_that_complains(qemu: FakeQemu, status: str) -> None:
    async def body() -> None:
        qemu.status = status
        outgoing = await Outgoing.begin(qemu.as_qmp())
        received = asyncio.ensure_future(qemu.receive())
        with pytest.raises(VmError, match=f"migration is '{status}'"):
            await outgoing.load(b"head", timeout_s=5)
        outgoing.close()
        assert await received == b"head"
        qemu.stream.close()

    run(body)


def test_the_end_that_nobody_takes(qemu: FakeQemu) -> None:
    async def body() -> None:
        outgoing = await Outgoing.begin(qemu.as_qmp())
        qemu.stream.close()
        with pytest.raises(OSError, match="Broken pipe"):
            await outgoing.finish(b"\0", timeout_s=5)
        outgoing.close()

    run(body)


@pytest.mark.parametrize("command", ["getfd", "migrate-incoming"])
def test_outgoing_that_is_refused(qemu: FakeQemu, command: str) -> None:
    async def body() -> None:
        qemu.answers[command] = CommandFailed("destination", command, "no")
        with pytest.raises(CommandFailed):
            await Outgoing.begin(qemu.as_qmp())
        if qemu.socket:
            assert qemu.stream.recv(1) == b""
            qemu.stream.close()

    run(body)


def test_loading_that_is_cancelled(qemu: FakeQemu) -> None:
    async def body() -> None:
        outgoing = await Outgoing.begin(qemu.as_qmp())
        load = asyncio.ensure_future(outgoing.load(b"head", timeout_s=5))
        await asyncio.sleep(0.01)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        outgoing.close()
        # the destination gets no more than the head, and then the end of the stream
        with contextlib.closing(qemu.stream):
            assert await qemu.receive() == b"head"

    run(body)
