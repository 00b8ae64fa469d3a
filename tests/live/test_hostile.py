"""What anybody who can connect may do to a receiver: nothing that matters.

The receiver is the command, with a real QEMU; it is not secured, so that nothing but the receiver
itself is in the way. All attacks are on one receiver, one after the other; then on one to which a
VM is being sent. In the end a VM moves to the first one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from migrator import migrate
from migrator.guest.workload import boot_image
from migrator.link import envelope
from migrator.link.session import Link
from migrator.qemu.process import Vm
from migrator.report.phases import Phase
from tests.live.moving import VERIFIED
from tests.live.sending import MIGRATOR, SMALL, Receiver, eventually
from tests.live.vms import MIB, Pair
from tests.migrator.receiver.test_receiver import EVIL, PAGE_OF_ONES, frame
from tests.migrator.strangers import Stranger
from tests.processes import is_running

pytestmark = pytest.mark.live

HOST = "127.0.0.1"
GROWTH = 64 * MIB
_TCP_REPAIR = 19  # include/uapi/linux/tcp.h: a socket that is closed so tells nobody

REFUSED = (envelope.opening(), b"")
"""All that comes back: who speaks here; lost with a connection that is reset."""

Attack = Callable[[int], Awaitable[None]]


# -- a receiver -----------------------------------------------------------------------------------


def start(directory: Path, *options: str) -> Receiver:
    image, console = directory / "guest.img", directory / "console"
    image.write_bytes(boot_image(SMALL.workload))
    command = [
        *[MIGRATOR, "-v", "receive", "--listen", f"{HOST}:0", "--json", *options, "--"],
        *SMALL.arguments(image, console, destination=True),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(directory)},
    )
    console.touch()
    return Receiver(process, directory)


@asynccontextmanager
async def receiving(*options: str) -> AsyncIterator[Receiver]:
    with TemporaryDirectory(prefix="hostile-") as directory:
        receiver = start(Path(directory), *(options or ("--insecure",)))
        try:
            await receiver.waiting()
            yield receiver
        finally:
            await receiver.end()


@pytest.fixture(scope="module")
def shared() -> Iterator[Receiver]:
    """The one that all attacks are on."""
    with TemporaryDirectory(prefix="hostile-") as directory:
        receiver = start(Path(directory), "--insecure")
        try:
            asyncio.run(receiver.waiting())
            yield receiver
        finally:
            asyncio.run(receiver.end())


def descriptors(receiver: Receiver) -> int:
    return len(os.listdir(f"/proc/{receiver.process.pid}/fd"))


def resident(receiver: Receiver, kind: str = "VmRSS") -> int:
    """Bytes; of ``RssAnon``, without the guest's RAM."""
    status = Path(f"/proc/{receiver.process.pid}/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) << 10


async def looked(port: int) -> dict[str, Any]:
    """What a source is told that comes with the best of intentions."""
    stranger = await Stranger.connect(port, {"purpose": "migrate"})
    try:
        assert await stranger.hear() == {}
        return await stranger.ask("look")
    finally:
        stranger.close()


# -- attacks --------------------------------------------------------------------------------------


async def says(port: int, data: bytes, *, ends: bool = True) -> bytes:
    """What comes back for these bytes, until the receiver hangs up."""
    stranger = await Stranger.connect(port)
    try:
        stranger.writer.write(data)
        with contextlib.suppress(OSError):  # it may have hung up by now
            if ends:
                stranger.writer.write_eof()
        return await stranger.rest()
    finally:
        stranger.close()


async def garbage(port: int) -> None:
    choose = random.Random(1)
    for size in (1, 11, 12, 13, 100, 1 << 20):
        # nothing comes back but who speaks here
        assert await says(port, choose.randbytes(size), ends=size < 12) in REFUSED


async def http(port: int) -> None:
    request = b"GET / HTTP/1.1\r\nHost: receiver\r\n\r\n"
    assert await says(port, request, ends=False) in REFUSED


async def tls(port: int) -> None:
    hello = bytes.fromhex("16030100c8010000c40303") + bytes(200)
    assert await says(port, hello, ends=False) in REFUSED


async def old_version(port: int) -> None:
    for version in (0, 2, 65535):
        opening = struct.pack("<8sHH", b"qemu-mig", version, 0)
        assert await says(port, opening, ends=False) in REFUSED


def told(text: bytes, *, size: int | None = None, blob: int = 0) -> bytes:
    """A connection's first words, right or not."""
    return envelope.opening() + struct.pack("<II", len(text) if size is None else size, blob) + text


async def truncated(port: int) -> None:
    whole = told(b'{"purpose":"migrate"}') + envelope.message({"do": "look"})
    for size in range(0, len(whole) - 30, 3):
        assert (await says(port, whole[:size])).startswith(envelope.opening())


async def huge_lengths(port: int) -> None:
    for size, blob in ((2**32 - 1, 0), (0, 2**32 - 1), (4097, 0), (1 << 20, 1 << 30), (0, 1)):
        data = told(b"{}", size=size, blob=blob)
        assert await says(port, data, ends=False) in REFUSED
    stranger = await Stranger.connect(port, {"purpose": "migrate"})
    assert await stranger.hear() == {}
    # 1 GiB of device state is for whoever has opened a session
    stranger.writer.write(struct.pack("<II", 2, 1 << 20) + b"{}")
    assert await stranger.rest() == b""
    stranger.close()


async def deep_json(port: int) -> None:
    for text in (b"[" * 4096, b'{"a":' * 800, b"{" * 4096, b'"' * 4096, b"9" * 4096, b"\xff" * 99):
        assert await says(port, told(text), ends=False) in REFUSED
    stranger = await Stranger.connect(port, {"purpose": "migrate"})
    assert await stranger.hear() == {}
    stranger.writer.write(struct.pack("<II", 1 << 20, 0) + b"[" * (1 << 20))
    assert await stranger.rest() == b""
    stranger.close()


async def no_object(port: int) -> None:
    for text in (b"[]", b"null", b"7", b'"migrate"', b"", b'{"purpose": NaN}'):
        assert await says(port, told(text), ends=False) in REFUSED


async def frames_without_a_session(port: int) -> None:
    for evil, _ in EVIL.values():
        await says(port, envelope.opening() + evil[: 1 << 16])
    choose = random.Random(2)
    for _ in range(50):
        greeting = envelope.message({"purpose": "stream", "session": "x", "stream": 0, "round": 0})
        answer = await says(port, envelope.opening() + greeting + choose.randbytes(99), ends=False)
        assert b"no such migration" in answer or answer in REFUSED


async def opened_and_closed(port: int) -> None:
    """3000 of them, half of which reset."""
    for number in range(3000):
        sock = socket.create_connection((HOST, port))
        if number % 2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if number % 3 == 0:
            sock.send(envelope.opening()[: number % 13])
        sock.close()
        if number % 20 == 0:
            await asyncio.sleep(0)


async def slow_loris(port: int) -> None:
    """300 connections that say nothing, or a byte now and then."""
    strangers = [await Stranger.connect(port) for _ in range(300)]
    for byte in envelope.opening()[:6]:
        for stranger in strangers[::2]:
            stranger.writer.write(bytes([byte]))
        await asyncio.sleep(0.3)
    for stranger in strangers:
        stranger.close()


async def idle_sources(port: int) -> None:
    """300 that say what they are for, and then no more."""
    strangers = [await Stranger.connect(port, {"purpose": "migrate"}) for _ in range(300)]
    for stranger in strangers[-40:]:
        assert await stranger.hear() == {}
    hung_up = [asyncio.create_task(stranger.rest()) for stranger in strangers]
    await asyncio.wait(hung_up, timeout=1)
    assert sum(task.done() for task in hung_up) >= 200
    for task, stranger in zip(hung_up, strangers, strict=True):
        task.cancel()
        stranger.close()


async def half_open(port: int) -> None:
    """50 whose other end is gone without a word."""
    for number in range(50):
        sock = socket.create_connection((HOST, port))
        sock.sendall(told(b'{"purpose":"migrate"}') if number % 2 else b"qemu")
        await asyncio.sleep(0.005)
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
        sock.close()


ATTACKS: dict[str, tuple[Attack, str]] = {
    "garbage": (garbage, "is no migrator"),
    "an HTTP request": (http, "is no migrator"),
    "a TLS hello": (tls, "is no migrator"),
    "another version": (old_version, "speaks version 2 of the protocol, this is 1"),
    "cut": (truncated, "hung up"),
    "huge lengths": (huge_lengths, "announces a message of 4294967295 + 0 bytes"),
    "deep JSON": (deep_json, "sent a message that is no JSON"),
    "no JSON object": (no_object, "sent a message that is no JSON object"),
    "frames": (frames_without_a_session, "a connection came to nothing"),
    "opened and closed": (opened_and_closed, "a connection came to nothing"),
    "slow loris": (slow_loris, "a connection came to nothing"),
    "idle sources": (idle_sources, "a connection ended: "),
    "half open": (half_open, "a connection "),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_leaves_nothing_behind(shared: Receiver, name: str) -> None:
    """No descriptor, no memory to speak of, a line in its log, and a receiver that answers."""
    attack, why = ATTACKS[name]

    async def body() -> None:
        before = descriptors(shared), resident(shared)
        began = len(shared.lines)
        await asyncio.wait_for(attack(shared.port), 60)
        assert "side" in await looked(shared.port)
        await eventually(lambda: descriptors(shared) <= before[0], "descriptors are closed")
        assert resident(shared) - before[1] < GROWTH
        said = "\n".join(shared.lines[began:])
        await eventually(lambda: why in "\n".join(shared.lines[began:]), f"{why}: {said}")
        assert "Traceback" not in shared.said, said
        assert shared.process.poll() is None

    asyncio.run(body())


@asynccontextmanager
async def running_vm(directory: Path) -> AsyncIterator[Vm]:
    image = directory / "guest.img"
    image.write_bytes(boot_image(SMALL.workload))
    vm = Vm("source", directory)
    try:
        await vm.start(SMALL.arguments(image, vm.console), incoming=False)
        await Pair.beats(vm, 3)
        yield vm
    finally:
        await vm.stop()


def test_a_vm_arrives_all_the_same(shared: Receiver, tmp_path: Path) -> None:
    """After all of that, and while all of it happens again at the same time."""

    async def body() -> None:
        before = resident(shared, "RssAnon")
        async with running_vm(tmp_path) as vm:
            phases: set[str] = set()
            link = Link(HOST, shared.port, streams=3, bandwidth_bytes_per_s=40e6)
            migrating = asyncio.create_task(
                migrate(vm.qmp, link, VERIFIED, watch=lambda p: phases.add(p.phase))
            )
            over = threading.Event()
            peaks = [before]

            async def attack(name: str) -> int:
                count = 0
                while not over.is_set():
                    with contextlib.suppress(OSError, AssertionError, asyncio.IncompleteReadError):
                        # among so many, some are hung up on early
                        await asyncio.wait_for(ATTACKS[name][0](shared.port), 10)
                    count += 1
                    with contextlib.suppress(OSError, IndexError):
                        peaks.append(resident(shared, "RssAnon"))
                    await asyncio.sleep(0.1)
                return count

            async def attack_all() -> list[int]:
                return list(await asyncio.gather(*map(attack, ATTACKS)))

            while Phase.COPY.value not in phases:
                assert not migrating.done()
                await asyncio.sleep(0.01)
            attacking = asyncio.create_task(asyncio.to_thread(asyncio.run, attack_all()))
            report = await migrating
            over.set()
            assert all(await attacking)
            assert report.status == "completed"
            assert report.mismatched_pages == 0
            assert max(peaks) - before < GROWTH
            assert await shared.ended() == 0, shared.said
            assert shared.result()["status"] == "completed"
            assert await Pair.state(shared.vm) == "running"
            await Pair.beats(shared.vm, 2)
            assert "Traceback" not in shared.said

    asyncio.run(body())


# -- a source that has the session, and means ill -------------------------------------------------


AT_ANY_SIZE = [
    *["far away", "around 2**64", "the longest", "overlapping", "not in order", "a bomb", "noise"],
    *["cut", "too many runs", "a huge size", "a wide window", "unknown kind"],
]


def test_a_source_that_means_ill_gets_nothing_running(tmp_path: Path) -> None:
    """It may write to the blocks of the VM that it brings, which never runs, and nowhere else."""

    async def body() -> None:
        async with receiving() as receiver:
            before = resident(receiver, "RssAnon")
            source = await Stranger.connect(receiver.port, {"purpose": "migrate"})
            assert await source.hear() == {}
            side = await source.ask("look")
            name = side["side"]["blocks"][0]["name"]
            opened = await source.ask(
                "open", session="mine", blocks=[name], reconnect_s=30, silence_s=10
            )
            assert opened == {}
            streams = []
            for index in range(envelope.STREAMS_LIMIT):
                greeting = {"purpose": "stream", "session": "mine", "stream": index, "round": 0}
                streams.append(await Stranger.connect(receiver.port, greeting))
                assert await streams[-1].hear() == {"round": 0, "frames": 0}
            streams[0].writer.write(frame([(0, 2)], PAGE_OF_ONES))
            for stream, evil in zip(streams, AT_ANY_SIZE, strict=False):
                stream.writer.write(EVIL[evil][0])
                assert await stream.rest() == b""
            answer = await source.ask("load", b"state", end=1, timeout_s=1)
            assert answer["no"].startswith("cannot go on: 127.0.0.1:")
            assert resident(receiver, "RssAnon") - before < GROWTH
            assert await source.ask("abort", reason="found out") == {}
            assert await receiver.ended() == 1, receiver.said
            result = receiver.result()
            assert (result["status"], result["state"]) == ("aborted", "never")
            assert "leave the block" in receiver.said
            assert "Traceback" not in receiver.said
            await eventually(lambda: not is_running(receiver.vm.pid), "QEMU ends")
            assert receiver.vm.console.read_bytes() == b""

    asyncio.run(body())
