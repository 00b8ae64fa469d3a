"""The order of a switchover, and what becomes of it when its last step goes wrong."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from migrator import MigratorError, Options, Progress, Report, migrate
from migrator.errors import CommandFailed, QmpUnreachable, Undecided, VmError
from migrator.migration.budget import Budget
from migrator.migration.destination import LocalDestination
from migrator.migration.guard import Guard
from migrator.migration.lastrounds import LastRounds
from migrator.migration.switchover import Switchover
from migrator.preflight.plan import Plan
from migrator.qemu.qmp import Event, MemoryBackend, Qmp
from migrator.report.phases import Phase, Phases
from tests.live.vms import pair
from tracker.memory.ram import RamBlock

STATE = b"device state\0\6"
END = b"\0\6\0\0\0\2{}"


class Log(list[str]):
    """What happened, in order."""


class Fake:
    """One QEMU, with a real socket for its stream.

    :ivar refuses: commands, or steps, that fail
    :ivar state: answer to query-status
    """

    path = "/fake"

    def __init__(self, name: str, log: Log) -> None:
        self.name = name
        self.log = log
        self.pid = 0
        self.refuses: dict[str, MigratorError] = {}
        self.state = "inmigrate" if name == "destination" else "running"
        self._events: list[Event] = []
        self.arrived = asyncio.Event()
        self.stream: socket.socket | None = None
        self.ram_total = 100
        self.tasks: list[asyncio.Task[None]] = []

    def as_qmp(self) -> Qmp:
        return cast(Qmp, self)

    async def execute(self, command: str, **_: Any) -> object:
        if command.startswith("query-"):
            return []
        self.log.append(f"{self.name}: {command}")
        if command in self.refuses:
            raise self.refuses[command]
        if command == "migrate-continue":
            self.tasks.append(asyncio.ensure_future(self._save()))
        if command == "migrate-incoming":
            self.tasks.append(asyncio.ensure_future(self._load()))
        if command == "cont":
            self.tell("RESUME")
        if command in ("stop", "migrate") and self.name == "source" and self.state == "running":
            self._events.append(Event("STOP", {}, at=99.0))
            self.state = "paused" if command == "stop" else "finish-migrate"
        if command == "migrate":
            self.tell("MIGRATION", status="pre-switchover")
        return {}

    async def _save(self) -> None:
        assert self.stream is not None
        await asyncio.get_running_loop().sock_sendall(self.stream, STATE + END)
        self.stream.close()

    async def _load(self) -> None:
        """Take everything in; what happens at the end is for the test to say."""
        assert self.stream is not None
        received = b""
        with self.stream:
            while piece := await asyncio.get_running_loop().sock_recv(self.stream, 4096):
                received += piece
                if received == STATE:
                    self.log.append(f"{self.name}: has the head")
        if received == STATE + END:
            self.log.append(f"{self.name}: has the end")
            self.at_the_end()

    def at_the_end(self) -> None:
        self.tell("RESUME")
        self.tell("MIGRATION", status="completed")

    def tell(self, name: str, *, state: str = "", **data: str) -> None:
        self.state = state or ("running" if name == "RESUME" else self.state)
        self._events.append(Event(name, data, at=len(self._events) + 100.0))
        self.arrived.set()

    async def hand_over(self, fd: int, name: str) -> None:
        await self.execute("getfd")
        self.stream = socket.socket(fileno=os.dup(fd))
        self.stream.setblocking(False)

    async def set_capabilities(self, _: object) -> None:
        await self.execute("migrate-set-capabilities")

    async def migration(self) -> dict[str, Any]:
        return {"status": "active", "ram": {"total": self.ram_total}}

    async def migration_status(self, wanted: str, **_: object) -> Event:
        if wanted in self.refuses:
            raise self.refuses[wanted]
        self.log.append(f"{self.name}: is {wanted}")
        if wanted == "completed":
            self.state = "postmigrate"
        return Event("MIGRATION", {"status": wanted}, 0.0)

    async def run_state(self) -> str:
        if "query-status" in self.refuses:
            raise self.refuses["query-status"]
        return self.state

    async def vcpu_threads(self) -> frozenset[int]:
        return frozenset({self.pid})

    async def capabilities(self) -> dict[str, bool]:
        return {"x-ignore-shared": False}

    def mark(self) -> int:
        return len(self._events)

    def events(self, since: int = 0) -> list[Event]:
        return self._events[since:]

    def seen(self, name: str, since: int = 0) -> Event | None:
        return next((e for e in self._events[since:] if e.name == name), None)

    async def wait_for(
        self, wanted: Callable[[Event], bool], *, since: int, timeout_s: float
    ) -> Event:
        while True:
            for event in self._events[since:]:
                if wanted(event):
                    return event
            self.arrived.clear()
            if "wait" in self.refuses:
                raise self.refuses["wait"]
            await asyncio.wait_for(self.arrived.wait(), 5)


class GuardLog:
    """A guard that only notes what it is told."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def begun(self, running: bool, *, by_stop: bool = False) -> None:
        self._log.append("guard: begun by stop" if by_stop else "guard: begun")
        self.running = running

    def committed(self) -> None:
        self._log.append("guard: committed")


