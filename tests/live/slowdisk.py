"""A disk whose reads stay in flight for as long as a test likes.

A FUSE file system that is one file, the disk. A process of its own serves it, so that a test that
waits for the file never waits for itself; it is mounted in a mount namespace of that process, and
gone with it. The process ends when its standard input does: at the end of the test, however that
ends. What is in flight fails then (``ECONNABORTED``), and nobody hangs.

A read past the page cache (``O_DIRECT``) first pins the memory that it reads into, and then waits
for us (Linux: ``fuse_direct_io`` in fs/fuse/file.c). Every read brings other data, also from the
same place: see :func:`content`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path

from tests.conftest import require
from tracker.abi import fuse

SECTOR = 512
TIMEOUT_S = 60.0

_HELD_S = 2 * TIMEOUT_S  # a test that waits for itself ends all the same
_MOUNT_POINT = "/tmp/slow"  # as the server sees it
_ROOT = 1  # inode number
_MINOR = 31
_MAX_WRITE = 4096
_MODE = 0o100644  # a regular file
# include/uapi/linux/fuse.h: the forgets are not to be answered, and of an interrupt it is the
# request that it names, by its ``unique``, which is
_FORGET, _INTERRUPT, _BATCH_FORGET = 2, 36, 42
_UNIQUE = struct.Struct("=Q")
_RECORD = struct.Struct("<QQ")
_CHECKOUT = Path(__file__).parents[2]


def content(number: int, offset: int, size: int) -> bytes:
    """What a read brings.

    :param number: of the read: the first one is 1
    :param offset: of its first byte on the disk; likewise ``size``
    :return: of sectors that are filled with two little-endian 64-bit words, over and over: the
        read's number, and the sector's offset on the disk in bytes
    """
    each = SECTOR // _RECORD.size
    skipped = offset % SECTOR
    sectors = range(offset - skipped, offset + size, SECTOR)
    data = b"".join(_RECORD.pack(number, sector) * each for sector in sectors)
    return data[skipped : skipped + size]


@dataclass(frozen=True)
class Read:
    """A read in flight.

    :ivar number: which one it is of all reads: the first one is 1
    :ivar offset: of its first byte on the disk; likewise ``size``
    """

    number: int
    offset: int
    size: int

    @property
    def content(self) -> bytes:
        """What it is going to bring."""
        return content(self.number, self.offset, self.size)


@dataclass(frozen=True)
class State:
    """What the disk was asked for.

    :ivar reads: how many reads there were
    :ivar in_flight: those that were not answered yet, in the order in which they came
    """

    reads: int
    in_flight: tuple[Read, ...]


# --- the test's side ------------------------------------------------------------------------------


class SlowDisk:
    """The disk. At first it answers at once.

    :ivar path: of the file, for every process of this user
    :ivar size: bytes
    """

    def __init__(self, server: subprocess.Popen[bytes], size: int) -> None:
        self._server = server
        self.path = f"/proc/{server.pid}/root{_MOUNT_POINT}"
        self.size = size
        self._answer()  # it is mounted

    def hold(self) -> None:
        """From now on, leave every read in flight until it is released, also those that are.

        Two minutes later they are answered all the same. Whoever opens the file without
        ``O_DIRECT`` waits for those that came through the page cache (Linux: ``fuse_open``).
        """
        self._tell("hold")

    def delay(self, each_ms: float) -> None:
        """From now on, leave every read in flight for so long. Those that are held stay held."""
        self._tell("delay", each_ms / 1000)

    def release(self) -> State:
        """Answer everything that is in flight, also what came meanwhile; return what that was."""
        return self._tell("release")

    def fail(self) -> None:
        """Answer all that is in flight, and all reads until :meth:`flow`, with ``EIO``."""
        self._tell("fail")

    def flow(self, each_ms: float = 0.0) -> None:
        """Answer what is in flight; from now on, leave every read in flight for so long only."""
        self.delay(each_ms)
        self.release()

    @property
    def state(self) -> State:
        """What it was asked for until now."""
        return self._tell("look")

    def await_read(self) -> Read:
        """Wait until a read is in flight; return the oldest."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (in_flight := self.state.in_flight):
            assert time.monotonic() < deadline, "nobody reads the disk"
            time.sleep(0.002)
        return in_flight[0]

    def _tell(self, *words: object) -> State:
        assert self._server.stdin is not None
        self._server.stdin.write((json.dumps(words) + "\n").encode())
        self._server.stdin.flush()
        return self._answer()

    def _answer(self) -> State:
        assert self._server.stdout is not None
        # one line for one command: nothing can be left in the buffer
        ready, _, _ = select.select([self._server.stdout], [], [], TIMEOUT_S)
        assert ready, "the disk does not answer"
        line = self._server.stdout.readline()
        assert line, f"the disk ended: {self._server.wait(TIMEOUT_S)}"
        said = json.loads(line)
        require(said.get("missing"))
        return State(said["reads"], tuple(Read(*read) for read in said["in_flight"]))


