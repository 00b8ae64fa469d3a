"""Whatever is sent, and whenever: no page is lost. On the real kernel and the real QEMU."""

from __future__ import annotations

import asyncio
import os
import pkgutil
import threading
from collections.abc import Callable, Coroutine
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from migrator import Limits, Progress, Report, migrate
from migrator.choices import PolicyName
from migrator.errors import Failed
from migrator.guest.workload import Workload
from migrator.migration.comparing import Comparing
from migrator.migration.ledger import Ledger
from migrator.report.phases import DOWNTIME, Phase
from migrator.tracking.readings import Collected, Scan
from migrator.tracking.sources import Sources
from migrator.transport.local import LocalCopy
from tests.live.moving import VERIFIED, Ram, once
from tests.live.qemus import Qemu, each_qemu
from tests.live.vms import MIB, Machine, Pair, pair
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet

pytestmark = pytest.mark.live

SPOT = 128 * MIB
"""Offset of RAM that neither the guest nor its firmware writes."""
PAGES = 4096
QUIET = Machine(workload=Workload(working_set_bytes=4 * MIB, pages_per_s=100))
ROOMY = replace(VERIFIED, limits=Limits(downtime_ms=10_000, on_limit="force"))
"""What is hot may wait, however slow the machine is."""


def with_pair(body: Callable[[Pair], Coroutine[Any, Any, None]], machine: Machine) -> None:
    async def run() -> None:
        async with pair(machine) as vms:
            await body(vms)

    asyncio.run(run())


async def moved(vms: Pair, policy: PolicyName, watch: Callable[[Progress], object]) -> Report:
    options = replace(ROOMY, policy=policy)

    def watching(progress: Progress) -> None:
        watch(progress)

    return await migrate(vms.source.qmp, vms.destination.qmp, options, watch=watching)


# -- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["send-all", "defer-hot", "skip-unchanged", "adaptive"])
def test_a_tight_writer_moves_with_every_page(policy: PolicyName) -> None:
    async def body(vms: Pair) -> None:
        options = replace(VERIFIED, policy=policy)
        report = await migrate(vms.source.qmp, vms.destination.qmp, options)
        assert report.policy == policy
        assert report.mismatched_pages == 0
        assert report.verified_pages
        assert list(report.predicted_downtime) == [phase.value for phase in DOWNTIME]
        assert report.predicted_downtime_ms is not None
        assert sum(report.predicted_downtime.values()) == pytest.approx(
            report.predicted_downtime_ms
        )
        assert vms.traces(vms.source) == []
        await vms.check_heartbeat_unbroken()

    with_pair(body, Machine())


@pytest.mark.parametrize("tracker", ["uffd", "uffd-sync"])
@each_qemu
def test_adaptive_on_every_qemu_and_tracker(qemu: Qemu, tracker: str) -> None:
    machine = Machine(qemu=qemu.require())

    async def body(vms: Pair) -> None:
        options = replace(VERIFIED, tracker=tracker)
        assert options.policy == "adaptive"
        report = await migrate(vms.source.qmp, vms.destination.qmp, options)
        assert report.mismatched_pages == 0
        assert report.verified_pages
        await vms.check_heartbeat_unbroken()

    with_pair(body, machine)


# -- what is hot ----------------------------------------------------------------------------------


class Hammer:
    """Writes some pages whenever something changes, until the source is about to be stopped.

    That is between any two looks.
    """

    def __init__(self, ram: Ram, first: int, pages: int) -> None:
        self._ram, self._first, self._pages = ram, first, pages
        self._passes = 0
        self._ended = False

    def __call__(self, progress: Progress) -> None:
        if self._ended:
            return
        self._ended = progress.phase == Phase.SWITCHOVER.value
        self._passes += 1
        for page in range(self._first, self._first + self._pages):
            self._ram.write(page * 4096, self._passes.to_bytes(4, "little"))


@contextmanager
def forgetting_what_waits(monkeypatch: pytest.MonkeyPatch, first: int, pages: int) -> Any:
    """The source does not report what it left unprotected, and nobody has kept it."""
    collect, take = Sources.collect, Ledger.take

    async def forgetful(
        self: Sources, *, backends_too: bool, scan: Scan | None = None, left: PageSet | None = None
    ) -> Collected:
        collected = await collect(self, backends_too=backends_too, scan=scan, left=left)
        if scan is None and not backends_too:
            for bitmap in collected.merged.dirty.values():
                forgotten = DirtyBitmap.empty(bitmap.npages)
                forgotten.set_range(first, first + pages)
                bitmap.words[:] = (bitmap - forgotten).words
        return collected

    def without_what_waited(
        ledger: Ledger,
        found: PageSet,
        waiting: PageSet | None = None,
        left: PageSet | None = None,
    ) -> PageSet:
        ledger.waiting = PageSet.empty(found.blocks)
        return take(ledger, found, waiting, left)

    with monkeypatch.context() as patched:
        patched.setattr(Sources, "collect", forgetful)
        patched.setattr(Ledger, "take", without_what_waited)
        yield


