"""Migrations that only converge if writers are slowed; and that these are free again, always."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from migrator import Aborted, Limits, Options, Progress, Report, migrate
from migrator.errors import Failed, Refused
from migrator.guest.workload import Workload
from migrator.policy.throttling import AUTO
from tests.live.moving import VERIFIED, Ram, check_still_at_source
from tests.live.sending import Road, eventually, on_a_road
from tests.live.vms import MIB, Machine, Pair, pair
from tests.processes import fault_servers
from tracker.answered import uffdsync
from tracker.answered.brake import Brake
from tracker.answered.hotranges import hot_ranges
from tracker.answered.uffdsync import UffdSync
from tracker.bits.pageset import PageSet
from tracker.errors import NotTracking
from tracker.inject import acquire as inject

pytestmark = pytest.mark.live

FAST = Machine(memory=128 * MIB, workload=Workload(working_set_bytes=16 * MIB, pages_per_s=20_000))
"""78 MiB/s, and in 400 ms a slow link does not carry its working set."""
SLOW_LINK = 24 * MIB
"""Faster than 64 KiB in 10 ms, below which answered faults of whole chunks slow no writer."""
LIMITS = Limits(downtime_ms=400.0)
HOPELESS = Limits(downtime_ms=1.0, max_rounds=10_000, max_seconds=30)
NEVER_FITS = Options(limits=HOPELESS, verify=True, throttle_percent=AUTO, tracker="uffd")
"""No link is fast enough."""


def with_pair(
    body: Callable[[Pair], Coroutine[Any, Any, None]], machine: Machine | None = None
) -> None:
    async def run() -> None:
        others = fault_servers()
        async with pair(machine) as vms:
            await body(vms)
            await eventually(lambda: not fault_servers() - others, "nobody answers faults")

    asyncio.run(run())


def when_slowed(action: Callable[[], object], to: str = "") -> Callable[[Progress], None]:
    """Do something once writers are slowed, for the first time."""
    done: list[str] = []

    def watch(progress: Progress) -> None:
        if progress.note.startswith(f"writers slowed to {to}") and not done:
            done.append(progress.note)
            action()

    return watch


# -- it converges ---------------------------------------------------------------------------------


class Paces:
    """What writers were slowed to, and in which phase.

    :ivar phase: of the migration
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.phase = ""
        self.noted: list[tuple[str, int, float]] = []
        slow = UffdSync.slow

        def noting(source: UffdSync, percent: int, longest_ms: float) -> None:
            self.noted.append((self.phase, percent, longest_ms))
            slow(source, percent, longest_ms)

        monkeypatch.setattr(UffdSync, "slow", noting)


