"""What a source may ask for, step by step; ``docs/protocol.md`` has the order."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

from migrator.aio import in_thread
from migrator.errors import LinkError, MigratorError
from migrator.link.connection import Connection
from migrator.link.messages import Go, Load, Open, Parting, Room, State, parse
from migrator.migration.destination import LocalDestination
from migrator.preflight.waiting import blocks_of
from migrator.receiver.deposition import Opened
from migrator.receiver.incoming import Incoming
from migrator.receiver.witness import Witness
from migrator.transport.arrivals import Target, reserve_at
from migrator.transport.space import Shortage, to_run
from tracker.memory.ram import RamBlock

Step = Callable[[Connection, dict[str, Any], bytes], Coroutine[Any, Any, dict[str, Any]]]
"""Gets the connection that asks, the message, and the blob that follows it; returns the answer."""


class Steps:
    """The steps of receiving one VM. Each raises LinkError where it is asked out of order.

    :ivar migration: what is being received, once it was opened
    :param destination: the QEMU that waits for it
    :param patience_s: the longest that a source may have it wait
    :param say: called with each step, for people
    :param opened: called with the connection on which the migration was opened
    :param finished: called when it is known what became of it
    :param witness: what answers in place of this process if it is killed
    """

    def __init__(
        self,
        destination: LocalDestination,
        patience_s: float,
        say: Callable[[str], None],
        opened: Callable[[Connection], None],
        finished: Callable[[], None],
        witness: Witness | None,
    ) -> None:
        self.migration: Incoming | None = None
        self.patience_s = patience_s
        self._destination = destination
        self._say = say
        self._opened = opened
        self._finished = finished
        self._witness = witness
        self.by_name: dict[str, Step] = {
            "ping": self._ping,
            "look": self._look,
            "open": self._open,
            "reserve": self._reserve,
            "room": self._room,
            "prepare": self._prepare,
            "begin-loading": self._begin_loading,
            "look-anew": self._look_anew,
            "load": self._load,
            "go": self._go,
            "abort": self._abort,
            "bye": self._bye,
        }

    async def _ping(self, *_: Any) -> dict[str, Any]:
        return {}

    async def _look(self, *_: Any) -> dict[str, Any]:
        if self.migration is not None:
            raise LinkError("receiver", "another migration is being received here")
        return {"side": (await self._destination.look()).to_json()}

    async def _open(self, control: Connection, said: dict[str, Any], _: bytes) -> dict[str, Any]:
        if self.migration is not None:
            raise LinkError("receiver", "another migration is being received here")
        wanted_open = parse(Open, said, control.peer)
        # how long it is waited for is not for the source alone to say
        reconnect_s = min(wanted_open.reconnect_s, self.patience_s)
        silence_s = min(wanted_open.silence_s, self.patience_s)
        qmp = self._destination.qmp
        by_name = {block.name: block for block in await blocks_of(qmp)}
        names = wanted_open.blocks
        if len(set(names)) < len(names) or not set(names) <= set(by_name):
            raise LinkError("receiver", "has no such RAM blocks, each of another name")
        wanted = [by_name[name] for name in names]
        targets = await in_thread(_open_all, qmp.pid, wanted)
        if self.migration is not None:  # meanwhile
            _close_all(targets)
            raise LinkError("receiver", "another migration is being received here")
        if self._witness is not None:
            try:
                self._witness.opened(
                    Opened(
                        token=wanted_open.session,
                        opened_by=control.fingerprint,
                        wait_s=reconnect_s + silence_s,
                        settings=asdict(self._destination.settings),
                    )
                )
            except MigratorError:
                _close_all(targets)
                raise
        migration = Incoming(
            wanted_open.session,
            targets,
            reconnect_s,
            silence_s,
            control=control,
            opened_by=control.fingerprint,
            destination=self._destination,
            say=self._say,
            finished=self._finished,
            witness=self._witness,
        )
        self.migration = migration
        self._opened(control)
        control.lose_after(migration.silence_s)
        self._say(f"a VM comes from {control.peer}")
        return {}

    def _from(self, control: Connection, *states: State) -> Incoming:
        """The migration, if it is this connection's and in one of these states.

        :raise LinkError: it is not
        """
        migration = self.migration
        if migration is None or migration.control is not control:
            raise LinkError("receiver", "no migration was opened on this connection")
        if migration.state not in states:
            raise cannot_go_on(migration)
        return migration

    async def _reserve(
        self, control: Connection, _: dict[str, Any], units: bytes
    ) -> dict[str, Any]:
        targets = self._from(control, State.OPEN).targets
        return _lack(await in_thread(reserve_at, targets, units))

    async def _room(self, control: Connection, said: dict[str, Any], _: bytes) -> dict[str, Any]:
        targets = self._from(control, State.OPEN).targets
        room = parse(Room, said, control.peer)
        if len(room.held) != len(targets):
            raise LinkError("receiver", "was told of another number of RAM blocks")
        rooms = [target.reservation.room() for target in targets]
        return _lack(to_run(room.held, room.growth, rooms, {}))

    async def _prepare(self, control: Connection, *_: Any) -> dict[str, Any]:
        self._from(control, State.OPEN)
        await self._destination.prepare()
        return {}

    async def _begin_loading(self, control: Connection, *_: Any) -> dict[str, Any]:
        self._from(control, State.OPEN)
        await self._destination.begin_loading()
        return {}

    async def _look_anew(self, control: Connection, *_: Any) -> dict[str, Any]:
        for target in self._from(control, State.OPEN).targets:
            await in_thread(target.look_anew)
        return {}

    async def _load(
        self, control: Connection, said: dict[str, Any], stream: bytes
    ) -> dict[str, Any]:
        migration = self._from(control, State.OPEN)
        load = parse(Load, said, control.peer)
        head = len(stream) - load.end
        if head < 0:
            raise LinkError("receiver", "a device state without an end")
        await self._destination.load(stream[:head], stream[head:], timeout_s=load.timeout_s)
        self._from(control, State.OPEN)
        async with migration.attaching:
            await in_thread(migration.hang_up)  # nothing comes on them any more
            self._from(control, State.OPEN)
            migration.ready()
        self._say("all of it is here; it runs when the source says so")
        return {}

    async def _go(self, control: Connection, said: dict[str, Any], _: bytes) -> dict[str, Any]:
        migration = self._from(control, State.READY)
        go = parse(Go, said, control.peer)
        await migration.go(run=go.run, timeout_s=go.timeout_s)
        return migration.tell()

    async def _abort(self, control: Connection, said: dict[str, Any], _: bytes) -> dict[str, Any]:
        if self.migration is None:
            return {}
        migration = self._from(control, State.OPEN, State.READY, State.NEVER)
        parting = parse(Parting, said, control.peer)
        await migration.never(f"the source gave up: {parting.reason}")
        return {}

    async def _bye(self, control: Connection, *_: Any) -> dict[str, Any]:
        self._from(control, State.RUNNING, State.NEVER, State.UNKNOWN)
        return {}


def cannot_go_on(migration: Incoming) -> LinkError:
    """Why a migration in such a state goes no further."""
    return LinkError("receiver", f"cannot go on: {migration.reason or migration.state.value}")


def _lack(found: Shortage | None) -> dict[str, Any]:
    return {"needed": found.needed_bytes, "free": found.free_bytes} if found else {}


def _open_all(pid: int, blocks: Sequence[RamBlock]) -> list[Target]:
    with ExitStack() as opened:
        targets = [opened.enter_context(closing(Target(pid, block))) for block in blocks]
        opened.pop_all()
    return targets


def _close_all(targets: Sequence[Target]) -> None:
    for target in targets:
        target.close()
