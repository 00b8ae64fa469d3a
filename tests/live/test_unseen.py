"""Writes that no page table sees, and a source that knows only where they may be.

A write to the RAM file by another descriptor stands for a device's DMA here: write-protection does
not see it, any more than that. The source that knows is as an IOMMU without dirty bits is: it
reports every page, each time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from migrator import migrate
from migrator.guest.workload import Workload
from migrator.preflight.plan import Plan
from migrator.preflight.preflight import preflight
from migrator.preflight.waiting import Side
from migrator.qemu.qmp import Qmp
from migrator.report.phases import Phase
from tests.live.moving import VERIFIED, Ram, Watch, move, once
from tests.live.test_pages import LENGTH, SPOT, fails, with_pair
from tests.live.vms import MIB, Machine, Pair
from tracker.bits.pageset import PageSet
from tracker.memory.ram import GuestRange, RamBlock
from tracker.sources.source import DirtySource

pytestmark = pytest.mark.live

PAGES = LENGTH // 4096
HOLE = SPOT + 64 * MIB
"""Offset of RAM that nobody ever touches."""


class Everything:
    """An IOMMU without dirty bits."""

    name = "vfio"
    exact = False

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self._blocks = blocks
        self.stopped = False

    def start(self) -> None:
        pass

    def collect(self) -> PageSet:
        assert not self.stopped
        return PageSet.full(self._blocks)

    def stop(self) -> None:
        self.stopped = True


class Exactly(Everything):
    """An IOMMU with dirty bits: reports the pages of ``SPOT``, once they are written."""

    exact = True

    def collect(self) -> PageSet:
        report = PageSet.empty(self._blocks)
        report[self._blocks[0].name].set_range(SPOT // 4096, SPOT // 4096 + PAGES)
        return report


def with_source(monkeypatch: pytest.MonkeyPatch, kind: type[Everything]) -> list[DirtySource]:
    """Let every migration from now on have such a source; they are appended to the result."""
    made: list[DirtySource] = []

    def sources(
        pid: int, blocks: Sequence[RamBlock], ranges: Sequence[GuestRange]
    ) -> list[DirtySource]:
        assert ranges
        made.append(kind(blocks))
        return made[-1:]

    monkeypatch.setattr("migrator.tracking.sources.dma_sources", sources)
    return made


def write_unseen(source: Ram) -> None:
    """Write as a device does."""
    with source.file() as fd:
        assert os.pwrite(fd, os.urandom(LENGTH), SPOT) == LENGTH


def after_it_was_sent(source: Ram) -> Watch:
    return once(Phase.ROUNDS, lambda: write_unseen(source))


def test_without_a_source_that_sees_them_they_are_lost() -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        await fails(vms, lambda: write_unseen(source))

    with_pair(body)


def test_what_an_inexact_source_reports_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        made = with_source(monkeypatch, Everything)
        report = await move(vms, after_it_was_sent(source))
        assert report.differing_pages == PAGES
        npages = vms.machine.memory // 4096
        assert report.compared_pages > npages // 2
        # and not sent, nor sent round by round
        assert report.final_pages < npages // 2
        assert report.rounds[1].dirty_pages_by_source["vfio"] == npages
        assert report.rounds[1].dirty_pages < npages // 2
        assert report.phases[Phase.COMPARE.value] > 0
        assert Phase.COMPARE.value in report.downtime_phases
        assert destination.read(SPOT, LENGTH) == source.read(SPOT, LENGTH)
        # what is claimed to be written, and is not there, is left alone
        assert source.is_hole(HOLE, LENGTH)
        assert destination.is_hole(HOLE, LENGTH)
        # a migration may read their bits from here on, so nobody is asked any more
        assert "vfio" not in report.rounds[-1].dirty_pages_by_source
        assert [source.stopped for source in made if isinstance(source, Everything)] == [True]
        await vms.check_heartbeat_unbroken()

    with_pair(body)


def test_what_an_exact_source_reports_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        with_source(monkeypatch, Exactly)
        report = await move(vms, after_it_was_sent(source))
        assert report.compared_pages == 0
        assert Phase.COMPARE.value not in report.phases
        first = report.rounds[1]
        assert first.only_by_source["vfio"] == first.dirty_pages_by_source["vfio"] == PAGES
        assert destination.read(SPOT, LENGTH) == source.read(SPOT, LENGTH)

    with_pair(body)


def stopping_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every preflight find that QEMU's migration would take dirty bits away."""

    async def changed(source: Qmp, side: Side, **options: Any) -> Plan:
        plan = await preflight(source, side, **options)
        return replace(plan, stop_first=True)

    monkeypatch.setattr("migrator.migration.orchestrator.preflight", changed)


def test_stopped_before_the_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is harvested before QEMU's own migration begins; the destination is then let run."""

    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        stopping_first(monkeypatch)
        with_source(monkeypatch, Everything)
        report = await move(vms, after_it_was_sent(source))
        assert report.stopped_by == "stop"
        assert report.differing_pages == PAGES
        assert report.downtime_ms
        spent = sum(report.phases[name] for name in report.downtime_phases)
        assert spent == pytest.approx(report.downtime_ms, abs=5)
        await vms.check_heartbeat_unbroken()

    with_pair(body)


def test_stopped_before_the_migration_and_brought_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        stopping_first(monkeypatch)
        await fails(vms, lambda: write_unseen(source))

    with_pair(body)


def test_a_paused_vm_that_is_stopped_first_stays_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(vms: Pair, source: Ram, destination: Ram) -> None:
        stopping_first(monkeypatch)
        qmp = await Qmp.connect("source", vms.source.qmp)
        await qmp.execute("stop")
        await qmp.close()
        report = await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED)
        assert report.mismatched_pages == 0
        assert report.downtime_ms is None
        assert await vms.state(vms.destination) == "paused"

    with_pair(body, Machine(memory=128 * MIB, workload=Workload(working_set_bytes=16 * MIB)))
