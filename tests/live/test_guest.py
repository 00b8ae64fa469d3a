"""The workload guest in a real QEMU, under TCG."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from migrator.guest.workload import (
    FIRMWARE_BYTES,
    MIB,
    PAGE_SIZE,
    WalkCheck,
    Workload,
    boot_image,
    check_walk,
    guest_args,
    heartbeats,
)
from tests.conftest import require

pytestmark = pytest.mark.live

RAM_BYTES = 128 * MIB
TIMEOUT_S = 60.0

STACK_PAGE = 6
"""The only page outside the working set that the guest writes once it walks."""


class Vm:
    """One QEMU with RAM and serial port in files, driven over a QMP socket."""

    def __init__(self, directory: Path, workload: Workload, machine: str, *extra: str) -> None:
        directory.mkdir()
        image = directory.parent / "image"  # source and destination share it
        if not image.exists():
            image.write_bytes(boot_image(workload))
        workload.check_fits(RAM_BYTES, machine)
        self.workload = workload
        self.serial_file = directory / "serial"
        self.ram_file = directory / "ram"
        backend = f"memory-backend-file,id=ram,size={RAM_BYTES},share=on,mem-path={self.ram_file}"
        self.process = subprocess.Popen(
            [
                *["qemu-system-x86_64", "-accel", "tcg", "-m", f"{RAM_BYTES // MIB}M"],
                *["-machine", f"{machine},memory-backend=ram", "-object", backend],
                *["-serial", f"file:{self.serial_file}"],
                *["-qmp", f"unix:{directory / 'qmp'},server=on,wait=off"],
                *guest_args(image),
                *extra,
            ]
        )
        try:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(TIMEOUT_S)
            wait_until(lambda: self._socket.connect_ex(str(directory / "qmp")) == 0)
            self._replies = self._socket.makefile("r")
            assert "QMP" in json.loads(self._replies.readline())
            self.qmp("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def qmp(self, command: str, **arguments: Any) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments})
        self._socket.sendall(request.encode())
        while True:
            reply = json.loads(self._replies.readline())
            assert "error" not in reply, reply
            if "return" in reply:
                return reply["return"]

    @property
    def serial(self) -> bytes:
        return self.serial_file.read_bytes() if self.serial_file.exists() else b""

    @property
    def ram(self) -> NDArray[np.uint8]:
        return np.memmap(self.ram_file, dtype=np.uint8, mode="r")

    def wait_for_beats(self, count: int) -> None:
        """Wait until so many more heartbeats have come."""
        wanted = len(self.serial) + 9 * count
        wait_until(lambda: len(self.serial) >= wanted)

    def pages_walked(self) -> int:
        """Count all pages written since the start, if no page was written 256 times yet."""
        check = check_walk(self.ram, self.workload)
        assert check.ok, check.problem
        passes = check.value - 1 if check.edges else check.value
        return passes * self.workload.npages + check.position

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._socket.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


Start = Callable[..., Vm]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start VMs; all are gone afterwards, and so are their files."""
    require(None if shutil.which("qemu-system-x86_64") else "no qemu-system-x86_64")
    vms: list[Vm] = []
    directory = Path(tempfile.mkdtemp(prefix="test-guest-", dir="/dev/shm"))

    def start(workload: Workload, *extra: str, machine: str = "q35") -> Vm:
        vms.append(Vm(directory / str(len(vms)), workload, machine, *extra))
        return vms[-1]

    try:
        yield start
    finally:
        for vm in vms:
            vm.close()
        shutil.rmtree(directory)


@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_boots_beats_and_walks(start: Start, machine: str) -> None:
    vm = start(Workload(working_set_bytes=8 * MIB), machine=machine)
    for _ in range(3):
        vm.wait_for_beats(20)
        vm.qmp("stop")
        numbers = heartbeats(vm.serial)
        assert numbers == list(range(len(numbers)))
        check = check_walk(vm.ram, vm.workload)
        assert check.ok, check.problem
        assert check.edges == 1
        vm.qmp("cont")


