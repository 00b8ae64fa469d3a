"""What cannot be migrated is refused, before anything is done to either VM, and with a mend."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from migrator import Refused, migrate
from migrator.errors import Finding
from migrator.qemu.process import Vm
from migrator.qemu.qmp import Qmp
from tests.conftest import require
from tests.live.conftest import mounted
from tests.live.moving import VERIFIED, TwoKinds, move
from tests.live.qemus import BACKPORTS, QEMUS, SYSTEM, Qemu, each_qemu
from tests.live.vms import MIB, Machine, Pair, pair

pytestmark = pytest.mark.live

SMALL = Machine(memory=128 * MIB)
BACKEND = "memory-backend-file,id=ram0"


@dataclass(frozen=True)
class Rewritten(Machine):
    """A machine whose command line is not quite the usual one.

    :ivar at_both: texts in arguments, and what stands there instead; likewise ``at_destination``
    """

    memory: int = 128 * MIB
    at_both: dict[str, str] = field(default_factory=dict)
    at_destination: dict[str, str] = field(default_factory=dict)

    def arguments(self, image: Path, console: Path, *, destination: bool = False) -> list[str]:
        arguments = super().arguments(image, console, destination=destination)
        for old, new in {**self.at_both, **(self.at_destination if destination else {})}.items():
            assert any(old in argument for argument in arguments)
            arguments = [argument.replace(old, new) for argument in arguments]
        return [argument for argument in arguments if argument]


async def seen(vm: Vm) -> dict[str, Any]:
    """Everything about a VM that a refused migration could have changed."""
    qmp = await Qmp.connect(vm.name, vm.qmp)
    try:
        return {
            "state": await qmp.run_state(),
            "migration": await qmp.migration(),
            "capabilities": await qmp.capabilities(),
            "parameters": await qmp.execute("query-migrate-parameters"),
            "traces": Pair.traces(vm),
        }
    finally:
        await qmp.close()


async def refused(vms: Pair, check: str, *words: str) -> None:
    """Check that migrating is refused for one reason only, and that nothing has changed.

    :param check: what ``Finding.check`` says
    :param words: what problem and mend together contain
    """
    before = await seen(vms.source), await seen(vms.destination)
    with pytest.raises(Refused) as caught:
        await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED)
    findings: Sequence[Finding] = caught.value.findings
    assert {finding.check for finding in findings} == {check}, findings
    assert caught.value.exit_code == 3
    for finding in findings:
        assert finding.problem
        assert finding.mend
        assert finding.problem in str(caught.value)
        assert finding.mend in str(caught.value)
    for word in words:
        assert any(word in f"{f.problem}: {f.mend}" for f in findings), (word, findings)
    assert (await seen(vms.source), await seen(vms.destination)) == before
    assert before[0]["traces"] == before[1]["traces"] == []
    if before[0]["state"] == "running":
        await vms.beats(vms.source, 3)


def is_refused(machine: Machine, check: str, *words: str) -> None:
    async def body() -> None:
        async with pair(machine) as vms:
            await refused(vms, check, *words)

    asyncio.run(body())


# -- RAM ----------------------------------------------------------------------------------------

SHARED_FILE = ("-object memory-backend-file", "share=on", "mem-path=", "memory-backend=")


@pytest.mark.parametrize(
    "backend",
    [
        {BACKEND: "memory-backend-ram,id=ram0", ",mem-path=/dev/shm": ""},
        {BACKEND: "memory-backend-ram,id=ram0", "share=on,mem-path=/dev/shm": "share=off"},
        {"share=on": "share=off"},
        {BACKEND: "memory-backend-memfd,id=ram0", ",mem-path=/dev/shm": ""},
    ],
    ids=["ram", "private-ram", "private-file", "memfd"],
)
def test_ram_that_is_not_a_shared_file(backend: dict[str, str]) -> None:
    is_refused(Rewritten(at_both=backend), "RAM", *SHARED_FILE)


class Plain(Machine):
    """RAM is what ``-m`` alone makes."""

    def arguments(self, image: Path, console: Path, *, destination: bool = False) -> list[str]:
        arguments = super().arguments(image, console, destination=destination)
        at = arguments.index("-object")
        return [
            a.removesuffix(",memory-backend=ram0") for a in arguments[:at] + arguments[at + 2 :]
        ]


def test_ram_without_a_backend() -> None:
    is_refused(Plain(memory=128 * MIB), "RAM", *SHARED_FILE)


def test_a_shared_file_that_is_not_the_guests_ram() -> None:
    """Here the machine has RAM of its own, and the backend is used by nobody."""
    is_refused(Rewritten(at_both={",memory-backend=ram0": ""}), "RAM", *SHARED_FILE)


def test_one_node_of_two_is_private() -> None:
    nodes = f"id=ram1,size={64 * MIB},share=on"
    private = {nodes: nodes.replace("on", "off")}
    is_refused(Rewritten(nodes=2, at_both=private), "RAM", "'ram1'", *SHARED_FILE)


def test_ram_of_another_size() -> None:
    is_refused(
        Rewritten(at_destination={"128M": "192M", str(128 * MIB): str(192 * MIB)}),
        "RAM geometry",
        str(128 * MIB),
        str(192 * MIB),
    )


def test_ram_of_another_name() -> None:
    is_refused(
        Rewritten(at_destination={"id=ram0": "id=dram", "backend=ram0": "backend=dram"}),
        "RAM geometry",
        "the destination has no RAM 'ram0'",
        "the source has no RAM 'dram'",
    )


def test_ram_in_other_pages(hugetlbfs: Path) -> None:
    is_refused(
        TwoKinds(memory=128 * MIB, destination_ram_path=str(hugetlbfs)), "RAM geometry", "4096"
    )


def test_both_sides_have_the_same_file(tmpfs: Path) -> None:
    is_refused(replace(SMALL, ram_path=f"{tmpfs}/ram"), "RAM geometry", "same file")


def test_too_little_space_for_the_destination() -> None:
    async def body() -> None:
        with mounted("tmpfs", "size=16M") as directory:
            async with pair(TwoKinds(memory=128 * MIB, destination_ram_path=str(directory))) as vms:
                await vms.beats(vms.source, 20)  # it has written all of its working set
                await refused(vms, "space", "MiB more", "16 MiB left")

    asyncio.run(body())


_MAPPER = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True)
sys.stdin.read()
"""


