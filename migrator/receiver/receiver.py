"""The receiving side of a migration between hosts: one port, one VM, one end that can be named.

:mod:`migrator.receiver.incoming` keeps what has arrived and decides whether the VM may run; here
are the connections, and what is asked on them. ``docs/protocol.md`` has the order.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from typing import Any

from migrator.aio import in_thread
from migrator.errors import LinkError, LinkLost, MigratorError, WireError
from migrator.link import envelope
from migrator.link.connection import Connection
from migrator.link.messages import Greeting, State
from migrator.migration.destination import LocalDestination
from migrator.receiver.door import Door, refusal
from migrator.receiver.incoming import Incoming, Outcome
from migrator.receiver.steps import Step, Steps, cannot_go_on
from migrator.receiver.witness import Witness
from migrator.transport.arrivals import Arrivals
from tracker.errors import TrackerError

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
        self._ours = ours
        self._destination = destination
        self._context = context
        self._peer = peer
        self._say = say
        self._outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._strangers: list[Connection] = []
        self._steps = Steps(destination, patience_s, say, self._is_known, self._finish, witness)

    @property
    def _migration(self) -> Incoming | None:
        return self._steps.migration

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
                raise cannot_go_on(migration)
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
        try:
            await connection.send({})
            while True:
                said, blob = await self._next(connection)
                name = str(said.get("do"))
                step = self._steps.by_name.get(name)
                if step is None:
                    raise WireError(connection.peer, "asks for something unknown")
                answer = await self._answer(connection, name, step, said, blob)
                await connection.send(answer)
                if name in ("abort", "bye") and answer == {}:
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
        patience_s = self._steps.patience_s if migration is not None else _IDLE_S
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
        name: str,
        step: Step,
        said: dict[str, Any],
        blob: bytes,
    ) -> dict[str, Any]:
        """What a step came to; while it takes its time, say so."""
        work = asyncio.ensure_future(step(connection, said, blob))
        try:
            while not (await asyncio.wait([work], timeout=_BUSY_S))[0]:
                await connection.send({"busy": True})
        except BaseException:
            if name != "go":  # which settles what it began
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
                connection.for_thread(),
                connection.peer,
                migration.targets,
                round_number=number,
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