def test_lost_pages_are_seen(start: Start) -> None:
    vm = start(Workload(working_set_bytes=8 * MIB, pages_per_s=20_000))
    vm.wait_for_beats(50)
    vm.qmp("stop")
    check = check_walk(vm.ram, vm.workload)
    assert check.ok, check.problem
    assert check.position > 2

    def after(page: int, change: int) -> WalkCheck:
        ram = np.array(vm.ram)
        at = vm.workload.start + page * PAGE_SIZE
        ram[at] = (int(ram[at]) + change) % 256
        return check_walk(ram, vm.workload)

    assert after(0, 0) == check
    for change in (-2, -1, 1, 2):
        for page in (1, check.position - 2, check.position + 1, vm.workload.npages - 2):
            assert not after(page, change).ok, (page, change)


@pytest.mark.parametrize("heartbeat_ms", [10, 70])
def test_rate_is_obeyed_in_guest_time(start: Start, heartbeat_ms: int) -> None:
    vm = start(Workload(pages_per_s=20_050, heartbeat_ms=heartbeat_ms))
    vm.wait_for_beats(10)
    vm.qmp("stop")
    pages, count = vm.pages_walked(), len(heartbeats(vm.serial))
    vm.qmp("cont")
    vm.wait_for_beats(1000 // heartbeat_ms)
    vm.qmp("stop")
    pages, count = vm.pages_walked() - pages, len(heartbeats(vm.serial)) - count
    # One heartbeat more or less at either end; and fewer pages if the guest got too little CPU.
    a_beat = 20_050 * heartbeat_ms / 1000
    assert a_beat * (count - 2) / 2 <= pages <= a_beat * (count + 2)


def test_full_speed_up_to_the_firmware(start: Start) -> None:
    start_at = 16 * MIB
    vm = start(Workload(RAM_BYTES - FIRMWARE_BYTES - start_at, start_at, pages_per_s=0))
    wait_until(lambda: vm.ram[vm.workload.end - PAGE_SIZE] >= 2)
    vm.qmp("stop")
    check = check_walk(vm.ram, vm.workload)
    assert check.ok, check.problem
    beyond = vm.ram[vm.workload.end : RAM_BYTES - 17 * MIB]
    assert len(beyond) >= MIB
    assert not beyond.any()  # a margin that SeaBIOS left alone


def test_writes_nothing_but_the_working_set_and_its_stack(start: Start) -> None:
    vm = start(Workload(working_set_bytes=4 * MIB))
    vm.wait_for_beats(10)
    vm.qmp("stop")
    before = np.array(vm.ram).reshape(-1, PAGE_SIZE)
    vm.qmp("cont")
    vm.wait_for_beats(100)
    vm.qmp("stop")
    after = np.array(vm.ram).reshape(-1, PAGE_SIZE)
    rows, bytes_in_page = np.nonzero(before != after)
    changed = set(rows.tolist())
    working_set = range(vm.workload.start // PAGE_SIZE, vm.workload.end // PAGE_SIZE)
    assert changed & set(working_set)
    assert changed - set(working_set) <= {STACK_PAGE}
    assert set(bytes_in_page[rows != STACK_PAGE].tolist()) == {0}


def test_goes_on_where_it_was_after_a_migration(start: Start, tmp_path: Path) -> None:
    workload = Workload(working_set_bytes=8 * MIB, pages_per_s=20_000)
    uri = f"unix:{tmp_path / 'migrate'}"
    source = start(workload)
    destination = start(workload, "-incoming", uri)
    source.wait_for_beats(20)
    source.qmp("migrate", uri=uri)
    wait_until(lambda: source.qmp("query-migrate")["status"] == "completed")
    destination.wait_for_beats(200)
    destination.qmp("stop")
    numbers = heartbeats(source.serial + destination.serial)
    assert len(numbers) >= 220
    assert numbers == list(range(len(numbers)))
    assert destination.pages_walked() > source.pages_walked()
