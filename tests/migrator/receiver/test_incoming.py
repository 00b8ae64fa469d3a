"""Between *go* and *it runs*: what is not known is not taken for *it does not run*."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from migrator.errors import MigratorError, Unconfirmed, VmError
from migrator.link.messages import State, Told
from migrator.link.session import Link, Session
from migrator.migration.remote import RemoteDestination
from migrator.receiver.incoming import Incoming


class Destination:
    """One whose last step ends like this."""

    def __init__(self, ending: Exception) -> None:
        self._ending = ending

    async def go(self, *, run: bool, timeout_s: float) -> float | None:
        raise self._ending


@pytest.mark.parametrize(
    ("ending", "state"),
    [
        (VmError("destination", "did not run"), "never"),
        (Unconfirmed("destination", ["it is alive"]), "unknown"),
        (OSError(9, "Bad file descriptor"), "unknown"),
        (AssertionError(), "unknown"),
    ],
)
def test_how_going_ends(ending: Exception, state: str) -> None:
    async def body() -> None:
        incoming = Incoming(
            *("", [], 0.0, 0.0),
            control=cast(Any, None),
            opened_by=None,
            destination=cast(Any, Destination(ending)),
            say=lambda _: None,
            finished=lambda: None,
        )
        incoming.enter(State.READY)
        await incoming.go(run=True)
        assert incoming.state is State(state)
        assert incoming.settled.is_set()

    asyncio.run(body())


class Asked:
    """A session whose answer to *go* says that something failed there."""

    peer = "there"
    link = Link("there", 1)
    token = "a"
    rtt_s = 0.0

    async def ask(self, what: str, **_: Any) -> dict[str, Any]:
        raise VmError("destination", "Bad file descriptor")

    def break_off(self) -> None:
        pass


@pytest.mark.parametrize(
    ("state", "ending"), [("running", None), ("never", VmError), ("unknown", Unconfirmed)]
)
def test_a_failure_in_answer_to_go_is_asked_about(
    monkeypatch: pytest.MonkeyPatch, state: str, ending: type[MigratorError] | None
) -> None:
    """It may run all the same: only a receiver that says *never* lets the source go on."""

    async def settled(*_: Any, **__: Any) -> Told:
        return Told(state=State(state), reason="why")

    monkeypatch.setattr("migrator.migration.remote.settle_outcome", settled)
    destination = RemoteDestination(cast(Session, Asked()))
    if ending is None:
        assert asyncio.run(destination.go(run=True)) is None
        return
    with pytest.raises(ending) as caught:
        asyncio.run(destination.go(run=True))
    assert type(caught.value) is ending


def test_nor_is_a_failure_in_answer_to_that(monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing(*_: Any, **__: Any) -> dict[str, Any]:
        raise VmError("destination", "Bad file descriptor")

    monkeypatch.setattr("migrator.migration.remote.settle_outcome", failing)
    with pytest.raises(Unconfirmed):
        asyncio.run(RemoteDestination(cast(Session, Asked())).go(run=True))
