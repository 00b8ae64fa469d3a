"""The one migration that a receiver takes in: what has arrived, and whether its VM may run.

It goes through these states, forward only::

    open → ready → going → running
      └──────┴────── never ──┘ → unknown

``ready``: all is here, and QEMU lacks only the end of its stream. From there it is one word that
decides: *go* from the source, or, when somebody asks what became of it on behalf of the source,
*never*. Whichever comes first holds. A source that is lost before it said *go* is waited for, and
then given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from migrator.aio import in_thread, within
from migrator.errors import MigratorError, Unconfirmed
from migrator.link.connection import Connection
from migrator.link.messages import State
from migrator.migration.destination import LocalDestination
from migrator.receiver.door import LINGER_S
from migrator.receiver.witness import Witness
from migrator.transport.arrivals import Arrivals, Target

_GO_S = 60.0
_LOOK_S = 1.0
_log = logging.getLogger(__name__)

_MOVES = {
    State.OPEN: (State.READY, State.NEVER),
    State.READY: (State.GOING, State.NEVER),
    State.GOING: (State.RUNNING, State.NEVER, State.UNKNOWN),
    State.RUNNING: (),
    State.NEVER: (State.NEVER,),
    State.UNKNOWN: (),
}


@dataclass
class Outcome:
    """What became of a VM that was received.

    :ivar state: ``running``, ``never``, or ``unknown``
    :ivar reason: why it does not run
    """

    state: str
    reason: str = ""
    wire_bytes: int = 0


class Incoming:
    """One migration, from its opening on.

    :ivar token: names it
    :ivar opened_by: fingerprint of the certificate of the host that opened it, if it showed one
    :ivar control: the connection on which the source says what to do
    :ivar state: see above
    :ivar told: set when the source was told what became of it
    :ivar settled: set with ``running``, ``never`` and ``unknown``
    :ivar attaching: held while connections for pages are made
    :param reconnect_s: how long the source tries to reach us again
    :param silence_s: after which either side takes the other for lost
    :param finished: called when nobody has to be told anything any more
    :param witness: what answers for it if this process is killed
    """

    def __init__(
        self,
        token: str,
        targets: list[Target],
        reconnect_s: float,
        silence_s: float,
        *,
        control: Connection,
        opened_by: str | None,
        destination: LocalDestination,
        say: Callable[[str], None],
        finished: Callable[[], None],
        witness: Witness | None = None,
    ) -> None:
        self._witness = witness
        self.token = token
        self.targets = targets
        self.silence_s = silence_s
        self.control = control
        self.opened_by = opened_by
        self._state = State.OPEN
        self.reason = ""
        self.arrivals: dict[int, Arrivals] = {}
        self.settled = asyncio.Event()
        self.told = asyncio.Event()
        self.attaching = asyncio.Lock()
        self._reconnect_s = reconnect_s
        self._destination = destination
        self._say = say
        self._finished = finished
        self._after_s: float | None = None
        self._applied: dict[int, tuple[int, int]] = {}
        self._replaced_bytes = 0
        self._giving_up: asyncio.Task[None] | None = None
        self._spoiling: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """Where it is."""
        return self._state

    def enter(self, state: State) -> None:
        """Go forward to another state.

        :raise RuntimeError: none that can follow: a defect of the caller
        """
        if state not in _MOVES[self._state]:
            raise RuntimeError(f"{self._state.value} → {state.value}")
        self._state = state

    def tell(self) -> dict[str, Any]:
        """Its state, for the source, or for an operator."""
        return {"state": self.state.value, "reason": self.reason, "after_s": self._after_s}

    def outcome(self) -> Outcome:
        """The same, for whoever waits for the VM here."""
        return Outcome(self.state.value, self.reason, self.arrived_bytes)

    # -- what has arrived -----------------------------------------------------------------------

    def attach(self, index: int, arrivals: Arrivals) -> None:
        """Let a new connection take the place of one that was hung up."""
        before = self.arrivals.get(index)
        if before is not None:
            self._replaced_bytes += before.bytes
        self.arrivals[index] = arrivals

    def applied_on(self, index: int, number: int) -> tuple[int, int]:
        """How far a stream has come: a round, and frames of it.

        A connection on which nothing came was perhaps made again before its predecessor's answer
        arrived: then that answer still holds.
        """
        before = self.arrivals.get(index)
        if before is None:
            self._applied[index] = (number, 0)
        elif before.has_begun:
            self._applied[index] = (before.round, before.frames)
        return self._applied[index]

    def spoil(self, problem: Exception) -> None:
        """What came could not be written, or made no sense: that was it."""
        if self.state is State.OPEN:
            self._say(f"gave up: {problem}")
            self._spoiling = asyncio.ensure_future(self.never(str(problem)))

    # -- whether it runs ------------------------------------------------------------------------

    def ready(self) -> None:
        """All of it is here, but the end of QEMU's stream.

        :raise MigratorError: the witness has ended
        """
        if self._witness is not None:
            self._witness.ready()
        self.enter(State.READY)

    async def go(self, *, run: bool, timeout_s: float = _GO_S) -> None:
        """Give QEMU the end: from here on the VM may run. Never raises.

        Without its witness, it never will: if this process is killed, no other could tell.
        """
        try:
            if self._witness is not None:
                self._witness.going(run=run)
        except MigratorError as error:
            await self.never(str(error))
            return
        self.enter(State.GOING)
        started = time.monotonic()
        try:
            resumed_at = await self._destination.go(run=run, timeout_s=timeout_s)
        except Unconfirmed as error:
            self.enter(State.UNKNOWN)
            self.reason = "; ".join(error.known)
        except MigratorError as error:
            self.enter(State.NEVER)
            self.reason = str(error)
        except Exception as error:  # noqa: BLE001 (whatever it is, QEMU may have the end by now)
            self.enter(State.UNKNOWN)
            self.reason = repr(error)
        else:
            self.enter(State.RUNNING)
            if self._witness is not None:
                self._witness.ran()
            self._after_s = max(0.0, resumed_at - started) if resumed_at is not None else None
            self._say("it runs")
        self.settled.set()

    async def never(self, reason: str) -> None:
        """It will not run here."""
        self.enter(State.NEVER)
        self.reason = reason
        self.settled.set()
        await self._destination.close(reason)
        await self._give_back()

    async def _give_back(self) -> None:
        """Give the space of its RAM back to the file system; nothing is written there any more."""
        async with self.attaching:
            await in_thread(self.hang_up)
            for target in self.targets:
                try:
                    await in_thread(target.reservation.give_back)
                except OSError as error:
                    _log.warning("the space of its RAM is not given back: %s", error)

    # -- a source that is lost ------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether the source is lost, and waited for."""
        return self._giving_up is not None

    def lost(self) -> None:
        """The connection for messages is gone: wait for the source, but not for ever."""
        # the source may notice so much later than we did, and only then begins to try
        wait_s = self._reconnect_s + self.silence_s
        self._say(f"lost the source ({self.state.value}); waiting {wait_s:g} s for it")
        self.wait()

    def wait(self) -> None:
        """Wait until the source can have been told, and give up."""
        self.keep()
        wait_s = self._reconnect_s + self.silence_s
        self._giving_up = asyncio.create_task(self._give_up_after(wait_s))

    def keep(self) -> None:
        """It is back, or need not be waited for."""
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None

    async def _give_up_after(self, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        if self.state is State.OPEN:
            while await self._pages_come():
                pass  # the source has not noticed that this connection is gone
            await self.never("the source was lost")
        elif self.state is State.READY:
            # it may have said go: be there to tell it that it was not heard
            await self.never("the source was lost before it said go")
            self._say("it never ran; staying to tell the source so, should it come back")
            await asyncio.sleep(LINGER_S)
        elif self.state is State.GOING:
            await self.settled.wait()
        if self.state in (State.RUNNING, State.UNKNOWN):
            await self._stay(wait_s)
        self._finished()

    async def _pages_come(self) -> bool:
        """Whether pages come still; a connection on which nothing comes keeps nothing alive."""
        before = self.arrived_bytes
        await asyncio.sleep(self.silence_s)
        return self.arrived_bytes > before

    @property
    def arrived_bytes(self) -> int:
        """Bytes that came on connections for pages."""
        return self._replaced_bytes + sum(a.bytes for a in self.arrivals.values())

    async def _stay(self, wait_s: float) -> None:
        """Be there to tell that it runs, for as long as the VM could be asked about."""
        if not self.told.is_set():
            self._say("the source does not know that it runs; staying to tell it so")
        while not self.told.is_set() and not self._destination.has_ended:
            with contextlib.suppress(asyncio.TimeoutError):
                await within(_LOOK_S, self.told.wait())
        await asyncio.sleep(wait_s)  # it may not have heard the answer

    # -- the end --------------------------------------------------------------------------------

    def hang_up(self) -> None:
        """Break all connections for pages; nothing is written any more."""
        for arrivals in self.arrivals.values():
            arrivals.hang_up()

    def close(self) -> None:
        """Let go of RAM."""
        self.hang_up()
        for target in self.targets:
            target.close()
