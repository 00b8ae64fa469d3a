"""A receiver waits, but not for ever; it stays, but only while it is needed; and obeys one host."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from migrator.errors import LinkLost
from migrator.link.connection import Connection
from migrator.link.session import Link, Session
from migrator.migration.destination import LocalDestination
from migrator.migration.remote import RemoteDestination
from migrator.qemu.process import RunDirectory
from migrator.receiver import incoming as incoming_module
from migrator.receiver import receiver as receiver_module
from tests.migrator.receiver.test_receiver import Place, Slow, place, run, shm
from tests.migrator.strangers import Stranger, ask

__all__ = ["shm"]  # a fixture

SOON = {"reconnect_s": 0.0, "silence_s": 0.1}


class Going(Slow):
    """A destination that runs as soon as it is told to, until its QEMU ends."""

    has_ended = False

    def __init__(self) -> None:
        super().__init__()
        self.may_end.set()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver_module, "_TELLING_S", 0.05)
    monkeypatch.setattr(incoming_module, "_LOOK_S", 0.05)


@asynccontextmanager
async def patient_for(directory: Path, patience_s: float) -> AsyncIterator[Place]:
    async with place(directory) as here:
        here.receiver._steps.patience_s = patience_s
        yield here


# -- sources that say nothing -------------------------------------------------------------------


def test_a_source_that_says_nothing_is_lost(shm: Path) -> None:
    async def body() -> None:
        async with patient_for(shm, 0.3) as here:
            source = await here.source(**SOON)
            assert await source.rest() == b""
            assert (await here.receiving).state == "never"
            assert here.said[-1].startswith("lost the source")

    run(body)


def test_a_source_that_asks_to_be_waited_for_for_ever_is_not(shm: Path) -> None:
    async def body() -> None:
        async with patient_for(shm, 0.3) as here:
            source = await here.source(reconnect_s=1e300, silence_s=1e300)
            source.close()
            assert (await here.receiving).state == "never"

    run(body)


def test_an_idle_stream_keeps_nothing_alive(shm: Path) -> None:
    async def body() -> None:
        async with place(shm) as here:
            source, stream = await here.source(**SOON), await here.stream()
            source.close()
            assert (await here.receiving).state == "never"
            assert await stream.rest() == b""

    run(body)


def test_a_stranger_that_opens_nothing_is_hung_up_on(
    shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver_module, "_IDLE_S", 0.2)

    async def body() -> None:
        async with place(shm) as here:
            stranger = await Stranger.connect(here.port, {"purpose": "migrate"})
            assert await stranger.hear() == {}
            assert await stranger.rest() == b""
            source = await here.source()  # which has more time
            await asyncio.sleep(0.5)
            assert await source.ask("ping") == {}
            source.close()

    run(body)


# -- a source that does not learn that it runs --------------------------------------------------


async def _gone_and_lost(here: Place) -> None:
    source = await here.source(**SOON)
    assert await source.ask("load", b"state", end=1, timeout_s=1) == {}
    source.write({"do": "go", "run": True})
    await until(lambda: "it runs" in here.said)
    source.close()
    await until(lambda: any("staying to tell it" in line for line in here.said))


def test_it_stays_to_tell_while_the_vm_is_there(shm: Path) -> None:
    async def body() -> None:
        there = Going()
        async with place(shm, cast(LocalDestination, there)) as here:
            await _gone_and_lost(here)
            await asyncio.sleep(0.5)
            assert (await here.resolve())["state"] == "running"
            assert not here.receiving.done()  # to tell an operator is not to tell the source
            there.has_ended = True
            assert (await here.receiving).state == "running"

    run(body)


def test_it_ends_when_the_source_was_told(shm: Path) -> None:
    async def body() -> None:
        async with place(shm, cast(LocalDestination, Going())) as here:
            await _gone_and_lost(here)
            asked = {"purpose": "resolve", "session": "token", "decide": "source"}
            assert (await ask(here.port, asked))["state"] == "running"
            assert (await here.receiving).state == "running"

    run(body)


# -- whose migration it is ----------------------------------------------------------------------


def test_only_the_host_that_opened_it_may_go_on_or_decide(shm: Path) -> None:
    async def body() -> None:
        async with place(shm) as here:
            source = await here.source()
            migration = here.receiver._migration
            assert migration is not None
            migration.opened_by = "sha256:another"
            here.receiver._ours = "sha256:ours"
            for greeting in (
                {"purpose": "resume", "session": "token"},
                {"purpose": "stream", "session": "token", "stream": 0, "round": 0},
                {"purpose": "resolve", "session": "token", "decide": "source"},
                {"purpose": "resolve", "session": "", "decide": "source"},
                {"purpose": "resolve", "session": "", "decide": "destination"},
            ):
                answer = await ask(here.port, greeting)
                assert "host" in answer["no"], answer
            assert (await here.resolve())["state"] == "open"
            assert await source.ask("ping") == {}
            source.close()

    run(body)


def test_the_receivers_own_host_may_decide(shm: Path) -> None:
    async def body() -> None:
        async with place(shm) as here:
            source = await here.source()
            migration = here.receiver._migration
            assert migration is not None
            migration.opened_by = "sha256:another"
            source.close()
            await until(lambda: migration.waits)
            # connections that are not secured show no certificate, as this receiver has none
            assert here.receiver._ours is None
            answer = await here.resolve("source")
            assert answer["state"] == "never"

    run(body)


# -- the source's side --------------------------------------------------------------------------


class Busy:
    """A session whose receiver says for ever that it is at it."""

    link = Link("there", 1, reconnect_s=0.0)
    token = "a"
    peer = "there"
    rtt_s = 0.0

    def __init__(self) -> None:
        self.broken_off = False

    async def ask(self, what: str, **_: Any) -> dict[str, Any]:
        await asyncio.sleep(3600)
        return {}

    def break_off(self) -> None:
        self.broken_off = True


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_receiver_that_is_busy_for_ever_is_asked_anew(
    cancelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from migrator.link.messages import State, Told

    async def settled(*_: Any, **__: Any) -> Told:
        return Told(state=State.RUNNING)

    monkeypatch.setattr("migrator.migration.remote.settle_outcome", settled)
    monkeypatch.setattr("migrator.migration.remote._ANSWERING_S", 0.1)
    session = Busy()

    async def body() -> None:
        destination = RemoteDestination(cast(Session, session))
        going = asyncio.ensure_future(
            destination.go(run=True, timeout_s=3600.0 if cancelled else 0.1)
        )
        await asyncio.sleep(0.05)
        if cancelled:
            going.cancel()
        assert await going is None

    asyncio.run(asyncio.wait_for(body(), 30))
    assert session.broken_off


def test_a_question_that_is_cut_off_leaves_the_session_closable() -> None:
    async def body() -> None:
        import socket

        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        connection = Connection(ours, "there")
        with theirs:
            asking = asyncio.ensure_future(connection.receive())
            await asyncio.sleep(0.01)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking
            connection.close()
            with pytest.raises(LinkLost):
                await connection.receive()

    asyncio.run(asyncio.wait_for(body(), 30))


# -- directories --------------------------------------------------------------------------------


def test_a_directory_that_was_kept_goes_once_its_vm_has_ended() -> None:
    vm = subprocess.Popen(["sleep", "600"])
    try:
        run_directory = RunDirectory()
        with run_directory as kept:
            run_directory.keep_for(vm.pid)
        with RunDirectory():
            assert kept.exists()
    finally:
        vm.kill()
        vm.wait()
    with RunDirectory():
        assert not kept.exists()


def test_a_directory_of_another_start_of_the_process_number_goes() -> None:
    vm = subprocess.Popen(["sleep", "600"])
    try:
        run_directory = RunDirectory()
        with run_directory as kept:
            run_directory.keep_for(vm.pid)
        (kept / "kept-for").write_text(f"{vm.pid} 1\n")
        with RunDirectory():
            assert not kept.exists()
    finally:
        vm.kill()
        vm.wait()
