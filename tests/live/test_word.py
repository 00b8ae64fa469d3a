"""The word ``go``, lost or its answer lost; and what an operator may ask and decide."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from migrator import Failed, Report
from migrator.errors import LinkError, VmError
from migrator.migration.budget import Budget
from migrator.migration.switchover import Switchover
from migrator.qemu.qmp import Qmp
from migrator.receiver.resolution import Resolution, resolve
from migrator.report.phases import Phase
from tests.live.moving import once
from tests.live.sending import MIGRATOR, Road, eventually, monitor, on_a_road, state
from tests.live.test_cuts import (
    COMPLETE,
    NOTHING_ARRIVES,
    NOTHING_COMES_BACK,
    SILENCE_S,
    Way,
    cut_once,
)
from tests.live.test_host_kills import send_and_be_killed

pytestmark = pytest.mark.live


# -- the word --------------------------------------------------------------------------------------


@contextlib.contextmanager
def mended_when_missed(road: Road) -> Iterator[None]:
    """Mend the link as soon as the source has given up its connection, and asks anew."""

    class Mend(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "after it was told to go" in record.getMessage():
                road.hosts.mend()

    handler = Mend()
    logger = logging.getLogger("migrator.migration.remote")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


async def say_go(road: Road, way: Way) -> Report:
    """Migrate; the link is lost when the word is to be said, and mended after it was missed."""
    await road.next_receiver()
    with mended_when_missed(road):
        return await road.send(
            once(Phase.RESUME, lambda: way.begin(road.hosts)), silence_s=SILENCE_S, reconnect_s=5.0
        )


def test_the_word_is_lost() -> None:
    """The source asks; the destination, which heard nothing, says never; the source runs on."""

    async def body(road: Road) -> None:
        with pytest.raises(Failed, match="given up by who asked") as caught:
            await say_go(road, NOTHING_ARRIVES)
        assert caught.value.phase == "resume"
        assert await road.receiver.ended() == 1
        assert road.receiver.result()["state"] == "never"
        assert await road.one_runs() == "source"

    on_a_road(body)


def test_the_answer_is_lost() -> None:
    """The destination runs; the source asks, and learns that."""

    async def body(road: Road) -> None:
        report = await say_go(road, NOTHING_COMES_BACK)
        assert (report.status, report.mismatched_pages) == ("completed", 0)
        assert await road.receiver.ended() == 0
        assert await road.states() == ("postmigrate", "running")
        assert await road.one_runs() == "destination"

    on_a_road(body)


# -- what an operator may ask, and decide ----------------------------------------------------------


async def ask(road: Road, decide: str | None = None, *, gone: bool = False) -> Resolution:
    return await resolve(monitor(road.vm), road.link(), decide, gone=gone)


def test_waiting() -> None:
    async def body(road: Road) -> None:
        await road.next_receiver()
        found = await ask(road)
        assert (found.source, found.destination, found.exit_code) == ("running", "waiting", 0)
        with pytest.raises(VmError, match="runs"):
            await ask(road, "destination")
        qmp = await Qmp.connect("source", road.vm.qmp)
        await qmp.execute("stop")
        await qmp.close()
        found = await ask(road)
        assert (found.source, found.exit_code) == ("paused", 4)
        found = await ask(road, "destination")
        assert (found.destination, found.exit_code) == ("waiting", 4)
        # a receiver before this one may have let the VM run
        found = await ask(road, "source")
        assert (found.source, found.exit_code) == ("paused", 4)
        assert any("--destination-is-gone" in sentence for sentence in found.sentences)
        found = await ask(road, "source", gone=True)
        assert (found.source, found.exit_code) == ("running", 0)
        # and the receiver still receives
        report = await road.send()
        assert report.mismatched_pages == 0
        assert await road.one_runs() == "destination"

    on_a_road(body)


def test_open_and_connected() -> None:
    """While pages come, it is the source that says what becomes of it."""

    async def body(road: Road) -> None:
        await road.next_receiver()
        road.hosts.shape(20 * 10**6)
        begun = asyncio.Event()
        moving = asyncio.ensure_future(road.send(once(Phase.COPY, begun.set)))
        await begun.wait()
        found = await ask(road)
        assert (found.source, found.destination, found.exit_code) == ("running", "open", 0)
        with pytest.raises(LinkError, match="still connected"):
            await ask(road, "source")
        with pytest.raises(VmError, match="runs"):
            await ask(road, "destination")
        with pytest.raises(LinkError, match="still connected"):
            await resolve(None, road.link(), "destination")
        assert not moving.done()
        road.hosts.shape(None)
        assert (await moving).mismatched_pages == 0
        assert await road.one_runs() == "destination"

    on_a_road(body)


def test_open_and_lost() -> None:
    """Nobody can let it run; who is decided for goes on, and the receiver ends."""

    async def body(road: Road) -> None:
        await road.next_receiver()
        await send_and_be_killed(road, Phase.FINAL_SEND, and_the_guard=True, reconnect_s=600)
        await eventually(lambda: "lost the source" in road.receiver.said, "it notices")
        found = await ask(road)
        assert (found.destination, found.exit_code) == ("open", 4)
        assert found.source in COMPLETE
        with pytest.raises(LinkError, match="cannot run here"):
            await ask(road, "destination")
        found = await ask(road, "source")
        assert (found.source, found.destination, found.exit_code) == ("running", "never", 0)
        assert await road.receiver.ended() == 1
        assert await road.one_runs() == "source"

    on_a_road(body)


@contextlib.asynccontextmanager
async def ready_and_connected(
    road: Road, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[asyncio.Future[Report]]:
    """A migration that holds its breath before the word, until the block is left."""
    commit = Switchover._commit
    reached, on = asyncio.Event(), asyncio.Event()

    async def hold(self: Switchover, budget: Budget) -> float | None:
        reached.set()
        await on.wait()
        return await commit(self, budget)

    monkeypatch.setattr(Switchover, "_commit", hold)
    moving = asyncio.ensure_future(road.send())
    await reached.wait()
    try:
        yield moving
    finally:
        on.set()


def test_ready_and_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(road: Road) -> None:
        await road.next_receiver()
        async with ready_and_connected(road, monkeypatch) as moving:
            found = await ask(road)
            assert (found.source, found.destination) == ("postmigrate", "ready")
            assert found.exit_code == 4
            for decide in ("source", "destination"):
                with pytest.raises(LinkError, match="still connected"):
                    await ask(road, decide)
            assert await road.states() == ("postmigrate", "inmigrate")
        assert (await moving).mismatched_pages == 0
        assert await road.one_runs() == "destination"

    on_a_road(body)


@pytest.mark.parametrize("decide", ["source", "destination"])
@pytest.mark.one_in(2)
def test_ready_and_lost(decide: str) -> None:
    """The source's orchestrator and guard are gone before the word; with ``destination``, the
    source's host too: the operator has only the destination to ask."""

    async def body(road: Road) -> None:
        await road.next_receiver()
        await send_and_be_killed(road, Phase.RESUME, and_the_guard=True, reconnect_s=600)
        await eventually(lambda: "lost the source" in road.receiver.said, "it notices")
        source = monitor(road.vm) if decide == "source" else None
        if decide == "destination":
            await road.vm.stop()
        found = await resolve(source, road.link(), None)
        assert (found.destination, found.exit_code) == ("ready", 4)
        found = await resolve(source, road.link(), decide)
        assert found.exit_code == 0
        assert found.destination == ("running" if decide == "destination" else "never")
        assert await road.receiver.ended() == (0 if decide == "destination" else 1)
        assert await road.one_runs() == decide

    on_a_road(body)


