"""From the last round to the running destination: stop, last collects, hand over, or roll back.

The order is what makes it safe:

1. The source stops, its block I/O drained; what was written until then is sent.
2. QEMU saves the device state into a buffer of ours. That may write guest RAM, so the sources are
   read once more, and what they found is sent. Nothing can write any more.
3. The destination loads all of the device state but its end. RAM went first, because loading reads
   it. A destination that lacks the end cannot run; until here, every failure ends with the source
   running.
4. The end is sent: the point of no return. The destination runs when it has loaded it.

It is QEMU's own migration that stops the source, unless that would take the dirty bits of VFIO
devices away: then ``stop`` comes first, and the migration after the bits have been read. Such a
source is paused when its state is saved, so that the destination waits for our ``cont``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from migrator.destination import Destination
from migrator.devicestate import Incoming, split_at_end
from migrator.errors import Unconfirmed, Undecided, VmError
from migrator.guard import Guard
from migrator.phases import Phase, Phases
from migrator.preflight import Plan
from migrator.qmp import Event, Qmp
from migrator.rollback import SOURCE_CAPABILITIES, SOURCE_PARAMETERS

_STOP_S = 60.0  # QEMU's own first pass: ROMs, video memory
_STATE_S = 60.0


@dataclass
class HandedOver:
    """What a switchover that succeeded has to tell.

    :ivar downtime_ms: by the time stamps of QEMU's events, comparison included; ``None`` if the
        guest did not run
    :ivar device_state_bytes: the whole stream; ``None`` if there was none
    """

    downtime_ms: float | None
    device_state_bytes: int | None


async def stop_guest(source: Qmp) -> Event | None:
    """Stop the guest by command.

    :return: QEMU's event of it, or ``None`` if the guest did not run
    :raise VmError: QEMU does not answer
    """
    mark = source.mark()
    await source.execute("stop")
    await source.run_state()  # events that came before this answer are here
    return source.seen("STOP", since=mark)


class Switchover:
    """One attempt to hand over.

    :ivar committed: whether the point of no return was passed
    :ivar was_running: whether the guest ran until it was stopped for this; ``None`` before that
    :ivar paused_by_us: whether it may be paused because we executed ``stop``
    :param ease: called just before the guest is stopped
    :param collect_and_send: one last round: reads all sources and delivers what they found
    :param devices_stand: called once the devices write no more, and their bits have been read
    :param verify: compares both sides; raises if they differ
    """

    def __init__(
        self,
        source: Qmp,
        destination: Destination,
        plan: Plan,
        phases: Phases,
        guard: Guard,
        *,
        ease: Callable[[], Awaitable[None]],
        collect_and_send: Callable[[Phase, Phase], Awaitable[int]],
        devices_stand: Callable[[], Awaitable[None]],
        verify: Callable[[], Awaitable[None]],
    ) -> None:
        self._source = source
        self._destination = destination
        self._plan = plan
        self._phases = phases
        self._guard = guard
        self._ease = ease
        self._collect_and_send = collect_and_send
        self._devices_stand = devices_stand
        self._verify = verify
        self._incoming: Incoming | None = None
        self.committed = False
        self.was_running: bool | None = None
        self.paused_by_us = False

    async def run(self) -> HandedOver:
        """Do all of it.

        :raise VmError: before the point of no return: roll back. After it: never
        :raise Undecided: after the point of no return, neither side is known to run
        """
        self._phases.enter(Phase.SWITCHOVER)
        await self._prepare()
        await self._ease()
        if self._plan.stop_first:
            stopped = await self._stop()
        else:
            stopped = await self._begin_migration()
        await self._collect_and_send(Phase.FINAL_COLLECT, Phase.FINAL_SEND)
        await self._devices_stand()
        self._phases.enter(Phase.DEVICE_STATE)
        if self._plan.stop_first:
            await self._begin_migration()
        stream = await self._save_device_state()
        head, end = split_at_end(stream)
        self._phases.enter(Phase.LAST_COLLECT)
        await self._collect_and_send(Phase.LAST_COLLECT, Phase.LAST_COLLECT)
        await self._verify()
        self._phases.enter(Phase.LOAD)
        await self._destination.load(head, end, timeout_s=_STATE_S)
        resumed_at = await self._commit()
        downtime_ms = (resumed_at - stopped.at) * 1000 if stopped and resumed_at else None
        return HandedOver(downtime_ms, len(stream))

    async def _prepare(self) -> None:
        await self._destination.prepare()
        await self._source.set_capabilities(SOURCE_CAPABILITIES)
        await self._source.execute("migrate-set-parameters", **SOURCE_PARAMETERS)

    async def _stop(self) -> Event | None:
        """Stop the guest by command: block I/O is drained, and migratable devices stand."""
        self._guard.begun(await self._source.run_state() == "running", by_stop=True)
        self.paused_by_us = True
        stopped = await stop_guest(self._source)
        self.was_running = stopped is not None
        self._phases.enter(Phase.STOP, at=stopped.at if stopped else None)
        return stopped

    async def _begin_migration(self) -> Event | None:
        """Let QEMU's own migration come to where the guest stands and nothing is saved yet."""
        if not self._plan.stop_first:
            self._guard.begun(await self._source.run_state() == "running")
        mark = self._source.mark()
        self._incoming = await Incoming.begin(self._source)
        event = await self._source.migration_status("pre-switchover", since=mark, timeout_s=_STOP_S)
        self._expect(event, "pre-switchover")
        stopped = self._source.seen("STOP", since=mark)
        if not self._plan.stop_first:
            self.was_running = stopped is not None
            self._phases.enter(Phase.STOP, at=stopped.at if stopped else None)
        elif stopped is not None:
            raise VmError("source", "was resumed by somebody while it was being handed over")
        await self._check_qemu_leaves_ram_to_us()
        return stopped

    async def _check_qemu_leaves_ram_to_us(self) -> None:
        total = (await self._source.migration()).get("ram", {}).get("total")
        smallest = min(block.size for block in self._plan.source)
        if total is None:
            raise VmError("source", "does not say how much RAM it sends itself")
        if total >= self._plan.other_ram_bytes + smallest:
            raise VmError("source", f"sends {total} bytes of RAM itself, ignoring x-ignore-shared")

    async def _save_device_state(self) -> bytes:
        assert self._incoming is not None
        mark = self._source.mark()
        await self._source.execute("migrate-continue", state="pre-switchover")
        await self._destination.begin_loading()  # while the source saves
        event = await self._source.migration_status("completed", since=mark, timeout_s=_STATE_S)
        self._expect(event, "completed")
        return await self._incoming.whole(timeout_s=_STATE_S)

    def _expect(self, event: Event, status: str) -> None:
        if event.data.get("status") != status:
            raise VmError("source", f"its own migration {event.data.get('status')}")

    # -- the point of no return -----------------------------------------------------------------

    async def _commit(self) -> float | None:
        self._phases.enter(Phase.RESUME)
        self._guard.committed()
        self.committed = True
        try:
            resumed_at = await self._destination.go(run=bool(self.was_running))
        except Unconfirmed as error:
            known = ["the source is paused, and complete", *error.known]
            raise Undecided(
                self._phases.current.value, "the destination did not confirm", known
            ) from error
        except VmError:
            self.committed = False
            raise
        self._phases.enter(Phase.FINISH, at=resumed_at)
        return resumed_at

    # -- the way back, and the end --------------------------------------------------------------

    async def close(self) -> None:
        """Close the stream from the source; a QEMU that still writes to it fails its migration."""
        if self._incoming is not None:
            await self._incoming.close()