class Rig:
    """A switchover between two fakes. To be made inside a running loop."""

    def __init__(self, pid: int, *, was_running: bool = True, stop_first: bool = False) -> None:
        self.log = Log()
        self.source, self.destination = Fake("source", self.log), Fake("destination", self.log)
        self.source.pid = self.destination.pid = pid
        block = RamBlock("ram", 1 << 20, 4096, 0, 0, 0)
        backend = MemoryBackend("ram", "memory-backend-file", 1 << 20, True, "/dev/shm")
        self.there = LocalDestination(self.destination.as_qmp())
        self.phases = Phases(lambda phase: self.log.append(phase.value))
        self.switchover = Switchover(
            self.source.as_qmp(),
            self.there,
            Plan((block,), (block,), was_running, 1000, (backend,), stop_first=stop_first),
            self.phases,
            cast(Guard, GuardLog(self.log)),
            cast(LastRounds, self),
        )
        if not was_running:
            self.source.state = "paused"
        self.fails: dict[str, Exception] = {}

    async def collect_and_send(self, collecting: Phase, sending: Phase) -> int:
        self._step(f"collect in {collecting.value}, send in {sending.value}")
        if self.phases.current is not sending:
            self.phases.enter(sending)
        return 0

    async def compare_and_send(self) -> None:
        self._step("compare and send")

    async def ease(self) -> None:
        self._step("ease")

    async def devices_stand(self) -> None:
        self._step("devices stand")

    async def verify(self) -> None:
        self._step("verify")

    def _step(self, name: str) -> None:
        self.log.append(name)
        if name in self.fails:
            raise self.fails[name]

    def before(self, first: str, second: str) -> bool:
        return self.log.index(first) < self.log.index(second)

    async def end(self) -> None:
        await self.switchover.close()
        await self.there.close()
        await asyncio.gather(*self.source.tasks, *self.destination.tasks, return_exceptions=True)


