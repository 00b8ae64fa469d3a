"""The receiving side of a migration between hosts: one port, one VM, one end that can be named.

:mod:`migrator.receiver.incoming` keeps what has arrived and decides whether the VM may run; here
are the connections, and what is asked on them. ``docs/protocol.md`` has the order.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

from migrator.aio import in_thread
from migrator.errors import LinkError, LinkLost, MigratorError, WireError
from migrator.link import envelope
from migrator.link.connection import Connection
from migrator.link.messages import Go, Greeting, Load, Open, Parting, Room, State, parse
from migrator.migration.destination import LocalDestination
from migrator.preflight.waiting import blocks_of
from migrator.receiver.deposition import Opened
from migrator.receiver.door import Door, refusal
from migrator.receiver.incoming import Incoming, Outcome
from migrator.receiver.witness import Witness
from migrator.transport.arrivals import Arrivals, Target, reserve_at
from migrator.transport.space import Shortage, to_run
from tracker.errors import TrackerError
from tracker.memory.ram import RamBlock

_STRANGERS = 64  # connections for messages on which nothing was opened
PATIENCE_S = 300.0
"""The longest that a source may have its receiver wait for it."""
_IDLE_S = 60.0  # for a source that has opened nothing to say something
_BUSY_S = 1.0
_TELLING_S = 2.0


class Receiver:
    """Lets one VM in.

    :param destination: the QEMU that waits for it
    :param context: a server's; ``None``: anybody who can connect may send
    :param peer: who may send, if not everybody with a certificate; see
        :func:`migrator.link.tls.check_peer`
    :param say: called with each step, for people
    :param patience_s: the longest that a source may have it wait
    :param ours: fingerprint of this host's own certificate
    :param witness: what answers in its place if it is killed
    """

    def __init__(
        self,
        destination: LocalDestination,
        context: ssl.SSLContext | None,
        peer: str | None,
        say: Callable[[str], None] = lambda _: None,
        *,
        patience_s: float = PATIENCE_S,
        ours: str | None = None,
        witness: Witness | None = None,
    ) -> None:
        self._witness = witness
        self._patience_s = patience_s
        self._ours = ours
        self._destination = destination
        self._context = context
        self._peer = peer
        self._say = say
        self._migration: Incoming | None = None
        self._outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._strangers: list[Connection] = []

    # -- connections ----------------------------------------------------------------------------

    async def serve(self, listener: socket.socket) -> Outcome:
        """Receive one VM; return when it is known what became of it.

        :param listener: listening, not blocking
        """
        watching = asyncio.create_task(self._watch_qemu())
        try:
            async with Door(listener, self._context, self._peer, self._attend):
                return await asyncio.shield(self._outcome)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            if self._migration is not None:
                self._migration.keep()
                await in_thread(self._migration.close)

    @property
    def may_run(self) -> bool:
        """Whether the VM may run here by now."""
        states = (State.GOING, State.RUNNING, State.UNKNOWN)
        return self._migration is not None and self._migration.state in states

    def stop(self) -> None:
        """Give up, unless the VM runs here already, or was told to."""
        self._stopping = asyncio.ensure_future(self._stop())

    async def _stop(self) -> None:
        migration = self._migration
        if migration is None:
            if not self._outcome.done():
                self._outcome.set_result(Outcome("never", "interrupted"))
            return
        if migration.state in (State.OPEN, State.READY):
            await migration.never("interrupted at the destination")
            migration.control.hang_up()
            await in_thread(migration.hang_up)
            await asyncio.sleep(_TELLING_S)  # it comes back at once, and is told
        if migration.state is State.GOING:
            await migration.settled.wait()
        self._finish()

    async def _watch_qemu(self) -> None:
        """Do not wait for a VM that nobody would run. Once one comes, whoever asks QEMU sees it."""
        while not self._destination.has_ended:
            await asyncio.sleep(_BUSY_S)
        if self._migration is None and not self._outcome.done():
            self._outcome.set_result(Outcome("never", "its QEMU has ended"))

    async def _attend(self, connection: Connection, said: Greeting) -> bool:
        purposes = {
            "migrate": self._attend_control,
            "resume": self._resume,
            "stream": self._attend_stream,
            "resolve": self._resolve,
        }
        return await purposes[said.purpose](connection, said)

    def _mine(self, connection: Connection, said: Greeting) -> Incoming:
        """The migration that is meant.

        :raise LinkError: there is none like this, or another host opened it
        """
        if self._migration is None or said.session != self._migration.token:
            raise LinkError("receiver", "no such migration is received here")
        if connection.fingerprint != self._migration.opened_by:
            raise LinkError("receiver", "another host opened this migration")
        return self._migration

    # -- the connection for messages ------------------------------------------------------------

    async def _attend_control(self, connection: Connection, _: Greeting) -> bool:
        if len(self._strangers) >= _STRANGERS:
            self._strangers.pop(0).hang_up()
        self._strangers.append(connection)
        try:
            return await self._obey(connection)
        finally:
            self._is_known(connection)

    def _is_known(self, connection: Connection) -> None:
        with contextlib.suppress(ValueError):
            self._strangers.remove(connection)

    async def _resume(self, connection: Connection, said: Greeting) -> bool:
        try:
            migration = self._mine(connection, said)
            if migration.state is not State.OPEN:
                raise _cannot_go_on(migration)
        except LinkError as error:
            await connection.send({"no": error.reason})
            return False
        migration.control.hang_up()
        migration.control = connection
        connection.lose_after(migration.silence_s)
        migration.keep()
        async with migration.attaching:
            # what is still in their sockets must not be written over what comes from now on
            await in_thread(migration.hang_up)
        self._say("the source is back")
        return await self._obey(connection)

    async def _obey(self, connection: Connection) -> bool:
        """Say yes; then do what the source asks, one thing after the other."""
        steps: dict[str, Callable[..., Coroutine[Any, Any, dict[str, Any]]]] = {
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
        try:
            await connection.send({})
            while True:
                said, blob = await self._next(connection)
                step = steps.get(str(said.get("do")))
                if step is None:
                    raise WireError(connection.peer, "asks for something unknown")
                answer = await self._answer(connection, step, said, blob)
                await connection.send(answer)
                if step in (self._abort, self._bye) and answer == {}:
                    if self._controls(connection):
                        self._finish()
                    return False
        finally:
            lost = self._controls(connection) and not self._outcome.done()
            if self._migration is not None and lost:
                self._migration.lost()

    async def _next(self, connection: Connection) -> tuple[dict[str, Any], bytes]:
        """The next message.

        :raise LinkLost: the source has neither said nor sent anything for too long
        """
        migration = self._migration if self._controls(connection) else None
        patience_s = self._patience_s if migration is not None else _IDLE_S
        blob = envelope.STATE_LIMIT if migration is not None else 0
        receiving = asyncio.ensure_future(connection.receive(blob=blob))
        try:
            while True:
                arrived = migration.arrived_bytes if migration is not None else 0
                if (await asyncio.wait([receiving], timeout=patience_s))[0]:
                    return receiving.result()
                if migration is None or migration.arrived_bytes == arrived:
                    raise LinkLost(connection.peer, f"has said nothing for {patience_s:g} s")
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)

    def _controls(self, connection: Connection) -> bool:
        return self._migration is not None and self._migration.control is connection

    async def _answer(
        self,
        connection: Connection,
        step: Callable[..., Coroutine[Any, Any, dict[str, Any]]],
        said: dict[str, Any],
        blob: bytes,
    ) -> dict[str, Any]:
        """What a step came to; while it takes its time, say so."""
        work = asyncio.ensure_future(step(connection, said, blob))
        try:
            while not (await asyncio.wait([work], timeout=_BUSY_S))[0]:
                await connection.send({"busy": True})
        except BaseException:
            if step != self._go:  # which settles what it began
                work.cancel()
            raise
        try:
            return work.result()
        except LinkError as error:
            return {"no": error.reason}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            return {"no": f"cannot make sense of what was asked: {error!r}"}
        except (MigratorError, TrackerError, OSError) as error:
            return {"vm": str(error)}

    # -- steps ----------------------------------------------------------------------------------

    async def _ping(self, *_: Any) -> dict[str, Any]:
        return {}

    async def _look(self, *_: Any) -> dict[str, Any]:
        if self._migration is not None:
            raise LinkError("receiver", "another migration is being received here")
        return {"side": (await self._destination.look()).to_json()}

    async def _open(self, control: Connection, said: dict[str, Any], _: bytes) -> dict[str, Any]:
        if self._migration is not None:
            raise LinkError("receiver", "another migration is being received here")
        wanted_open = parse(Open, said, control.peer)
        # how long it is waited for is not for the source alone to say
        reconnect_s = min(wanted_open.reconnect_s, self._patience_s)
        silence_s = min(wanted_open.silence_s, self._patience_s)
        qmp = self._destination.qmp
        by_name = {block.name: block for block in await blocks_of(qmp)}
        names = wanted_open.blocks
        if len(set(names)) < len(names) or not set(names) <= set(by_name):
            raise LinkError("receiver", "has no such RAM blocks, each of another name")
        wanted = [by_name[name] for name in names]
        targets = await in_thread(_open_all, qmp.pid, wanted)
        if self._migration is not None:  # meanwhile
            _close_all(targets)
            raise LinkError("receiver", "another migration is being received here")
        if self._witness is not None:
            try:
                self._witness.opened(
                    Opened(
                        *(wanted_open.session, control.fingerprint, reconnect_s + silence_s),
                        asdict(self._destination.settings),
                    )
                )
            except MigratorError:
                _close_all(targets)
                raise
        migration = Incoming(
            *(wanted_open.session, targets, reconnect_s, silence_s),
            control=control,
            opened_by=control.fingerprint,
            destination=self._destination,
            say=self._say,
            finished=self._finish,
            witness=self._witness,
        )
        self._migration = migration
        self._is_known(control)
        control.lose_after(migration.silence_s)
        self._say(f"a VM comes from {control.peer}")
        return {}

    def _from(self, control: Connection, *states: State) -> Incoming:
        """The migration, if it is this connection's and in one of these states.

        :raise LinkError: it is not
        """
        migration = self._migration
        if migration is None or migration.control is not control:
            raise LinkError("receiver", "no migration was opened on this connection")
        if migration.state not in states:
            raise _cannot_go_on(migration)
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
        if self._migration is None:
            return {}
        migration = self._from(control, State.OPEN, State.READY, State.NEVER)
        parting = parse(Parting, said, control.peer)
        await migration.never(f"the source gave up: {parting.reason}")
        return {}

    async def _bye(self, control: Connection, *_: Any) -> dict[str, Any]:
        self._from(control, State.RUNNING, State.NEVER, State.UNKNOWN)
        return {}

    # -- pages ----------------------------------------------------------------------------------

    async def _attend_stream(self, connection: Connection, said: Greeting) -> bool:
        try:
            migration = self._mine(connection, said)
            index, number = said.stream, said.round
            if migration.state is not State.OPEN:
                raise LinkError("receiver", "takes no stream like this now")
        except LinkError as error:
            await connection.send({"no": str(error)})
            return False
        connection.lose_after(migration.silence_s)
        async with migration.attaching:  # of two for one stream, one would never be hung up
            before = migration.arrivals.get(index)
            if before is not None:
                await in_thread(before.hang_up)
            if migration.state is not State.OPEN:  # by now
                return False
            applied = migration.applied_on(index, number)
            await connection.send({"round": applied[0], "frames": applied[1]})
            loop = asyncio.get_running_loop()
            arrivals = Arrivals(
                *(connection.for_thread(), connection.peer, migration.targets, number),
                spoilt=lambda why: loop.call_soon_threadsafe(migration.spoil, why),
            )
            migration.attach(index, arrivals)
            arrivals.start()
        return True

    # -- the end --------------------------------------------------------------------------------

    def _finish(self) -> None:
        migration = self._migration
        if migration is not None and not self._outcome.done():
            self._outcome.set_result(migration.outcome())

    async def _resolve(self, connection: Connection, said: Greeting) -> bool:
        """Tell what became of the migration; where nothing is decided yet, decide it."""
        migration, decide = self._migration, said.decide
        if migration is None:
            answer: dict[str, Any] | None = {
                "state": State.WAITING.value,
                "reason": "no such migration came here",
            }
        else:
            answer = refusal(connection, said, migration.token, migration.opened_by, self._ours)
        if migration is None or answer is not None:
            await connection.send(answer or {})
            return False
        undecided = migration.state in (State.OPEN, State.READY)
        connected = undecided and not migration.waits
        if decide and connected and not said.session:
            await connection.send({"no": "the source is still connected: it is for it to say"})
            return False
        if decide == "source" and undecided:
            await migration.never("given up by who asked what became of it")
            if not migration.waits:
                migration.wait()
            migration.control.hang_up()
        elif decide == "destination" and migration.state is State.READY:
            migration.keep()
            await migration.go(run=True)
        elif decide == "destination" and migration.state not in (State.RUNNING, State.GOING):
            await connection.send({"no": f"it cannot run here: it is {migration.state.value}"})
            return False
        if migration.state is State.GOING:
            await migration.settled.wait()
        await connection.send(migration.tell())
        if decide is not None:
            migration.told.set()
            if not said.session:
                self._finish()  # a source may ask once more, if this answer does not arrive
        return False


def _cannot_go_on(migration: Incoming) -> LinkError:
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
