"""VMs with devices that write RAM by DMA, or that QEMU migrates: with the whole of a migration."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from migrator import Failed, Limits, Options, Refused, Report, migrate
from migrator.qemu.qmp import Qmp
from migrator.report.phases import Phase
from tests.lab.inside import inner
from tests.lab.inside.devices import Device
from tests.lab.inside.test_mdev import passed_through
from tests.live.dma import Guest
from tests.live.moving import TwoKinds, Watch, move, once
from tests.live.vms import MIB, Machine, Pair, pair
from tracker.devices.dma import dma_sources
from tracker.devices.vfio import VfioType1
from tracker.memory.ram import GuestRange, RamBlock
from tracker.sources.source import DirtySource

REHEARSAL = Options(limits=Limits(on_limit="force", max_rounds=5), memory_only=True)


class Sending(VfioType1):
    """What QEMU does, with a policy that sends all: what the IOMMU claims is sent, all of it."""

    exact = property(lambda self: True, lambda self, value: None)


def two_sides(edu: Device, qemu: Sequence[str], directory: Path) -> TwoKinds:
    machine = inner.machine(edu, directory / "ram", qemu=qemu)
    return TwoKinds(**vars(machine), destination_ram_path=str(directory / "ram-there"))


def after_the_device_wrote(guest: Guest) -> Watch:
    """Let the device write every page of its region once more, after they were sent."""

    def wait() -> None:
        wanted = sum(guest.passes) + guest.workload.dma_pages + 1
        while sum(guest.passes) < wanted:  # the guest goes on meanwhile; we need not
            time.sleep(0.01)

    return once(Phase.ROUNDS, wait)


async def rehearse(guest: Guest, options: Options = REHEARSAL) -> Report:
    vms = guest.vms
    (vms.directory / "destination.qmp").unlink(missing_ok=True)
    await vms.start_destination()
    try:
        return await migrate(
            vms.source.qmp, vms.destination.qmp, options, watch=after_the_device_wrote(guest)
        )
    finally:
        assert await vms.state(vms.source) == "running"
        assert vms.traces(vms.source) == []
        await vms.destination.stop()


def test_what_a_device_wrote_is_not_lost(
    edu: Device,
    inner_qemu: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the source that reads the IOMMU no page differs; without it, pages do."""

    async def body() -> tuple[int, Report, Report]:
        async with inner.running(two_sides(edu, inner_qemu, tmp_path)) as guest:
            with monkeypatch.context() as patched:
                patched.setattr("migrator.tracking.sources.dma_sources", lambda *_: [])
                with pytest.raises(Failed, match="pages differ") as caught:
                    await rehearse(guest)
                assert caught.value.report is not None
                lost = caught.value.report.mismatched_pages
                assert lost is not None
            compared = await rehearse(guest)
            with monkeypatch.context() as patched:
                patched.setattr("tracker.devices.dma.VfioType1", Sending)
                patched.setattr(
                    "migrator.migration.rehearsal._LOOKS", 0
                )  # which would never be the last
                sent = await rehearse(guest, replace(REHEARSAL, policy="send-all"))
            await guest.until_beats(3)
            await guest.until_written(1)
            assert await inner.stopped(guest) > 0
            return lost, compared, sent

    lost, compared, sent = asyncio.run(body())
    standing = next(r for r in compared.rounds if r.compared_pages)
    all_sent = sent.rounds[-2]
    with capsys.disabled():
        print(
            f"\nwithout the VFIO source {lost} pages differ, with it {compared.mismatched_pages}"
            f"\nonce the guest stands: {standing.compared_pages} pages compared in "
            f"{standing.compare_ms:.1f} ms, {standing.sent_pages} sent in "
            f"{standing.send_ms:.1f} ms; "
            f"or {all_sent.sent_pages} sent in {all_sent.send_ms:.1f} ms, as QEMU does"
        )
    assert lost > 0
    assert compared.mismatched_pages == sent.mismatched_pages == 0
    assert compared.status == sent.status == "completed"
    assert compared.differing_pages >= inner.WORKLOAD.dma_pages
    first = compared.rounds[1]
    assert first.dirty_pages_by_source["vfio"] == 128 * MIB // 4096 or first.only_by_source["vfio"]
    assert first.dirty_pages < first.dirty_pages_by_source["vfio"]
    assert sent.final_pages > compared.final_pages