def test_what_waits_is_sent_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = 64
    first = SPOT // 4096

    async def waits(vms: Pair) -> Report:
        return await moved(vms, "defer-hot", Hammer(Ram(vms.source, vms.machine), first, pages))

    async def body(vms: Pair) -> None:
        with forgetting_what_waits(monkeypatch, first, pages):
            with pytest.raises(Failed, match="pages differ; the destination was not run") as caught:
                await waits(vms)
            assert caught.value.report is not None
            assert (caught.value.report.mismatched_pages or 0) >= pages
        await vms.start_destination()
        report = await waits(vms)
        assert report.mismatched_pages == 0
        (last_round,) = [r for r in report.rounds if r.waiting_pages][-1:]
        assert last_round.waiting_pages >= pages
        assert report.final_pages >= pages
        await vms.check_heartbeat_unbroken()

    with_pair(body, QUIET)


# -- what is unchanged ----------------------------------------------------------------------------


def contents() -> tuple[bytes, bytes]:
    return os.urandom(PAGES * 4096), os.urandom(PAGES * 4096)


@pytest.fixture
def always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pays is not what is tested here."""
    monkeypatch.setattr(
        "migrator.policy.skipping.worth_comparing", lambda sampled, _: sampled.share > 0.5
    )


@pytest.mark.usefixtures("always_worth_it")
def test_what_is_written_and_unchanged_is_not_sent() -> None:
    a, _ = contents()

    async def body(vms: Pair) -> None:
        ram = Ram(vms.source, vms.machine)
        ram.write(SPOT, a)
        again = once(Phase.ROUNDS, lambda: ram.write(SPOT, a))
        report = await moved(vms, "skip-unchanged", again)
        assert report.mismatched_pages == 0
        first = report.rounds[1]
        assert first.dirty_pages >= PAGES
        assert first.unchanged_pages >= PAGES
        assert first.sent_pages <= first.dirty_pages - PAGES
        await vms.check_heartbeat_unbroken()

    with_pair(body, QUIET)


def compared_with(a: bytes) -> Callable[..., Coroutine[Any, Any, PageSet]]:
    """Compares the guest's pages with what they once were, whatever was sent since."""
    once_were = np.frombuffer(a, np.uint8).reshape(PAGES, 4096)

    async def changed(
        transport: LocalCopy,
        pages: PageSet,
        data: PageSet,
        **_: bool,
    ) -> PageSet:
        (pair,) = transport._pairs
        memory = pair.source.memory[SPOT : SPOT + len(a)].reshape(PAGES, 4096)
        unchanged = np.flatnonzero((memory == once_were).all(axis=1)) + SPOT // 4096
        asked = pages[pair.name]
        found = DirtyBitmap.from_pages(asked.npages, unchanged)
        return PageSet(pages.blocks, {pair.name: asked - found})

    return changed


@pytest.mark.usefixtures("always_worth_it")
def test_changed_and_changed_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A was sent, B was sent, and the page is A again: that is not what the destination has."""
    a, b = contents()

    def there_and_back(ram: Ram) -> Callable[[Progress], None]:
        written: list[bytes] = []

        def watch(progress: Progress) -> None:
            if progress.phase == Phase.ROUNDS.value and not written:
                written.append(b)
                ram.write(SPOT, b)
            if progress.phase == Phase.SWITCHOVER.value and len(written) == 1:
                written.append(a)
                ram.write(SPOT, a)

        return watch

    async def body(vms: Pair) -> None:
        ram = Ram(vms.source, vms.machine)
        ram.write(SPOT, a)
        monkeypatch.setattr(Comparing, "is_worth_it", property(lambda _: True))
        with monkeypatch.context() as patched:
            patched.setattr(LocalCopy, "changed", compared_with(a))
            with pytest.raises(Failed, match=rf"{PAGES} of \d+ pages differ"):
                await moved(vms, "skip-unchanged", there_and_back(ram))
        await vms.start_destination()
        report = await moved(vms, "skip-unchanged", there_and_back(ram))
        assert report.mismatched_pages == 0
        assert Ram(vms.destination, vms.machine).read(SPOT, len(a)) == a
        assert report.final_pages >= PAGES
        await vms.check_heartbeat_unbroken()

    with_pair(body, QUIET)


# -- beside all that ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["migrator.policy.deferral.history.age", "migrator.tracking.sources.merge"],
    ids=["history", "merging"],
)
def test_the_event_loop_goes_on_meanwhile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These take longer the more RAM there is: each waits here until the loop has done something.

    In the loop they would wait in vain.
    """
    module, _, attribute = name.rpartition(".")
    work: Callable[..., Any] = getattr(pkgutil.resolve_name(module), attribute)
    waited = list[bool]()

    async def body(vms: Pair) -> None:
        loop = asyncio.get_running_loop()

        def wait_and_work(*arguments: Any) -> Any:
            went_on = threading.Event()
            loop.call_soon_threadsafe(went_on.set)
            waited.append(went_on.wait(20))
            return work(*arguments)

        monkeypatch.setattr(name, wait_and_work)
        report = await moved(vms, "adaptive", lambda _: None)
        assert report.mismatched_pages == 0

    with_pair(body, QUIET)
    assert waited
    assert all(waited)
