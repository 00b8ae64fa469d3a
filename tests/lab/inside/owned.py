"""A process with a device of type 1 (:mod:`tests.lab.inside.owner`), from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.inside.devices import Device
from tracker.devices.descriptors import Kind, copy_descriptors, vfio_descriptors
from tracker.memory.ram import RamBlock, find_block

PAGE = 4096
NPAGES = 128
SIZE = NPAGES * PAGE
ROOT = Path(__file__).parents[3]


class Owned:
    """The process, and its RAM file of 128 pages, each of them full of its own number.

    :ivar block: the RAM, as a tracker wants it
    """

    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self._process = process
        self._path = path
        self.pid = process.pid
        assert self._answer()[0] == "ready", "the process did not start"
        self.block: RamBlock = find_block(self.pid, "ram", SIZE, str(path))

    def do(self, command: str, *numbers: int) -> None:
        """Let it do something, and wait until it is done."""
        assert self._process.stdin is not None
        print(command, *numbers, file=self._process.stdin, flush=True)
        assert self._answer() == ["done"], command

    def _answer(self) -> list[str]:
        assert self._process.stdout is not None
        return self._process.stdout.readline().split()

    def pages(self) -> list[bytes]:
        """The content of the RAM, page by page."""
        content = self._path.read_bytes()
        return [content[at : at + PAGE] for at in range(0, SIZE, PAGE)]

    def copy_of(self, kind: Kind) -> int:
        """A copy of its first descriptor of that kind, the caller's to close."""
        found = [one for one in vfio_descriptors(self.pid) if one.kind is kind]
        return copy_descriptors(self.pid, found[:1])[0]


@contextmanager
def owned(device: Device) -> Iterator[Owned]:
    """Start the process; it ends with the block."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory, "ram")
        path.write_bytes(b"".join(bytes([page + 1]) * PAGE for page in range(NPAGES)))
        command = [sys.executable, "-m", "tests.lab.inside.owner"]
        arguments = [str(path), str(SIZE), str(device.group), device.name]
        with subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield Owned(process, path)
            finally:
                assert process.stdin is not None
                process.stdin.close()