def test_a_device_that_qemu_cannot_migrate_is_refused(
    edu: Device, inner_qemu: tuple[str, ...], tmp_path: Path
) -> None:
    async def body() -> None:
        async with inner.running(two_sides(edu, inner_qemu, tmp_path)) as guest:
            vms = guest.vms
            await vms.start_destination()
            with pytest.raises(Refused) as refused:
                await migrate(vms.source.qmp, vms.destination.qmp)
            assert await vms.state(vms.source) == "running"
            (blocker,) = [f for f in refused.value.findings if f.check == "blocker"]
            assert edu.name in blocker.problem
            assert "--memory-only" in blocker.mend

    asyncio.run(body())


def test_a_device_that_cannot_be_tracked_is_refused(
    edu: Device, inner_qemu: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracking is tried before anything is done."""

    def none(
        pid: int, blocks: Sequence[RamBlock], ranges: Sequence[GuestRange]
    ) -> list[DirtySource]:
        return dma_sources(pid, blocks, [])  # as if the guest saw its RAM nowhere

    async def body() -> None:
        async with inner.running(two_sides(edu, inner_qemu, tmp_path)) as guest:
            vms = guest.vms
            await vms.start_destination()
            monkeypatch.setattr("migrator.tracking.sources.dma_sources", none)
            with pytest.raises(Failed, match="the guest sees nothing of it"):
                await migrate(vms.source.qmp, vms.destination.qmp, REHEARSAL)
            assert await vms.state(vms.source) == "running"
            assert vms.traces(vms.source) == []

    asyncio.run(body())


def test_a_device_that_is_not_found_is_refused(
    edu: Device, inner_qemu: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU says that it has one: that nobody reads it does not mean that it writes nothing."""

    async def body() -> None:
        async with inner.running(two_sides(edu, inner_qemu, tmp_path)) as guest:
            vms = guest.vms
            await vms.start_destination()
            monkeypatch.setattr("migrator.preflight.preflight.dma_sources", lambda *_: [])
            with pytest.raises(Refused, match="none of its VFIO devices was found"):
                await migrate(vms.source.qmp, vms.destination.qmp, REHEARSAL)
            assert await vms.state(vms.source) == "running"

    asyncio.run(body())


async def device_bytes(vms: Pair) -> int:
    """Bytes of VFIO device state that the source has sent (QAPI: VfioStats)."""
    qmp = await Qmp.connect("source", vms.source.qmp)
    try:
        return int((await qmp.migration())["vfio"]["transferred"])
    finally:
        await qmp.close()


@pytest.mark.parametrize(
    ("reader", "tracking", "stopped_by"),
    [
        ("device-log", "on", "stop"),
        ("vfio", "on", "stop"),
        ("vfio", "off", "migrate"),
    ],
)
def test_a_device_that_qemu_can_migrate_moves(
    make_mtty: Callable[[], Device],
    inner_qemu: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    reader: str,
    tracking: str,
    stopped_by: str,
) -> None:
    """Whoever tells what it writes by DMA, which is nothing, does so until the hand-over only."""
    if reader == "vfio":
        monkeypatch.setattr("tracker.devices.dma.can_log", lambda device: False)
    option = f",x-pre-copy-dirty-page-tracking={tracking}"
    (flag, ours), (_, theirs) = passed_through(make_mtty()), passed_through(make_mtty())
    machine = Machine(
        memory=64 * MIB,
        qemu=inner_qemu,
        source_extra=[flag, ours + option],
        destination_extra=[flag, theirs + option],
    )

    async def body() -> Report:
        async with pair(machine) as vms:
            report = await move(vms)
            assert await device_bytes(vms) > 0
            await vms.check_heartbeat_unbroken()
            return report

    report = asyncio.run(body())
    assert report.stopped_by == stopped_by
    assert reader in report.rounds[1].dirty_pages_by_source
    assert reader not in report.rounds[-1].dirty_pages_by_source