def test_somebody_else_maps_the_ram(tmpfs: Path) -> None:
    machine = TwoKinds(
        memory=128 * MIB, ram_path=f"{tmpfs}/source", destination_ram_path=f"{tmpfs}/destination"
    )

    async def body() -> None:
        async with pair(machine) as vms:
            for side in ("source", "destination"):
                mapper = await asyncio.create_subprocess_exec(
                    *[sys.executable, "-c", _MAPPER, f"{tmpfs}/{side}"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
                assert mapper.stdout is not None
                assert await mapper.stdout.readline() == b"mapped\n"
                await refused(vms, "second mapper", f"process {mapper.pid} ", f"of the {side}")
                mapper.kill()
                await mapper.wait()
            await move(vms)
            await vms.check_heartbeat_unbroken()

    asyncio.run(body())


# -- devices ------------------------------------------------------------------------------------


def test_a_viommu() -> None:
    is_refused(replace(SMALL, extra=["-device", "intel-iommu"]), "vIOMMU", "intel-iommu")


@each_qemu
def test_a_device_that_blocks_migration(qemu: Qemu) -> None:
    """A peer of a shared memory device: QEMU cannot migrate it."""
    extra = [
        *["-object", "memory-backend-file,id=shared,size=1M,share=on,mem-path=/dev/shm"],
        *["-device", "ivshmem-plain,memdev=shared,master=off"],
    ]
    is_refused(replace(SMALL, qemu=qemu.require(), extra=extra), "blocker", "ivshmem")


def test_a_disk_served_by_another_process(tmp_path: Path) -> None:
    daemon = shutil.which("qemu-storage-daemon")
    require(None if daemon else "qemu-storage-daemon is not installed")
    (tmp_path / "image").write_bytes(bytes(MIB))
    path = os.path.relpath(tmp_path / "socket")  # short enough for a socket

    async def body() -> None:
        server = await asyncio.create_subprocess_exec(
            *[daemon or "", "--blockdev", f"file,node-name=disk,filename={tmp_path}/image"],
            "--export",
            f"vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={path}",
        )
        try:
            while not os.path.exists(path):
                assert server.returncode is None
                await asyncio.sleep(0.01)
            extra = [
                *["-chardev", f"socket,id=server,path={path}"],
                *["-device", "vhost-user-blk-pci,chardev=server"],
            ]
            async with pair(replace(SMALL, source_extra=extra)) as vms:
                await refused(vms, "vhost-user", "vhost-user-blk", "another process")
        finally:
            server.kill()
            await server.wait()

    asyncio.run(body())


def test_a_network_served_by_another_process(tmp_path: Path) -> None:
    """The device is an ordinary virtio-net, and this server has not mapped RAM yet."""
    path = os.path.relpath(tmp_path / "socket")
    extra = [
        *["-chardev", f"socket,id=server,path={path}", "-netdev", "vhost-user,id=n,chardev=server"],
        *["-device", "virtio-net-pci,netdev=n"],
    ]
    with vhost_user_server(path):
        is_refused(replace(SMALL, source_extra=extra), "vhost-user", "another process")


@contextmanager
def vhost_user_server(path: str) -> Iterator[None]:
    """As much of a vhost-user server as lets QEMU start (QEMU: ``docs/interop/vhost-user.rst``)."""
    header = struct.Struct("<III")  # request, flags, size
    features = 1 << 32 | 1 << 30 | 1 << 26  # VERSION_1, PROTOCOL_FEATURES, LOG_ALL
    protocol_features = 1 << 1  # LOG_SHMFD: without it, QEMU would block migration by itself
    answers = {1: features, 11: 0, 15: protocol_features}

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                while message := connection.recv(header.size, socket.MSG_WAITALL):
                    request, flags, size = header.unpack(message)
                    if size:
                        connection.recv(size, socket.MSG_WAITALL)
                    if request in answers or flags & 8:
                        answer = struct.pack("<Q", answers.get(request, 0))
                        connection.sendall(header.pack(request, 5, len(answer)) + answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


# -- the machine --------------------------------------------------------------------------------


def test_another_machine_type() -> None:
    is_refused(
        TwoKinds(memory=128 * MIB, machine="pc", destination_machine="q35"),
        "machine type",
        "pc-i440fx-",
        "pc-q35-",
    )


def test_another_number_of_cpus() -> None:
    is_refused(
        replace(SMALL, source_extra=["-smp", "2"], destination_extra=["-smp", "1"]),
        "vCPUs",
        "the source has 2, the destination 1",
    )


def test_another_version_of_the_newest_machine_type() -> None:
    require(None if BACKPORTS in QEMUS else "there is one version only")
    is_refused(
        TwoKinds(
            memory=128 * MIB,
            qemu=SYSTEM.require(),
            destination_qemu=BACKPORTS.require(),
        ),
        "machine type",
        "versioned -machine",
    )


# -- states -------------------------------------------------------------------------------------


def test_a_source_that_was_migrated_before() -> None:
    async def body() -> None:
        async with pair(SMALL) as vms:
            await move(vms)
            moved = vms.destination
            vms.destination = Vm("another", vms.directory)
            try:
                await vms.start_destination()
                await refused(vms, "source state", "'postmigrate'")
                assert await vms.state(moved) == "running"
            finally:
                await moved.stop()

    asyncio.run(body())


def test_a_source_that_never_ran() -> None:
    async def body() -> None:
        async with pair(replace(SMALL, source_extra=["-S"]), start=False) as vms:
            await vms.start_destination()
            await vms.source.start(
                vms.machine.arguments(vms.image, vms.source.console), incoming=False
            )
            await refused(vms, "source state", "'prelaunch'")

    asyncio.run(body())


def test_a_source_that_is_being_migrated() -> None:
    async def body() -> None:
        async with pair(SMALL) as vms:
            async with told(vms.source) as source:
                await source.set_capabilities({"events": True})
                await source.execute("migrate-set-parameters", max_bandwidth=4096)
                await source.execute("migrate", uri="exec:cat >/dev/null")
            await asyncio.sleep(0.2)
            with pytest.raises(Refused) as caught:
                await migrate(vms.source.qmp, vms.destination.qmp)
            assert [f.check for f in caught.value.findings] == ["source state"]
            async with told(vms.source) as source:
                assert (await source.migration())["status"] == "active"
                await source.execute("migrate_cancel")
                await source.migration_status("cancelled", since=0, timeout_s=10)
            await move(vms)

    asyncio.run(body())


@asynccontextmanager
async def told(vm: Vm) -> AsyncIterator[Qmp]:
    qmp = await Qmp.connect(vm.name, vm.qmp)
    try:
        yield qmp
    finally:
        await qmp.close()


def test_a_destination_that_does_not_wait() -> None:
    async def body() -> None:
        async with pair(SMALL, start=False) as vms:
            await vms.start_source()
            arguments = vms.machine.arguments(vms.image, vms.destination.console)
            await vms.destination.start(arguments, incoming=False)
            await refused(vms, "destination state", "'running'", "-incoming defer")

    asyncio.run(body())


@each_qemu
def test_a_destination_that_listens_to_somebody_else(qemu: Qemu) -> None:
    """As it does with ``-incoming unix:...`` in place of ``-incoming defer``."""

    async def body() -> None:
        async with pair(replace(SMALL, qemu=qemu.require())) as vms:
            async with told(vms.destination) as destination:
                await destination.execute("migrate-incoming", uri=f"unix:{vms.directory}/elsewhere")
            await refused(vms, "destination state", "-incoming defer")

    asyncio.run(body())


def test_one_vm_is_not_two() -> None:
    async def body() -> None:
        async with pair(SMALL, start=False) as vms:
            vms.machine = replace(
                SMALL, source_extra=["-qmp", f"unix:{vms.directory}/second,server=on,wait=off"]
            )
            await vms.start_source()
            with pytest.raises(Refused, match="the same QEMU") as caught:
                await migrate(vms.source.qmp, f"{vms.directory}/second")
            assert [finding.check for finding in caught.value.findings] == ["two VMs"]
            assert vms.traces(vms.source) == []

    asyncio.run(body())