def test_running() -> None:
    """The answer was lost, and the receiver waits to tell a source that comes back."""

    async def body(road: Road) -> None:
        ended = await cut_once(road, Phase.RESUME, NOTHING_COMES_BACK, None, reconnect_s=2.0)
        assert [error.exit_code for error in ended] == [4]
        assert await road.states() == ("postmigrate", "running")
        await eventually(lambda: "staying to tell it" in road.receiver.said, "it stays")
        road.hosts.mend()
        found = await ask(road)
        assert (found.source, found.destination, found.exit_code) == ("postmigrate", "running", 0)
        assert not any("--decide" in sentence for sentence in found.sentences)
        await ask(road, "destination")
        assert await road.receiver.ended() == 0
        assert road.receiver.result()["state"] == "running"
        assert await road.one_runs() == "destination"

    on_a_road(body)


@pytest.mark.thorough
def test_never_by_the_command() -> None:
    """The word was lost for good, and the destination has given up by itself."""

    async def body(road: Road) -> None:
        ended = await cut_once(road, Phase.RESUME, NOTHING_ARRIVES, None, reconnect_s=1.0)
        assert [error.exit_code for error in ended] == [4]
        await eventually(lambda: "it never ran" in road.receiver.said, road.receiver.said)
        road.hosts.mend()

        async def command(*options: str) -> tuple[int, dict[str, Any], str]:
            asking = road.hosts.a.run(
                [
                    *[MIGRATOR, "resolve", "--insecure", "--json", "--source", road.vm.qmp],
                    *["--to", f"{road.hosts.b.address}:{road.receiver.port}", *options],
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            out, told = await asyncio.to_thread(asking.communicate)
            return asking.returncode, json.loads(out.splitlines()[-1]), told

        code, found, told = await command()
        assert (code, found["destination"], found["decided"]) == (4, "never", False)
        assert found["source"] in COMPLETE
        assert "--decide source" in told
        code, found, told = await command("--decide", "destination")
        assert code == 4
        assert "cannot run here" in told
        assert await state(road.vm) in COMPLETE
        code, found, told = await command("--decide", "source")
        assert (code, found["source"], found["decided"]) == (0, "running", True), told
        assert await road.receiver.ended() == 1
        assert await road.one_runs() == "source"

    on_a_road(body)
