"""Whether a VM has stood, how a guest ended, and how long one may stand: told from events."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from migrator.errors import NotStanding, StoodTooLong
from migrator.migration.budget import Budget, standstill_s
from migrator.preflight.jobs import findings
from migrator.qemu.devicestate import saved_run_state
from migrator.qemu.qmp import Event, Qmp
from migrator.qemu.standing import Standing, guest_end, stopped_by_io_error

STOP, RESUME, RESET = (Event(name, {}, 0.0) for name in ("STOP", "RESUME", "RESET"))
IO_ERROR = Event("BLOCK_IO_ERROR", {"action": "stop"}, 0.0)
IO_REPORT = Event("BLOCK_IO_ERROR", {"action": "report"}, 0.0)


class Source:
    """A QEMU that has told these events."""

    name = "source"

    def __init__(self, *events: Event, state: str = "postmigrate") -> None:
        self._events = list(events)
        self._state = state

    def as_qmp(self) -> Qmp:
        return cast(Qmp, self)

    def events(self, since: int = 0) -> list[Event]:
        return self._events[since:]

    def seen(self, name: str, since: int = 0) -> Event | None:
        return next((e for e in self.events(since) if e.name == name), None)

    async def run_state(self) -> str:
        return self._state


def stood(source: Source, since: int = 0) -> None:
    asyncio.run(Standing(source.as_qmp(), since).check(("postmigrate",)))


def test_it_has_stood() -> None:
    stood(Source())
    stood(Source(STOP, IO_REPORT))
    stood(Source(RESUME, RESET, STOP), since=2)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Source(RESUME), "was resumed"),
        (Source(RESUME, STOP), "was resumed"),
        (Source(RESET), "was reset"),
        (Source(state="running"), "is 'running'"),
        (Source(state="prelaunch"), "is 'prelaunch'"),
    ],
)
def test_it_has_not_stood(source: Source, words: str) -> None:
    with pytest.raises(NotStanding, match=words):
        stood(source)


@pytest.mark.parametrize(
    ("events", "stopped"),
    [
        ((), False),
        ((IO_REPORT, STOP), False),
        ((IO_ERROR, STOP), True),
        ((STOP, IO_ERROR), True),
        ((IO_ERROR, STOP, RESUME), False),
        ((IO_ERROR, STOP, RESUME, IO_ERROR), True),
    ],
)
def test_an_io_error_has_stopped_it(events: tuple[Event, ...], stopped: bool) -> None:
    assert stopped_by_io_error(Source(*events).as_qmp(), 0) == stopped


def panicked(action: str) -> Event:
    return Event("GUEST_PANICKED", {"action": action}, 0.0)


SHUTDOWN = Event("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}, 0.0)


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ((STOP,), None),
        ((SHUTDOWN, STOP), "guest-shutdown"),
        ((panicked("run"),), None),
        ((panicked("pause"), STOP), "guest-panicked"),
        ((panicked("poweroff"), SHUTDOWN), "guest-panicked"),
    ],
)
def test_how_a_guest_ended(events: tuple[Event, ...], reason: str | None) -> None:
    end = guest_end(Source(*events).as_qmp())
    assert (end.reason if end else None) == reason


# -- the state that the source had, in its stream -----------------------------------------------


def stream(state: bytes) -> bytes:
    section = b"\x04" + bytes(4) + b"\x0bglobalstate" + bytes(8)
    return b"before" + section + (100).to_bytes(4, "big") + state.ljust(100, b"\0") + b"after"


def test_the_run_state_in_a_stream() -> None:
    assert saved_run_state(stream(b"running")) == "running"
    assert saved_run_state(stream(b"io-error")) == "io-error"


@pytest.mark.parametrize(
    "data", [b"", b"globalstate running", stream(b""), stream(b"x" * 100), stream(b"\xff")]
)
def test_no_run_state_in_a_stream(data: bytes) -> None:
    assert saved_run_state(data) is None


# -- how long it may stand ----------------------------------------------------------------------


def test_the_time_is_a_multiple_of_the_downtime() -> None:
    assert standstill_s(100.0, 50.0, 0) == 10.0
    assert standstill_s(5_000.0, 50.0, 0) == 50.0
    assert standstill_s(100.0, 60_000.0, 0) == 180.0
    assert standstill_s(100.0, 50.0, 1_000_000_000) == 20.0


def test_a_budget_begins_when_the_guest_stops() -> None:
    now = [0.0]
    budget = Budget(3.0, lambda: now[0])
    now[0] = 100.0
    assert budget.left_s == 3.0
    budget.begin()
    now[0] = 102.0
    budget.begin()
    assert budget.left_s == 1.0
    now[0] = 200.0
    assert budget.left_s == 0.0


def test_work_is_cancelled_when_the_time_is_over() -> None:
    cancelled: list[bool] = []

    async def for_ever() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def body() -> None:
        budget = Budget(0.05)
        budget.begin()
        assert await budget.spend(asyncio.sleep(0, "in time")) == "in time"
        with pytest.raises(StoodTooLong, match=r"0\.05 s") as caught:
            await budget.spend(for_ever())
        assert caught.value.limit_s == 0.05

    asyncio.run(body())
    assert cancelled == [True]


# -- jobs ---------------------------------------------------------------------------------------


def test_jobs_and_exports_are_named_once_each() -> None:
    mirror = {"id": "copy", "type": "mirror", "status": "ready"}
    old_style = {"device": "copy", "type": "mirror", "status": "ready"}
    export = {"id": "out", "type": "nbd", "node-name": "disk", "shutting-down": False}
    found = findings([mirror], [old_style], [export])
    assert [finding.check for finding in found] == ["block job", "block export"]
    assert "device=copy" in found[0].mend
    assert "id=out" in found[1].mend


def test_jobs_that_are_over_are_in_the_way_of_nothing() -> None:
    over = {"id": "copy", "type": "backup", "status": "concluded"}
    ending = {"id": "out", "type": "nbd", "node-name": "disk", "shutting-down": True}
    assert findings([over], [], [ending]) == []
