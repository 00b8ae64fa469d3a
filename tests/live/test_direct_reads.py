"""Whole migrations of a guest whose disk is read past the page cache, a read being in flight.

Two things take care of what arrives late, as :mod:`tests.live.test_late_reads` explains, and each
is switched off here in turn: then pages differ, the migration fails, and the source goes on.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from migrator import Failed, Progress, Report, migrate
from migrator.migration.attempt import Attempt
from migrator.migration.guard import Guard
from migrator.report.phases import Phase
from tests.live.moving import VERIFIED, Watch, move
from tests.live.qemus import Qemu, each_qemu
from tests.live.reader_guest import Reader
from tests.live.slowdisk import SlowDisk, slow_disk
from tests.live.vms import Pair, pair

pytestmark = pytest.mark.live


# What waits for the end anyway is not lost: on a slow machine, the guest comes round to the same
# memory several times while it is copied, and another policy would let all of that wait.
SENT_AT_ONCE = replace(VERIFIED, policy="send-all")

_SLOWLY_MS = 20.0  # likewise the guest must not come round to it again later


def with_reads(qemu: Qemu, body: Callable[[Pair, SlowDisk], Coroutine[Any, Any, None]]) -> None:
    machine = Reader(qemu=qemu.require())

    async def run() -> None:
        with slow_disk(machine.reading.disk_bytes) as disk:
            async with pair(Reader(qemu=machine.qemu, disk=disk.path), start=False) as vms:
                await vms.start_destination()
                await vms.start_source()
                try:
                    await body(vms, disk)
                finally:
                    disk.flow()

    asyncio.run(run())


def held(disk: SlowDisk, first: Phase, until: Phase) -> Watch:
    """Hold a read from when a phase is entered, and let it arrive when another one is."""
    entered: set[str] = set()

    def watch(progress: Progress) -> None:
        if progress.phase in entered:
            return
        entered.add(progress.phase)
        if progress.phase == first.value:
            disk.hold()
            disk.await_read()
        elif progress.phase == until.value:
            # a little later: QEMU answers nobody before the read has arrived
            threading.Timer(0.05, disk.flow, [_SLOWLY_MS]).start()

    return watch


async def loses(vms: Pair, watch: Watch) -> None:
    """Check that pages differ, and that the guest then goes on where it was."""
    with pytest.raises(Failed, match="pages differ; the destination was not run") as caught:
        await migrate(vms.source.qmp, vms.destination.qmp, SENT_AT_ONCE, watch=watch)
    report = caught.value.report
    assert report is not None
    assert report.mismatched_pages
    await vms.beats(vms.source, 3)
    assert await vms.state(vms.source) == "running"
    await vms.start_destination()


def check_compared(report: Report) -> None:
    assert report.differing_pages
    assert report.differing_pages <= report.compared_pages
    assert report.phases[Phase.COMPARE.value] > 0


@each_qemu
def test_a_read_in_flight_while_its_page_is_copied(
    qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(vms: Pair, disk: SlowDisk) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(
                "migrator.preflight.preflight.reads_past_page_cache", lambda nodes: False
            )
            await loses(vms, held(disk, Phase.ROUNDS, Phase.SWITCHOVER))
        check_compared(await move(vms, held(disk, Phase.ROUNDS, Phase.SWITCHOVER), SENT_AT_ONCE))
        await vms.check_heartbeat_unbroken()

    with_reads(qemu, body)


@each_qemu
def test_a_read_in_flight_when_tracking_begins(qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_drain(attempt: Attempt, guard: Guard) -> None:
        pass

    async def body(vms: Pair, disk: SlowDisk) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(Attempt, "_drain", no_drain)
            await loses(vms, held(disk, Phase.ATTACH, Phase.SWITCHOVER))
        await move(vms, held(disk, Phase.ATTACH, Phase.DRAIN))
        await vms.check_heartbeat_unbroken()

    with_reads(qemu, body)
