"""The way back, from every state that QEMU's own migration can be in."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from migrator import Aborted, Options, Progress, migrate
from migrator.errors import CommandFailed, QmpUnreachable, VmError
from migrator.policy.judge import Limits
from migrator.qemu import rollback
from migrator.qemu.process import RunDirectory, Vm
from migrator.qemu.qmp import Qmp
from migrator.qemu.rollback import (
    Before,
    bring_back,
    remember,
)
from migrator.qemu.settings import SOURCE_CAPABILITIES, SOURCE_PARAMETERS, Settings
from tests.conftest import require
from tests.live.vms import Pair, pair

RAN = Before(True, Settings({"events": False}, {"max-bandwidth": 5}))
STOOD = replace(RAN, was_running=False)


class Source:
    """A QEMU whose migration goes through the given states, one each time it is asked."""

    name = "source"

    def __init__(self, statuses: Sequence[str | None], state: str = "postmigrate") -> None:
        self._statuses = list(statuses)
        self._state = state
        self.log: list[str] = []
        self.refuses: set[str] = set()
        self.sticks = False

    def as_qmp(self) -> Qmp:
        return cast(Qmp, self)

    async def migration(self) -> dict[str, Any]:
        status = self._statuses[0]
        if len(self._statuses) > 1:
            self._statuses.pop(0)
        self.log.append(f"is {status}")
        return {} if status is None else {"status": status}

    async def execute(self, command: str, **arguments: Any) -> object:
        self.log.append(command)
        if command in self.refuses:
            raise CommandFailed(self.name, command, "no")
        if command == "cont" and not self.sticks:
            self._state = "running"
        if command == "migrate-set-parameters":
            assert arguments == RAN.settings.parameters
        return {}

    async def set_capabilities(self, wanted: object) -> None:
        assert wanted == RAN.settings.capabilities
        await self.execute("migrate-set-capabilities")

    async def run_state(self) -> str:
        return self._state


UNDONE = ["migrate-set-capabilities", "migrate-set-parameters"]


def back(source: Source, before: Before = RAN, timeout_s: float = 5.0) -> str:
    return asyncio.run(bring_back(source.as_qmp(), before, timeout_s=timeout_s))


@pytest.mark.parametrize("status", [None, "none", "completed", "failed", "cancelled"])
@pytest.mark.parametrize("state", ["finish-migrate", "postmigrate"])
def test_nothing_is_under_way(status: str | None, state: str) -> None:
    source = Source([status], state)
    assert back(source) == "running"
    assert source.log == [f"is {status}", *UNDONE, "cont"]


@pytest.mark.parametrize("status", ["setup", "active", "pre-switchover", "wait-unplug"])
def test_what_is_under_way_is_cancelled_first(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollback, "_CONTINUED_S", 0.0)
    source = Source([status, "cancelling", "cancelling", "cancelled"])
    assert back(source) == "running"
    assert source.log == [
        *(f"is {status}", "migrate_cancel", "is cancelling", "is cancelling", "is cancelled"),
        *(*UNDONE, "cont"),
    ]


def test_completed_before_it_could_be_cancelled() -> None:
    source = Source(["device", "completed"])
    source.refuses = {"migrate_cancel"}
    assert back(source) == "running"


def test_qemu_has_let_it_run_already() -> None:
    """Its images may be inactive all the same: cont activates them."""
    source = Source(["cancelled"], state="running")
    assert back(source) == "running"
    assert source.log[-1] == "cont"


@pytest.mark.parametrize("end", ["failed", "completed"])
def test_what_saves_the_device_state_is_not_cancelled(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollback, "_CONTINUED_S", 60.0)
    source = Source(["pre-switchover", "pre-switchover", "device", "device", end])
    assert back(source) == "running"
    assert "migrate_cancel" not in source.log


def test_what_stands_before_the_device_state_is_cancelled_after_a_moment() -> None:
    source = Source(["pre-switchover"] * 1000 + ["cancelled"])
    assert back(source) == "running"
    assert "migrate_cancel" in source.log
    assert source.log.index("migrate_cancel") > 1


def test_a_guest_that_stood_still_goes_on_standing() -> None:
    source = Source(["pre-switchover", "cancelled"])
    assert back(source, STOOD) == "postmigrate"
    assert source.log[-2:] == UNDONE


def test_a_guest_that_we_paused_goes_on() -> None:
    source = Source(["none"], state="paused")
    assert back(source, replace(RAN, paused_by_us=True)) == "running"
    assert source.log[-1] == "cont"


def test_a_guest_that_stood_still_before_we_paused_it_does_not() -> None:
    source = Source(["none"], state="paused")
    assert back(source, replace(STOOD, paused_by_us=True)) == "paused"
    assert "cont" not in source.log


@pytest.mark.parametrize("state", ["paused", "shutdown", "guest-panicked", "io-error", "watchdog"])
def test_only_a_guest_that_was_stopped_for_a_migration_goes_on(state: str) -> None:
    source = Source(["none"], state=state)
    assert back(source) == state
    assert source.log[-2:] == UNDONE


def test_settings_that_cannot_be_undone_are_no_reason_to_leave_it_stopped() -> None:
    source = Source(["cancelled"])
    source.refuses = set(UNDONE)
    assert back(source) == "running"


def test_a_migration_that_cannot_be_cancelled() -> None:
    source = Source(["cancelling"])
    with pytest.raises(VmError, match="its own migration stays 'cancelling'"):
        back(source, timeout_s=0.02)
    assert "cont" not in source.log


def test_a_source_that_refuses_to_go_on() -> None:
    source = Source(["cancelled"])
    source.refuses = {"cont"}
    with pytest.raises(CommandFailed):
        back(source)
    source = Source(["cancelled"])
    source.sticks = True
    with pytest.raises(VmError, match="does not go on: it is 'postmigrate'"):
        back(source)


# -- a real QEMU --------------------------------------------------------------------------------

QEMU = "qemu-system-x86_64"


def with_qemu(body: Callable[[Qmp, Vm], Awaitable[None]]) -> None:
    require(None if shutil.which(QEMU) else f"{QEMU} is not installed")

    async def run() -> None:
        with RunDirectory() as directory:
            vm = Vm("source", directory)
            try:
                small = ["-accel", "tcg", "-m", "16M", "-nodefaults", "-display", "none"]
                await vm.start([QEMU, *small], incoming=False)
                qmp = await Qmp.connect(vm.name, vm.qmp)
                try:
                    await body(qmp, vm)
                finally:
                    await qmp.close()
            finally:
                await vm.stop()

    asyncio.run(run())


async def change(qmp: Qmp) -> None:
    await qmp.set_capabilities(SOURCE_CAPABILITIES)
    await qmp.execute("migrate-set-parameters", **SOURCE_PARAMETERS)


@pytest.mark.live
@pytest.mark.parametrize("runs", [True, False])
def test_everything_is_as_it_was(runs: bool) -> None:
    """Also after QEMU's migration has completed, and its guest stands still for good."""

    async def body(qmp: Qmp, vm: Vm) -> None:
        if not runs:
            await qmp.execute("stop")
        before = await remember(qmp, runs)
        assert before.settings.capabilities == dict.fromkeys(SOURCE_CAPABILITIES, False)
        assert before.settings.parameters.keys() == SOURCE_PARAMETERS.keys()
        await change(qmp)
        assert await remember(qmp, runs) != before
        mark = qmp.mark()
        await qmp.execute("migrate", uri="exec:cat > /dev/null")
        await qmp.migration_status("pre-switchover", since=mark, timeout_s=20)
        await qmp.execute("migrate-continue", state="pre-switchover")
        event = await qmp.migration_status("completed", since=mark, timeout_s=20)
        assert event.data["status"] == "completed"
        assert await bring_back(qmp, before) == ("running" if runs else "postmigrate")
        assert await remember(qmp, runs) == before

    with_qemu(body)