@contextlib.contextmanager
def slow_disk(size: int = 1 << 20) -> Iterator[SlowDisk]:
    """Serve a disk; skip the test where that is not allowed.

    :param size: bytes, whole sectors
    """
    require(None if os.geteuid() == 0 else "only root can mount")
    require(None if os.path.exists("/dev/fuse") else "no /dev/fuse")
    server = subprocess.Popen(
        ["unshare", "--mount", sys.executable, "-m", __name__, str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=_CHECKOUT,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        yield SlowDisk(server, size)
    finally:
        with contextlib.suppress(BrokenPipeError):
            server.stdin.close()
        try:
            server.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()  # closes the device, which aborts all requests
            server.wait()
        server.stdout.close()


# --- the server's side ----------------------------------------------------------------------------


class _Server:
    def __init__(self, size: int) -> None:
        self._size = size
        self._reads = 0
        self._delay_s = 0.0
        self._fails = False
        self._in_flight: dict[int, tuple[Read, float]] = {}  # by ``unique``; when it is due
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        # On a file system of our own: whoever deletes a mount point takes the mount along.
        _mount("tmpfs", os.path.dirname(_MOUNT_POINT), "")
        Path(_MOUNT_POINT).touch()
        _mount("fuse", _MOUNT_POINT, f"fd={self._device},rootmode={_MODE:o},user_id=0,group_id=0")

    def run(self) -> None:
        """Serve until standard input ends."""
        self._report()
        commands = b""
        while True:
            due = min((due for _, due in self._in_flight.values()), default=inf)
            timeout_s = None if due == inf else max(0.0, due - time.monotonic())
            ready, _, _ = select.select([self._device, 0], [], [], timeout_s)
            if self._device in ready:
                self._serve()
            if 0 in ready:
                got = os.read(0, 1 << 16)
                if not got:
                    return
                *lines, commands = (commands + got).split(b"\n")
                for line in lines:
                    self._obey(*json.loads(line))
            self._answer_what_is_due(time.monotonic())

    def _obey(self, command: str, *arguments: float) -> None:
        if command == "delay":
            (self._delay_s,) = arguments
            self._fails = False
        elif command == "hold":
            self._delay_s = _HELD_S
            due = time.monotonic() + _HELD_S
            self._in_flight = {unique: (read, due) for unique, (read, _) in self._in_flight.items()}
        self._report()
        if command == "fail":
            self._delay_s, self._fails = 0.0, True
        if command in ("release", "fail"):
            self._answer_what_is_due(inf)

    def _report(self) -> None:
        in_flight = [(read.number, read.offset, read.size) for read, _ in self._in_flight.values()]
        print(json.dumps({"reads": self._reads, "in_flight": in_flight}), flush=True)

    def _answer_what_is_due(self, now: float) -> None:
        due = [unique for unique, (_, at) in self._in_flight.items() if at <= now]
        for unique in due:
            read, _ = self._in_flight.pop(unique)
            if self._fails:
                self._answer(unique, error=-errno.EIO)
            else:
                self._answer(unique, read.content)

    def _serve(self) -> None:
        request = os.read(self._device, _MAX_WRITE + fuse.FUSE_MIN_READ_BUFFER)
        header = fuse.fuse_in_header.from_buffer_copy(request)
        body = request[ctypes.sizeof(header) :]
        if header.opcode == fuse.FUSE_INIT:
            init = fuse.fuse_init_out(
                major=fuse.FUSE_KERNEL_VERSION, minor=_MINOR, max_write=_MAX_WRITE
            )
            self._answer(header.unique, bytes(init))
        elif header.opcode == fuse.FUSE_GETATTR:
            attributes = fuse.fuse_attr(
                ino=_ROOT, mode=_MODE, nlink=1, size=self._size, blocks=self._size // SECTOR
            )
            self._answer(header.unique, bytes(fuse.fuse_attr_out(attr_valid=1, attr=attributes)))
        elif header.opcode == fuse.FUSE_OPEN:
            self._answer(header.unique, bytes(fuse.fuse_open_out()))
        elif header.opcode == fuse.FUSE_READ:
            self._take(header.unique, fuse.fuse_read_in.from_buffer_copy(body))
        elif header.opcode == _INTERRUPT:
            # Its caller has been killed, and cannot end before this is answered; or is traced, and
            # then it asks again.
            (unique,) = _UNIQUE.unpack_from(body)
            if self._in_flight.pop(unique, None):
                self._answer(unique, error=-errno.EINTR)
        elif header.opcode not in (_FORGET, _BATCH_FORGET):
            self._answer(header.unique, error=-errno.ENOSYS)

    def _take(self, unique: int, request: fuse.fuse_read_in) -> None:
        size = max(0, min(request.size, self._size - request.offset))
        self._reads += 1
        read = Read(self._reads, request.offset, size)
        self._in_flight[unique] = (read, time.monotonic() + self._delay_s)

    def _answer(self, unique: int, data: bytes = b"", *, error: int = 0) -> None:
        length = ctypes.sizeof(fuse.fuse_out_header) + len(data)
        out = fuse.fuse_out_header(len=length, error=error, unique=unique)
        with contextlib.suppress(FileNotFoundError):  # nobody waits for it any more
            os.write(self._device, bytes(out) + data)


def _mount(kind: str, where: str, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"slowdisk", os.fsencode(where), kind.encode(), 0, options.encode()):
        error = ctypes.get_errno()
        raise OSError(error, f"mounting {kind}: {os.strerror(error)}")


def _main(size: str) -> None:
    try:
        server = _Server(int(size))
    except OSError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    server.run()


if __name__ == "__main__":
    _main(*sys.argv[1:])
