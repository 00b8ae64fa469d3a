"""Direct I/O that is held in flight for as long as one likes, its pages pinned.

A FUSE file of our own, on a mount that has no place in the tree. A read or write of it with
O_DIRECT first pins the caller's pages and then waits for us: as long as the request is not read
from ``/dev/fuse``, it is in flight, and the kernel has copied nothing (Linux: ``fuse_direct_io`` in
fs/fuse/file.c). A read in flight pins its pages for writing; a write in flight pins them for
reading, and what it writes is what they hold when we take the request.

A request that was not taken ends when its process is killed: nothing here can get stuck.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

from tracker.abi import fuse
from tracker.syscalls import mount_detached

ANSWER_S = 10.0
"""How long the kernel may take to send a request, or to end what was answered."""

_MAX_WRITE = 1 << 16
_MINOR = 31
_ROOT = 1
_HEADER = ctypes.sizeof(fuse.fuse_in_header)
_S_IFREG = 0o100000
_Answer = TypeVar("_Answer", bound=ctypes.Structure)


class HeldFile:
    """A file that answers a read, or takes a write, when it is told to."""

    def __init__(self) -> None:
        """Make and open the file.

        :raise OSError: /dev/fuse cannot be opened, or we may not mount
        """
        self._mount = self._file = -1
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._done = 0
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        try:
            # The root of the file system is the file.
            options = {"fd": str(self._device), "rootmode": f"{_S_IFREG:o}"}
            options |= {"user_id": str(os.getuid()), "group_id": str(os.getgid())}
            self._mount = mount_detached("fuse", options)
            self._begin(self._open)
            while not self._ended():
                if self._requested(0.1):
                    self._serve()
            self._finish()
        except BaseException:
            self.close()
            raise

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC
        # Once FUSE_FLUSH has been answered with ENOSYS the kernel never asks again. It would for
        # each descriptor that is closed, also by a child between vfork and exec, which we wait for.
        os.close(os.open(f"/proc/self/fd/{self._mount}", flags))
        self._file = os.open(f"/proc/self/fd/{self._mount}", flags)
        return 0

    def begin_read(self, buffers: Sequence[memoryview]) -> None:
        """Begin to read into memory, and return once its pages are pinned for writing.

        :raise OSError: the read is over already, or does not reach us
        """
        self._begin(lambda: os.preadv(self._file, list(buffers), 0))
        self._await_request()

    def begin_write(self, buffers: Sequence[memoryview]) -> None:
        """Begin to write from memory, and return once its pages are pinned for reading.

        :raise OSError: the write is over already, or does not reach us
        """
        self._begin(lambda: os.pwritev(self._file, list(buffers), 0))
        self._await_request()

    def finish_read(self, data: bytes) -> None:
        """Answer the read that was begun: the data are written through the pin.

        :raise OSError: what waited was no read, or it did not take all of the data
        """
        header, _ = self._take(fuse.FUSE_READ)
        self._answer(header, data)
        if self._finish() != len(data):
            raise OSError(f"a read of {len(data)} bytes was cut to {self._done}")

    def finish_write(self) -> bytes:
        """Take what was written by the write that was begun: it is read through the pin now.

        :raise OSError: what waited was no write, or it was cut
        """
        header, request = self._take(fuse.FUSE_WRITE)
        size = fuse.fuse_write_in.from_buffer_copy(request).size
        data = request[ctypes.sizeof(fuse.fuse_write_in) :]
        self._answer(header, bytes(fuse.fuse_write_out(size=size)))
        if self._finish() != len(data) or size != len(data):
            raise OSError(f"a write of {len(data)} bytes was cut to {self._done}")
        return data

    # -- the thread that waits in the kernel --------------------------------------------------

    def _begin(self, call: Callable[[], int]) -> None:
        def run() -> None:
            try:
                self._done = call()
            except OSError as error:
                self._error = error

        self._error = None
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def _ended(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def _finish(self) -> int:
        assert self._thread is not None
        self._thread.join(ANSWER_S)
        if self._thread.is_alive():
            raise OSError("a FUSE request was answered and does not end")
        self._thread = None
        if self._error:
            raise self._error
        return self._done

    # -- the protocol -------------------------------------------------------------------------

    def _requested(self, timeout_s: float) -> bool:
        return bool(select.select([self._device], [], [], timeout_s)[0])

    def _await_request(self) -> None:
        deadline = time.monotonic() + ANSWER_S
        while not self._requested(0.1):
            if self._ended():
                self._finish()
                raise OSError("direct I/O that was to be held is over")
            if time.monotonic() > deadline:
                raise OSError("direct I/O that was to be held does not begin")

    def _take(self, opcode: int) -> tuple[fuse.fuse_in_header, bytes]:
        request = os.read(self._device, _MAX_WRITE + fuse.FUSE_MIN_READ_BUFFER)
        header = fuse.fuse_in_header.from_buffer_copy(request)
        if header.opcode != opcode:
            self._answer(header, b"")
            raise OSError(f"FUSE request {header.opcode} where {opcode} was to be held")
        return header, request[_HEADER:]

    def _serve(self) -> None:
        """Answer whatever opening the file asks."""
        request = os.read(self._device, _MAX_WRITE + fuse.FUSE_MIN_READ_BUFFER)
        header = fuse.fuse_in_header.from_buffer_copy(request)
        answer: ctypes.Structure
        if header.opcode == fuse.FUSE_INIT:
            answer = fuse.fuse_init_out(
                major=fuse.FUSE_KERNEL_VERSION, minor=_MINOR, max_write=_MAX_WRITE
            )
        elif header.opcode == fuse.FUSE_OPEN:
            answer = fuse.fuse_open_out(open_flags=fuse.FOPEN_DIRECT_IO)
        elif header.opcode == fuse.FUSE_GETATTR:
            attributes = fuse.fuse_attr(ino=_ROOT, mode=_S_IFREG | 0o600, nlink=1, size=_MAX_WRITE)
            answer = fuse.fuse_attr_out(attr_valid=1 << 32, attr=attributes)
        else:
            return self._answer(header, b"", error=-errno.ENOSYS)
        return self._answer(header, bytes(answer))

    def _answer(self, header: fuse.fuse_in_header, data: bytes, error: int = 0) -> None:
        length = ctypes.sizeof(fuse.fuse_out_header) + len(data)
        out = fuse.fuse_out_header(len=length, error=error, unique=header.unique)
        os.write(self._device, bytes(out) + data)

    def close(self) -> None:
        """Abort what is in flight, and end the mount. May be called again."""
        # Closing the device ends the connection, and with it every request.
        for name in ("_device", "_file", "_mount"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        if self._thread is not None:
            self._thread.join(ANSWER_S)

    def __enter__(self) -> HeldFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
