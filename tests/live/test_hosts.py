"""A VM moves from one host to another, over a network, in the ways that one may ask for."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from migrator import Failed
from migrator.guest.workload import Workload
from migrator.link import keys
from migrator.qemu.qmp import Qmp
from migrator.report.phases import Phase
from migrator.tracking.readings import Collected, Scan
from migrator.tracking.sources import Sources
from tests.live.moving import Ram, once
from tests.live.qemus import Qemu, each_qemu
from tests.live.sending import MIGRATOR, SMALL, Road, eventually, on_a_road, state
from tests.live.vms import MIB, Pair
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet

pytestmark = pytest.mark.live

Settings = Mapping[str, Mapping[str, Any]]


async def settings(vm_qmp: str) -> Settings:
    """What a migration could leave changed in a QEMU."""
    qmp = await Qmp.connect("source", vm_qmp)
    try:
        parameters = await qmp.execute("query-migrate-parameters")
        return {"capabilities": await qmp.capabilities(), "parameters": parameters}
    finally:
        await qmp.close()


async def moves(road: Road, **link: Any) -> dict[str, Any]:
    """Move the VM; check all that holds for every move.

    :return: the report, and what the receiver printed under ``receiver``
    """
    report = await road.send(**link)
    assert report.status == "completed"
    assert report.mismatched_pages == 0
    assert report.verified_pages == road.machine.memory // 4096
    assert report.downtime_ms is not None
    assert await road.receiver.ended() == 0, road.receiver.said
    result = road.receiver.result()
    assert (result["status"], result["state"]) == ("completed", "running")
    assert result["pid"] == road.destination.pid
    assert await road.states() == ("postmigrate", "running")
    assert Pair.traces(road.vm) == Pair.traces(road.destination) == []
    assert await road.one_runs() == "destination"
    return {**json.loads(report.to_json()), "receiver": result}


@pytest.fixture
def two_keys(tmp_path: Path) -> tuple[Path, Path]:
    """Keys of a host at each of the two addresses."""
    keys.init(tmp_path / "ca", ["192.0.2.1", "192.0.2.2"])
    return tmp_path / "ca" / "192.0.2.1", tmp_path / "ca" / "192.0.2.2"


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.one_in(3)
def test_tls(two_keys: tuple[Path, Path], streams: int, compress: str) -> None:
    async def body(road: Road) -> None:
        ours, theirs = two_keys
        await road.next_receiver("--tls", str(theirs), "--from", "192.0.2.1", insecure=False)
        moved = await moves(road, tls=str(ours), streams=streams, compress=compress)
        assert (moved["wire_bytes"] < moved["bytes_sent"] // 2) == (compress == "zstd")

    on_a_road(body)


@pytest.mark.thorough
def test_the_ways_without_tls() -> None:
    """One after the other: what arrived is sent on."""

    async def body(road: Road) -> None:
        for link in (
            {"streams": 1},
            {"streams": 4},
            {"streams": 4, "compress": "zstd"},
            {"streams": 2, "compress": "auto"},
        ):
            await road.next_receiver()
            moved = await moves(road, **link)
            if link.get("compress") != "auto":  # which measures this machine, busy as it is
                packed = moved["wire_bytes"] < moved["bytes_sent"] // 2
                assert packed == (link.get("compress") == "zstd")
            assert moved["receiver"]["wire_bytes"] == moved["wire_bytes"]

    on_a_road(body)


@pytest.mark.thorough
def test_a_slow_link() -> None:
    """A link that is shaped, and a limit that is lower than what the link takes."""

    async def body(road: Road) -> None:
        for name, bits_per_s, link in (
            ("1 Gbit/s", 10**9, {}),
            ("200 Mbit/s", 2 * 10**8, {}),
            ("limit", 10**9, {"bandwidth_bytes_per_s": 20e6}),
        ):
            road.hosts.shape(bits_per_s)
            await road.next_receiver()
            moved = await moves(road, **link)
            everything = moved["rounds"][0]
            bytes_per_s = 20e6 if name == "limit" else bits_per_s / 8
            assert everything["send_ms"] > everything["wire_bytes"] / bytes_per_s * 1000 / 2

    on_a_road(body)


@pytest.mark.thorough
def test_auto_compresses_where_the_link_is_slow() -> None:
    """It measures over 16 frames of 1 MiB a stream: a guest has to hold more than that."""

    async def body(road: Road) -> None:
        road.hosts.shape(2 * 10**8)
        Ram(road.vm, road.machine).write(64 * MIB, b"compressible" * (48 * MIB // 12))
        await road.next_receiver()
        moved = await moves(road, compress="auto", streams=1)
        assert moved["bytes_sent"] > 48 * MIB
        assert moved["wire_bytes"] < moved["bytes_sent"] * 3 // 4

    on_a_road(body)


@each_qemu
@pytest.mark.one_in(1)
def test_both_qemus(qemu: Qemu) -> None:
    async def body(road: Road) -> None:
        await road.next_receiver()
        await moves(road)

    on_a_road(body, replace(SMALL, qemu=qemu.require()))


@pytest.mark.thorough
def test_hugetlbfs(hugetlbfs: Path) -> None:
    async def body(road: Road) -> None:
        await road.next_receiver()
        report = await road.send()
        assert report.mismatched_pages == 0
        assert report.verified_pages == 128 * MIB // (2 * MIB)
        assert await road.one_runs() == "destination"

    on_a_road(body, replace(SMALL, ram_path=str(hugetlbfs)))


def test_the_command() -> None:
    """Exit codes and JSON of both; a rehearsal first, after which the receiver has ended too."""

    def send(road: Road, *options: str) -> subprocess.Popen[str]:
        return road.hosts.a.run(
            [
                *[MIGRATOR, "send", "--source", road.vm.qmp, "--insecure", "--json", "--verify"],
                *["--to", f"{road.hosts.b.address}:{road.receiver.port}"],
                *["--on-limit", "force", *options],
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    async def body(road: Road) -> None:
        before = await settings(road.vm.qmp)
        await road.next_receiver()
        said, told = await asyncio.to_thread(send(road, "--memory-only").communicate)
        report = json.loads(said.splitlines()[-1])
        assert (report["status"], report["mismatched_pages"]) == ("completed", 0), told
        assert report["memory_only"]
        assert await road.receiver.ended() == 1
        assert road.receiver.result()["state"] == "never"
        assert await road.one_runs() == "source"
        assert await settings(road.vm.qmp) == before

        await road.next_receiver()
        sending = send(road)
        said, told = await asyncio.to_thread(sending.communicate)
        report = json.loads(said.splitlines()[-1])
        assert (sending.returncode, report["status"]) == (0, "completed"), told
        assert report["mismatched_pages"] == 0
        assert await road.receiver.ended() == 0
        assert road.receiver.result()["state"] == "running"
        source = road.vm
        assert await road.states() == ("postmigrate", "running")
        # the receiver has ended, and its QEMU goes on with nobody
        assert await road.one_runs() == "destination"
        assert await state(source) == "gone"

        await road.next_receiver()
        road.receiver.process.terminate()
        assert await road.receiver.ended() == 1
        assert road.receiver.result()["status"] == "aborted"
        await eventually(lambda: not os.path.exists(f"/proc/{road.destination.pid}"), "it ends")
        sending = send(road)
        _, told = await asyncio.to_thread(sending.communicate)
        assert sending.returncode == 1
        assert "refused" in told.lower()
        assert await state(road.vm) == "running"

    on_a_road(body)


def test_a_page_that_is_forgotten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every source forgets one page that was written after it was copied."""
    page = (Workload().start + 80 * MIB) // 4096  # the guest leaves it alone
    collect = Sources.collect

    async def forgetful(
        self: Sources, *, backends_too: bool, scan: Scan | None = None, left: PageSet | None = None
    ) -> Collected:
        collected = await collect(self, backends_too=backends_too, scan=scan, left=left)
        for bitmap in collected.merged.dirty.values():
            forgotten = DirtyBitmap.from_pages(bitmap.npages, [page])
            bitmap.words[:] = (bitmap - forgotten).words
        return collected

    async def body(road: Road) -> None:
        ram = Ram(road.vm, road.machine)
        before = await settings(road.vm.qmp)

        def write() -> None:
            ram.write(page * 4096, b"written after it was sent")

        with monkeypatch.context() as patch:
            patch.setattr(Sources, "collect", forgetful)
            await road.next_receiver()
            with pytest.raises(Failed, match=r"1 of \d+ pages differ") as caught:
                await road.send(once(Phase.ROUNDS, write))
            assert caught.value.phase == "verify"
            assert await road.receiver.ended() == 1
            assert await road.one_runs() == "source"
            assert await settings(road.vm.qmp) == before
        await road.next_receiver()
        await road.send(once(Phase.ROUNDS, write))
        moved = Ram(road.destination, road.machine)
        assert moved.read(page * 4096, 7) == b"written"
        assert await road.one_runs() == "destination"

    on_a_road(body)


def test_a_configuration_that_names_another_host(tmp_path: Path) -> None:
    """The source is one that runs already; ``migrator run`` moves it."""

    async def body(road: Road) -> None:
        receiver = await road.next_receiver()
        config = tmp_path / "away.yaml"
        config.write_text(
            f"source: {{qmp: {road.vm.qmp}}}\n"
            f"link: {{to: '{road.hosts.b.address}:{receiver.port}', insecure: true}}\n"
            "migration: {verify: true, on_limit: force}\n"
        )
        run = road.hosts.a.run(
            [MIGRATOR, "run", "--json", str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        said, words = await asyncio.to_thread(run.communicate)
        assert run.returncode == 0, words
        assert json.loads(said.splitlines()[-1])["mismatched_pages"] == 0
        assert await receiver.ended() == 0
        assert await road.one_runs() == "destination"

    on_a_road(body)