@pytest.mark.parametrize("tracker", ["uffd", "uffd-sync"])
@pytest.mark.one_in(2)
def test_a_guest_that_writes_faster_than_the_link_is_moved_if_it_may_be_slowed(
    tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paces = Paces(monkeypatch)

    async def body(road: Road) -> None:
        never = Options(limits=replace(LIMITS, max_rounds=5), tracker=tracker, verify=True)
        await road.next_receiver()
        with pytest.raises(Aborted, match="does not converge") as caught:
            await road.send(options=never, bandwidth_bytes_per_s=SLOW_LINK)
        assert caught.value.report is not None
        assert caught.value.report.throttle_percent == 0
        assert await road.one_runs() == "source"
        assert paces.noted == []

        auto = replace(never, limits=LIMITS, throttle_percent=AUTO)
        notes = set[str]()
        await road.next_receiver()

        def watch(progress: Progress) -> None:
            notes.add(progress.note)
            paces.phase = progress.phase

        report = await road.send(watch, auto, bandwidth_bytes_per_s=SLOW_LINK)
        assert report.mismatched_pages == 0
        assert report.verified_pages
        assert report.predicted_downtime_ms is not None
        assert report.predicted_downtime_ms <= LIMITS.downtime_ms
        percents = [r.throttle_percent for r in report.rounds]
        assert 0 < max(percents) == report.throttle_percent <= AUTO
        assert f"writers slowed to {100 - report.throttle_percent} %" in notes
        assert percents[0] == percents[1] == percents[-1] == percents[-2] == 0
        *slower, eased, free = paces.noted
        assert {(phase, longest_ms) for phase, _, longest_ms in slower} == {("rounds", 10.0)}
        assert eased == ("switchover", report.throttle_percent, 1.0)  # before it is to stop
        assert free == ("final-collect", 0, 0.0)
        assert await road.one_runs() == "destination"

    on_a_road(body, FAST)


def test_what_is_allowed_is_the_most() -> None:
    async def body(vms: Pair) -> None:
        with pytest.raises(Aborted, match="writers slowed to 60 %") as caught:
            await migrate(
                vms.source.qmp, vms.destination.qmp, replace(NEVER_FITS, throttle_percent=40)
            )
        report = caught.value.report
        assert report is not None
        assert max(r.throttle_percent for r in report.rounds) == report.throttle_percent == 40
        await check_still_at_source(vms)

    with_pair(body, Machine(nodes=2))


def test_a_rehearsal_slows_writers_too_and_lets_them_go(monkeypatch: pytest.MonkeyPatch) -> None:
    paces = Paces(monkeypatch)

    async def body(vms: Pair) -> None:
        limits = replace(HOPELESS, max_rounds=60, on_limit="force")
        options = replace(NEVER_FITS, memory_only=True, limits=limits)
        report = await migrate(vms.source.qmp, vms.destination.qmp, options)
        assert report.mismatched_pages == 0
        assert report.throttle_percent > 0
        assert [pace[1:] for pace in paces.noted[-2:]] == [(report.throttle_percent, 1.0), (0, 0.0)]
        await check_still_at_source(vms)

    with_pair(body)


def test_where_it_cannot_be_done_it_is_said_and_all_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a QEMU that may have no userfaultfd for writes of the kernel; this is known late."""

    async def body(vms: Pair) -> None:
        def acquire(pid: int) -> inject.AcquiredUffd:
            acquired = inject.acquire_userfaultfd(pid)
            return acquired._replace(user_mode_only=pid == vms.source.pid)

        monkeypatch.setattr(uffdsync, "acquire_userfaultfd", acquire)
        options = replace(NEVER_FITS, limits=replace(HOPELESS, max_rounds=60))
        with pytest.raises(Aborted, match=r"does not converge.*writers cannot be slowed"):
            await migrate(vms.source.qmp, vms.destination.qmp, options)
        await check_still_at_source(vms)
        forced = replace(options, limits=Limits(max_seconds=60, on_limit="force"))
        report = await migrate(vms.source.qmp, vms.destination.qmp, forced)
        assert report.mismatched_pages == 0

    with_pair(body)


def test_a_kernel_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        raise NotTracking("uffd-sync", "as in Linux 5.18")

    async def body(vms: Pair) -> None:
        monkeypatch.setattr("migrator.preflight.preflight.check_answering", check)
        with pytest.raises(Refused) as caught:
            await migrate(vms.source.qmp, vms.destination.qmp, NEVER_FITS)
        (finding,) = caught.value.findings
        assert (finding.check, "as in Linux 5.18" in finding.problem) == ("throttle", True)
        report = await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED)
        assert report.status == "completed"

    with_pair(body)


# -- and it ends ----------------------------------------------------------------------------------


@pytest.mark.thorough
def test_it_is_given_up_if_that_does_not_help() -> None:
    async def body(vms: Pair) -> None:
        with pytest.raises(Aborted, match=r"does not converge.*writers slowed to 1 %"):
            await migrate(vms.source.qmp, vms.destination.qmp, NEVER_FITS)
        await check_still_at_source(vms)

    with_pair(body)


def test_cancelled_while_writers_are_slowed() -> None:
    async def body(vms: Pair) -> None:
        task: asyncio.Task[object]
        watch = when_slowed(lambda: task.cancel(), to="1 %")
        task = asyncio.ensure_future(
            migrate(vms.source.qmp, vms.destination.qmp, NEVER_FITS, watch=watch)
        )
        with pytest.raises(Aborted, match="interrupted"):
            await task
        await check_still_at_source(vms)

    with_pair(body)


_ORCHESTRATOR = """
import asyncio, os, signal, sys
from migrator import Limits, Options, migrate
source, destination = sys.argv[1:]
limits = Limits(downtime_ms=1.0, max_rounds=10_000)
options = Options(limits=limits, throttle_percent=99, tracker="uffd")
def watch(progress):
    if progress.note == "writers slowed to 1 %":
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(migrate(source, destination, options, watch=watch))
"""


def test_killed_while_writers_are_slowed() -> None:
    async def body(vms: Pair) -> None:
        orchestrator = await asyncio.create_subprocess_exec(
            *[sys.executable, "-c", _ORCHESTRATOR],
            *[vms.source.qmp, vms.destination.qmp],
            stderr=subprocess.PIPE,
        )
        assert orchestrator.stderr is not None
        said = await asyncio.wait_for(orchestrator.stderr.read(), 120)
        assert await orchestrator.wait() == -signal.SIGKILL, said.decode()
        await eventually(lambda: vms.traces(vms.source) == [], "nothing is left")
        await check_still_at_source(vms)

    with_pair(body)


# -- what is in the ranges --------------------------------------------------------------------

SPOT = 128 * MIB
"""Offset of RAM that neither the guest nor its firmware writes."""
EVERY_OTHER = range(0, 4096, 2)


def holes_left(vms: Pair, report: Report) -> int:
    """Of the pages between those that were written, how many still are holes."""
    assert report.throttle_percent > 0
    ram = Ram(vms.source, vms.machine)
    return sum(ram.is_hole(SPOT + (page + 1) * 4096, 4096) for page in EVERY_OTHER)


async def given_up_while_every_other_page_is_written(vms: Pair) -> Report:
    ram = Ram(vms.source, vms.machine)

    def watch(progress: Progress) -> None:
        for page in EVERY_OTHER:
            ram.write(SPOT + page * 4096, b"x")

    options = replace(NEVER_FITS, limits=replace(HOPELESS, max_rounds=100), throttle_percent=50)
    with pytest.raises(Aborted) as caught:
        await migrate(vms.source.qmp, vms.destination.qmp, options, watch=watch)
    assert caught.value.report is not None
    return caught.value.report


@pytest.mark.thorough
def test_holes_in_what_is_handed_over_stay_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(vms: Pair) -> None:
        report = await given_up_while_every_other_page_is_written(vms)
        assert holes_left(vms, report) == len(EVERY_OTHER)
        await vms.start_destination()
        with monkeypatch.context() as patch:
            patch.setattr(Brake, "handed_over", False)  # and so nobody asks which are holes
            report = await given_up_while_every_other_page_is_written(vms)
        assert holes_left(vms, report) < len(EVERY_OTHER)

    with_pair(body)


def spot_is_written_while_nobody_looks(monkeypatch: pytest.MonkeyPatch, vms: Pair) -> None:
    """Write a page of a span once, after one tracker let go of it, before the other protects it."""
    start, name = UffdSync.start, "ram0"

    def late(source: UffdSync) -> None:
        if source._pid == vms.source.pid:
            Ram(vms.source, vms.machine).write(SPOT + 4096, b"only once")
        start(source)

    def with_spot(hot: PageSet) -> PageSet:
        spans = hot_ranges(hot)
        spans[name].set_range(SPOT // 4096, SPOT // 4096 + 16)
        return spans

    monkeypatch.setattr(UffdSync, "start", late)
    monkeypatch.setattr("tracker.answered.brake.hot_ranges", with_spot)


def test_what_is_written_while_it_is_handed_over_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    forced = replace(NEVER_FITS, limits=replace(HOPELESS, max_rounds=60, on_limit="force"))

    async def body(vms: Pair) -> None:
        spot_is_written_while_nobody_looks(monkeypatch, vms)
        with monkeypatch.context() as patch:
            patch.setattr(Brake, "_count_as_written", lambda _: None)
            with pytest.raises(Failed, match="pages differ; the destination was not run") as caught:
                await migrate(vms.source.qmp, vms.destination.qmp, forced)
            assert caught.value.report is not None
            assert caught.value.report.throttle_percent > 0
        await vms.start_destination()
        Ram(vms.source, vms.machine).discard(SPOT, 16 * 4096)
        report = await migrate(vms.source.qmp, vms.destination.qmp, forced)
        assert report.throttle_percent > 0
        assert report.mismatched_pages == 0
        await vms.check_heartbeat_unbroken()

    with_pair(body)
