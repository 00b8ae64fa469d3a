"""A process that maps files as QEMU does, and is told what to do with its mappings."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import require
from tracker.memory.ram import RamBlock, find_block

PAGE = 4096

_PROGRAM = """
import ctypes, json, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
word = ctypes.c_ulong

def check(result, call):
    if ctypes.c_long(result or 0).value == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result or 0

def reserve(size):
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return check(libc.mmap(None, word(size), 0, flags, -1, word(0)), "mmap")

def open_(path):
    return os.open(path.encode("utf-8", "surrogateescape"), os.O_RDWR)

def map_(fd, size, offset=0, shared=True, at=None, align=4096):
    # in the middle of a reservation, so that no mapping ever touches another by chance
    if at is None:
        at = (reserve(size + 2 * align) + align) // align * align
    flags = (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) | 0x10  # MAP_FIXED
    return check(libc.mmap(word(at), word(size), 3, flags, fd, word(offset)), "mmap")

def unmap(at, size):
    return check(libc.munmap(word(at), word(size)), "munmap")

def protect(at, size, protection):
    return check(libc.mprotect(word(at), word(size), protection), "mprotect")

def advise(at, size, advice):
    return check(libc.madvise(word(at), word(size), advice), "madvise")

def bind(at, size):
    node0 = word(1)
    return check(libc.syscall(237, word(at), word(size), 1, ctypes.byref(node0), word(64), 0),
                 "mbind")

def move(at, size):
    return check(libc.mremap(word(at), word(size), word(size), 3, word(reserve(size))), "mremap")

def write(at, byte, size=1):
    ctypes.memset(at, byte, size)

def read(at):
    return ctypes.c_ubyte.from_address(at).value

print("ready", flush=True)
for line in sys.stdin:
    try:
        said = eval(line)
    except OSError as error:
        said = {"error": str(error)}
    print(json.dumps(said), flush=True)
"""


class Mapper:
    """The process. Calling it evaluates an expression there; see the functions in its program."""

    def __init__(self, cwd: str | Path | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=cwd,
            text=True,
        )
        self.pid = self.process.pid
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self) -> Mapper:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def __call__(self, expression: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(expression, file=self.process.stdin, flush=True)
        said = json.loads(self.process.stdout.readline())
        if isinstance(said, dict):
            raise OSError(said["error"])
        return said

    def open(self, path: str | Path) -> int:
        return int(self(f"open_({str(path)!a})"))

    def map(self, path: str | Path, size: int, **options: object) -> int:
        """Open and map a file; return the address."""
        fd = self.open(path)
        return int(self(f"map_({fd}, {size}, **{options!r})"))


class Ram:
    """A file that a process, its own unless it is given one, has mapped whole, as one RAM block."""

    def __init__(
        self, path: Path, npages: int, name: str = "ram", mapper: Mapper | None = None
    ) -> None:
        self.path, self.npages, self.size = path, npages, npages * PAGE
        if not path.exists():
            path.touch()
        os.truncate(path, self.size)
        self.mapper = mapper or Mapper()
        self.hva = self.mapper.map(path, self.size, align=os.statvfs(path).f_bsize)
        self.pid = self.mapper.pid
        self.block: RamBlock = find_block(self.pid, name, self.size, str(path))

    def end(self) -> None:
        self.mapper.end()

    def write(self, page: int, data: bytes, offset: int = 0) -> None:
        """Write to a page through the file."""
        assert offset + len(data) <= PAGE
        with self.path.open("r+b", buffering=0) as file:
            file.seek(page * PAGE + offset)
            assert file.write(data) == len(data)

    def fill(self, page: int, value: int) -> None:
        """Make a page this value's byte throughout, through the file."""
        self.write(page, bytes([value]) * PAGE)

    def punch(self, page: int, npages: int = 1) -> None:
        """Discard pages, as a balloon does."""
        subprocess.run(
            ["fallocate", "-p", "-o", str(page * PAGE), "-l", str(npages * PAGE), self.path],
            check=True,
        )

    def content(self) -> bytes:
        """All of it, by read(2), which fills no holes."""
        return self.path.read_bytes()

    def allocated(self) -> int:
        """Pages' worth of blocks that the file holds."""
        return self.path.stat().st_blocks * 512 // PAGE


@contextlib.contextmanager
def shm_directory() -> Iterator[Path]:
    """A directory on tmpfs."""
    require(None if os.access("/dev/shm", os.W_OK) else "no /dev/shm")
    with tempfile.TemporaryDirectory(prefix="test-tracker-", dir="/dev/shm") as directory:
        yield Path(directory)


def file_system(path: Path) -> str:
    """Its type, as stat(1) names it."""
    return subprocess.check_output(["stat", "-f", "-c", "%T", path], text=True).strip()


@contextlib.contextmanager
def disk_directory(base: Path) -> Iterator[Path]:
    """A directory on a file system that is on a disk."""
    kind = file_system(base)
    require(None if kind in ("ext2/ext3", "xfs") else f"{base} is {kind}, not a disk")
    yield base


@contextlib.contextmanager
def small_tmpfs(directory: Path, size: str) -> Iterator[Path]:
    """A tmpfs of its own, mounted on a directory."""
    require(None if os.geteuid() == 0 else "only root may mount")
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    require(done.stderr.strip() if done.returncode else None)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)