class Process:
    """Stands for the destination's process: it is alive until it is ended."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["sleep", "60"])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def process() -> Iterator[Process]:
    process = Process()
    yield process
    process.end()


def switched(
    process: Process, arrange: Callable[[Rig], None] = lambda _: None, **options: bool
) -> tuple[Rig, Any]:
    """Run a switchover; return what it returned or raised."""

    async def body() -> tuple[Rig, Any]:
        rig = Rig(process.process.pid, **options)
        rig.phases.enter(Phase.ROUNDS)
        arrange(rig)
        try:
            return rig, await asyncio.wait_for(rig.switchover.run(Budget(30.0)), 20)
        except MigratorError as error:
            return rig, error
        finally:
            await rig.end()

    return asyncio.run(body())


def test_the_order(process: Process) -> None:
    rig, handed_over = switched(process)
    assert handed_over.device_state_bytes == len(STATE + END)
    assert handed_over.downtime_ms == pytest.approx(1000)
    assert rig.switchover.committed
    assert rig.log == [
        "rounds",
        "switchover",
        "guard: begun",  # before anything is changed
        *["destination: migrate-set-capabilities", "source: migrate-set-capabilities"],
        "source: migrate-set-parameters",
        "ease",
        *["source: getfd", "source: migrate", "source: is pre-switchover"],
        "stop",
        "collect in final-collect, send in final-send",
        "final-send",
        "devices stand",
        "device-state",
        "source: migrate-continue",
        *["destination: getfd", "destination: migrate-incoming"],
        "source: is completed",
        "last-collect",
        "collect in last-collect, send in last-collect",  # after the state was saved,
        "verify",
        "load",
        "destination: has the head",  # before it is loaded
        "resume",
        "guard: committed",  # before the end is sent
        "destination: has the end",
        "destination: migrate-set-capabilities",  # as they were before
        "finish",
    ]


def test_the_order_where_the_migration_would_take_dirty_bits(process: Process) -> None:
    def arrange(rig: Rig) -> None:
        rig.destination.at_the_end = lambda: rig.destination.tell(  # type: ignore[method-assign]
            "MIGRATION", status="completed", state="paused"
        )

    rig, handed_over = switched(process, arrange, stop_first=True)
    assert handed_over.downtime_ms is not None
    assert rig.switchover.paused_by_us
    first = rig.log.index("guard: begun by stop")
    assert rig.log[first:] == [
        "guard: begun by stop",
        "source: stop",
        "stop",
        "collect in final-collect, send in final-send",
        "final-send",
        "devices stand",  # before QEMU may read, or end, what tracks them
        "device-state",
        *["source: getfd", "source: migrate", "source: is pre-switchover"],
        "source: migrate-continue",
        *["destination: getfd", "destination: migrate-incoming"],
        "source: is completed",
        "last-collect",
        "collect in last-collect, send in last-collect",
        "verify",
        "load",
        "destination: has the head",
        "resume",
        "guard: committed",
        "destination: has the end",
        "destination: cont",  # it came paused, as the source was
        "destination: migrate-set-capabilities",
        "finish",
    ]


def test_a_guest_that_stood_still_has_no_downtime(process: Process) -> None:
    def arrange(rig: Rig) -> None:
        rig.destination.at_the_end = lambda: rig.destination.tell(  # type: ignore[method-assign]
            "MIGRATION", status="completed", state="paused"
        )

    rig, handed_over = switched(process, arrange, was_running=False)
    assert handed_over.downtime_ms is None
    assert rig.log[-1] == "finish"
    assert "destination: cont" not in rig.log


def test_a_destination_that_was_started_stopped_is_let_run(process: Process) -> None:
    def arrange(rig: Rig) -> None:
        rig.destination.at_the_end = lambda: rig.destination.tell(  # type: ignore[method-assign]
            "MIGRATION", status="completed", state="paused"
        )

    rig, handed_over = switched(process, arrange)
    assert handed_over.downtime_ms is not None
    restored = "destination: migrate-set-capabilities"
    assert rig.log[-3:] == ["destination: cont", restored, "finish"]


# -- before the point of no return --------------------------------------------------------------

LOST = QmpUnreachable("source", "QEMU hung up")
STEPS = [
    *[("source", "migrate-set-capabilities"), ("destination", "migrate-set-capabilities")],
    *[("source", "migrate"), ("source", "pre-switchover"), ("source", "migrate-continue")],
    *[("destination", "getfd"), ("destination", "migrate-incoming"), ("source", "completed")],
]


@pytest.mark.parametrize(("side", "step"), STEPS)
def test_a_step_that_fails(process: Process, side: str, step: str) -> None:
    def arrange(rig: Rig) -> None:
        getattr(rig, side).refuses[step] = LOST

    rig, error = switched(process, arrange)
    assert error is LOST
    assert not rig.switchover.committed
    assert "guard: committed" not in rig.log
    assert "destination: has the end" not in rig.log


@pytest.mark.parametrize(
    "step",
    [
        "collect in final-collect, send in final-send",
        "collect in last-collect, send in last-collect",
        "verify",
    ],
)
def test_pages_that_cannot_be_sent_or_differ(process: Process, step: str) -> None:
    def arrange(rig: Rig) -> None:
        rig.fails[step] = VmError("source", "it")

    rig, error = switched(process, arrange)
    assert isinstance(error, VmError)
    assert not rig.switchover.committed
    assert "destination: has the head" not in rig.log


@pytest.mark.parametrize(("total", "refused"), [(1000 + (1 << 20) - 1, False), (2 << 20, True)])
def test_a_source_that_sends_ram_itself(process: Process, total: int, refused: bool) -> None:
    def arrange(rig: Rig) -> None:
        rig.source.ram_total = total

    rig, outcome = switched(process, arrange)
    assert isinstance(outcome, VmError) == refused
    if refused:
        assert "ignoring x-ignore-shared" in str(outcome)
        assert "collect in final-collect, send in final-send" not in rig.log


# -- at it --------------------------------------------------------------------------------------

SILENCE = QmpUnreachable("destination", "nothing happened")


def test_a_destination_that_refuses_the_end_is_ended(process: Process) -> None:
    """It is known not to run only when it is gone."""

    def arrange(rig: Rig) -> None:
        rig.destination.at_the_end = lambda: rig.destination.tell(  # type: ignore[method-assign]
            "MIGRATION", status="failed"
        )
        end_with(rig.destination, process)

    rig, error = switched(process, arrange)
    assert isinstance(error, VmError)
    assert "refused the end of the device state" in str(error)
    assert not rig.switchover.committed
    assert rig.log[-1] == "destination: quit"


def end_with(fake: Fake, process: Process) -> None:
    """Let ``quit`` end the process."""
    execute = fake.execute

    async def quitting(command: str, **arguments: Any) -> object:
        answer = await execute(command, **arguments)
        if command == "quit":
            process.end()
        return answer

    fake.execute = quitting  # type: ignore[method-assign]


def test_a_destination_that_says_nothing_and_runs(process: Process) -> None:
    def arrange(rig: Rig) -> None:
        def run() -> None:
            rig.destination.state = "running"

        rig.destination.at_the_end = run  # type: ignore[method-assign]
        rig.destination.refuses["wait"] = SILENCE

    rig, handed_over = switched(process, arrange)
    assert handed_over.downtime_ms is None
    assert rig.switchover.committed
    assert "finish" in rig.log
    assert "destination: quit" not in rig.log


def test_a_destination_that_is_gone(process: Process) -> None:
    def arrange(rig: Rig) -> None:
        def end() -> None:
            process.end()
            rig.destination.refuses["query-status"] = SILENCE

        rig.destination.at_the_end = end  # type: ignore[method-assign]
        rig.destination.refuses["wait"] = SILENCE

    rig, error = switched(process, arrange)
    assert isinstance(error, VmError)
    assert not rig.switchover.committed


def test_a_destination_that_ran_and_is_gone(process: Process) -> None:
    """What it did to its disks while it ran, the source does not know: it is not resumed."""

    def arrange(rig: Rig) -> None:
        def run_and_end() -> None:
            rig.destination.tell("RESUME")
            process.end()
            rig.destination.refuses["query-status"] = SILENCE

        rig.destination.at_the_end = run_and_end  # type: ignore[method-assign]

        async def lost(*_: object, **__: object) -> Event:
            await rig.destination.arrived.wait()
            raise SILENCE

        rig.destination.wait_for = lost  # type: ignore[method-assign]

    rig, error = switched(process, arrange)
    assert isinstance(error, Undecided)
    assert rig.switchover.committed
    assert "the destination ran, and its process has ended" in error.known


@pytest.mark.parametrize("answers", [True, False])
def test_a_destination_of_which_nothing_is_known(process: Process, answers: bool) -> None:
    """It does not confirm, its process does not end: it might run at any moment."""

    def arrange(rig: Rig) -> None:
        def fall_silent() -> None:
            if not answers:
                rig.destination.refuses["query-status"] = SILENCE

        rig.destination.at_the_end = fall_silent  # type: ignore[method-assign]
        rig.destination.refuses["wait"] = SILENCE
        rig.destination.refuses["quit"] = CommandFailed("destination", "quit", "no")

    rig, error = switched(process, arrange)
    assert isinstance(error, Undecided)
    assert error.exit_code == 4
    assert rig.switchover.committed
    assert error.phase == "resume"
    assert any(sentence.startswith("the source is paused") for sentence in error.known)
    assert any("is alive" in sentence for sentence in error.known)
    assert any("'inmigrate'" in sentence for sentence in error.known) == answers


# -- real QEMUs: nothing that goes wrong here makes both run, or loses what is known ------------

Outcome = Report | BaseException


def moved(watch: Callable[[Progress, asyncio.Task[Report]], None]) -> tuple[Outcome, list[str]]:
    """Migrate; return what came of it, and who runs afterwards and is still tracked."""

    async def body() -> tuple[Outcome, list[str]]:
        async with pair() as vms:
            task: asyncio.Task[Report]
            task = asyncio.ensure_future(
                migrate(
                    *(vms.source.qmp, vms.destination.qmp, Options()),
                    watch=lambda progress: watch(progress, task),
                )
            )
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            found = []
            for vm in (vms.source, vms.destination):
                try:
                    vm.check_alive()
                    state = await vms.state(vm)
                except VmError:  # a destination that did not run was ended
                    continue
                if state == "running":
                    found.append(f"{vm.name} runs")
                found += [f"{vm.name}: {trace}" for trace in vms.traces(vm)]
            return outcome, found

    return asyncio.run(body())


@pytest.mark.live
def test_cancelling_every_task_after_the_point_of_no_return() -> None:
    """As asyncio.run does after a KeyboardInterrupt, and many a program when it shuts down."""

    def watch(progress: Progress, _: asyncio.Task[Report]) -> None:
        def cancel() -> None:
            for task in asyncio.all_tasks():
                if "Switchover.run" in repr(task.get_coro()):
                    task.cancel()

        if progress.phase == Phase.RESUME.value:
            asyncio.get_running_loop().call_soon(cancel)

    outcome, found = moved(watch)
    # the destination is asked at once, and ended if it does not run yet
    assert found in (["destination runs"], ["source runs"])
    assert isinstance(outcome, Report) == (found == ["destination runs"])


@pytest.mark.live
def test_cancelled_in_the_moment_it_is_done() -> None:
    def watch(progress: Progress, task: asyncio.Task[Report]) -> None:
        if progress.phase == Phase.FINISH.value:
            task.cancel()

    outcome, found = moved(watch)
    assert found == ["destination runs"]
    assert isinstance(outcome, Report), outcome
    assert outcome.status == "completed"


@pytest.mark.live
@pytest.mark.parametrize("phase", [Phase.ROUNDS, Phase.FINAL_SEND, Phase.RESUME, Phase.FINISH])
@pytest.mark.parametrize("failure", [BrokenPipeError, SystemExit])
def test_a_watching_function_that_fails(failure: type[BaseException], phase: Phase) -> None:
    """As a display does whose terminal is gone: rich exits the program then."""

    def watch(progress: Progress, _: asyncio.Task[Report]) -> None:
        if progress.phase == phase.value:
            raise failure

    outcome, found = moved(watch)
    assert found == ["destination runs"]
    assert isinstance(outcome, Report)