@pytest.mark.live
@pytest.mark.parametrize("paused", [False, True])
def test_from_a_migration_that_is_under_way(paused: bool) -> None:
    """So slow that it never ends, or in its pause before the switchover."""

    async def body(qmp: Qmp, vm: Vm) -> None:
        before = await remember(qmp, True)
        await change(qmp)
        mark = qmp.mark()
        if not paused:
            await qmp.execute("migrate-set-parameters", max_bandwidth=1000)
        await qmp.execute("migrate", uri="exec:cat > /dev/null")
        status = "pre-switchover" if paused else "active"
        event = await qmp.migration_status(status, since=mark, timeout_s=20)
        assert event.data["status"] == status
        assert await bring_back(qmp, before) == "running"
        assert (await qmp.migration())["status"] == "cancelled"
        assert await remember(qmp, True) == before

    with_qemu(body)


@pytest.mark.live
def test_a_source_that_was_killed() -> None:
    async def body(qmp: Qmp, vm: Vm) -> None:
        before = await remember(qmp, True)
        await vm.stop()
        with pytest.raises(QmpUnreachable):
            await bring_back(qmp, before)

    with_qemu(body)


# -- somebody else pauses the guest meanwhile ---------------------------------------------------


async def moved_while_paused_by_somebody(limits: Limits) -> tuple[str, str, Exception | None]:
    """Migrate; ``stop`` comes over another socket in the rounds. Return the states of both."""
    async with pair(start=False) as vms:
        second = str(vms.directory / "second")
        extra = ["-qmp", f"unix:{second},server=on,wait=off"]
        vms.machine = replace(vms.machine, source_extra=extra)
        await vms.start_destination()
        await vms.start_source()
        administrator = await Qmp.connect("source", second)
        stopping: list[asyncio.Task[Any]] = []

        def watch(progress: Progress) -> None:
            if progress.phase == "rounds" and not stopping:
                stopping.append(asyncio.ensure_future(administrator.execute("stop")))

        outcome: Exception | None = None
        try:
            try:
                await migrate(vms.source.qmp, vms.destination.qmp, Options(limits), watch=watch)
            except Aborted as error:
                outcome = error
            await stopping[0]
            return await Pair.state(vms.source), await Pair.state(vms.destination), outcome
        finally:
            await administrator.close()


@pytest.mark.live
def test_a_guest_that_somebody_paused_is_not_resumed_by_giving_up() -> None:
    limits = Limits(downtime_ms=1.0, max_rounds=20)
    source, destination, outcome = asyncio.run(moved_while_paused_by_somebody(limits))
    assert isinstance(outcome, Aborted)
    assert (source, destination) == ("paused", "inmigrate")


@pytest.mark.live
def test_a_guest_that_somebody_paused_arrives_paused() -> None:
    source, destination, outcome = asyncio.run(moved_while_paused_by_somebody(Limits()))
    assert outcome is None
    assert (source, destination) == ("postmigrate", "paused")
