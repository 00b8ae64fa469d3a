"""The process whose memory is probed: started by :mod:`tracker.probe.trial`, does what it is told.

It maps a file shared, as QEMU maps guest RAM, makes a userfaultfd of its own, and gives it away
together with its only descriptor. Its imports are few, as all of them are on the way of every
probe: that is why it uses ``_socket``, where ``socket`` would double the time it takes to start.

It is given its memory's descriptor, size in pages, page size in bytes and the number of
userfaultfd(2), and a SOCK_SEQPACKET socket as standard input. It first sends the memory's address
and the errno of userfaultfd(2), with the descriptor attached if that is 0. Then it answers each
message ``COMMAND VALUE PAGE PAGE …`` with ``done`` when it has done so with every page, in order,
or with ``failed`` and the reason. It ends when the socket does.
"""

from __future__ import annotations

import _socket
import ctypes
import mmap
import os

_USER_MODE_ONLY = 1  # UFFD_USER_MODE_ONLY
_PUNCH_HOLE = 2 | 1  # FALLOC_FL_PUNCH_HOLE, which demands FALLOC_FL_KEEP_SIZE
_WORD = 8


class Memory:
    """Shared memory, and what a guest, a device model and a balloon do to it."""

    def __init__(self, fd: int, npages: int, page_size: int) -> None:
        self._fd = fd
        self._page_size = page_size
        self._map = mmap.mmap(fd, npages * page_size)
        try:  # noqa: SIM105 (contextlib takes long to import)
            # where the kernel gives such files huge pages, a write dirties far more than its page
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        except OSError:
            pass
        self._view = memoryview(self._map)
        self._pipe = os.pipe()

    @property
    def address(self) -> int:
        """Of the first byte."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def write(self, value: bytes, page: int) -> None:
        """As a vCPU does."""
        start = page * self._page_size
        self._map[start : start + _WORD] = value

    def read(self, value: bytes, page: int) -> None:
        """Which fills a hole with a page of zeros."""
        self._map[page * self._page_size]

    def receive(self, value: bytes, page: int) -> None:
        """Let the kernel write: read(2) into the page."""
        start = page * self._page_size
        os.write(self._pipe[1], value)
        os.readv(self._pipe[0], [self._view[start : start + _WORD]])

    def discard(self, value: bytes, page: int) -> None:
        """As QEMU gives a page back (``ram_block_discard_range``)."""
        start = page * self._page_size
        if _libc.fallocate(
            self._fd, _PUNCH_HOLE, ctypes.c_long(start), ctypes.c_long(self._page_size)
        ):
            errno = ctypes.get_errno()
            raise OSError(errno, f"fallocate(PUNCH_HOLE): {os.strerror(errno)}")
        if self._page_size == mmap.PAGESIZE:
            self._map.madvise(mmap.MADV_DONTNEED, start, self._page_size)


_libc = ctypes.CDLL(None, use_errno=True)


def make_userfaultfd(number: int) -> int:
    """userfaultfd(2) as :mod:`tracker.inject.injector` has it made.

    :param number: of the system call
    :raise OSError: this process may have none, or there is no such call
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    for allowed in (flags, flags | _USER_MODE_ONLY):
        fd = int(_libc.syscall(ctypes.c_long(number), ctypes.c_int(allowed)))
        if fd >= 0:
            return fd
    errno = ctypes.get_errno()
    raise OSError(errno, f"userfaultfd: {os.strerror(errno)}")


def main(fd: int, npages: int, page_size: int, number: int) -> None:
    """Introduce ourselves on standard input, then serve it."""
    channel = _socket.socket(fileno=0)
    memory = Memory(fd, npages, page_size)
    try:
        uffd = make_userfaultfd(number)
    except OSError as error:
        channel.send(f"{memory.address} {error.errno}".encode())
    else:
        rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, uffd.to_bytes(4, "little"))
        channel.sendmsg([f"{memory.address} 0".encode()], [rights])
        os.close(uffd)
    commands = {
        "write": memory.write,
        "read": memory.read,
        "receive": memory.receive,
        "discard": memory.discard,
    }
    while True:
        message = channel.recv(1 << 17).decode()
        if not message:
            return
        command, value, *pages = message.split()
        act, word = commands[command], int(value).to_bytes(_WORD, "little")
        numbers = [int(page) for page in pages]
        try:
            for page in numbers:
                act(word, page)
        except OSError as error:
            channel.send(f"failed {command}: {error}".encode())
        else:
            channel.send(b"done")
