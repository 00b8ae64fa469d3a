"""Memory that stays pinned for writing, and reads and writes that go through the pin.

``IORING_REGISTER_BUFFERS`` looks the pages up once, as VFIO does when a guest's RAM is mapped for a
device (Linux: ``pin_user_pages`` with FOLL_LONGTERM | FOLL_WRITE, in io_uring/rsrc.c). Whatever is
read into them afterwards is written to those pages, by way of the kernel's own mapping of them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from types import TracebackType

from tracker.abi import io_uring
from tracker.syscalls import (
    failed,
    io_uring_enter,
    io_uring_register_buffers,
    io_uring_setup,
)

_ENTRIES = 2


class Ring:
    """An io_uring that does one thing at a time, with registered buffers."""

    def __init__(self) -> None:
        """Make the ring.

        :raise OSError: this process may have none
        """
        params = io_uring.io_uring_params()
        self._fd = io_uring_setup(_ENTRIES, params)
        self._maps: list[mmap.mmap] = []
        try:
            sq, cq = params.sq_off, params.cq_off
            entry = ctypes.sizeof(io_uring.io_uring_sqe)
            completion = ctypes.sizeof(io_uring.io_uring_cqe)
            self._sq = self._map(sq.array + 4 * params.sq_entries, io_uring.IORING_OFF_SQ_RING)
            self._cq = self._map(
                cq.cqes + completion * params.cq_entries, io_uring.IORING_OFF_CQ_RING
            )
            self._sqes = self._map(entry * params.sq_entries, io_uring.IORING_OFF_SQES)
        except BaseException:
            self.close()
            raise
        self._sq_off, self._cq_off = sq, cq
        self._buffers: list[tuple[int, int]] = []

    def _map(self, size: int, offset: int) -> mmap.mmap:
        self._maps.append(mmap.mmap(self._fd, size, offset=offset))
        return self._maps[-1]

    def register(self, buffers: Sequence[tuple[int, int]]) -> None:
        """Pin memory for writing, until the ring is closed.

        :param buffers: address and length in bytes of each
        :raise OSError: see :func:`tracker.syscalls.io_uring_register_buffers`
        """
        io_uring_register_buffers(self._fd, buffers)
        self._buffers = list(buffers)

    def read(self, index: int, fd: int) -> None:
        """Have the kernel read a file from its beginning into a buffer: writes through the pin.

        :raise OSError: it failed, or read less than the buffer holds
        """
        self._do(io_uring.IORING_OP_READ_FIXED, "IORING_OP_READ_FIXED", index, fd)

    def write(self, index: int, fd: int) -> None:
        """Have the kernel write a buffer to the beginning of a file: reads through the pin.

        :raise OSError: it failed, or wrote less than the buffer holds
        """
        self._do(io_uring.IORING_OP_WRITE_FIXED, "IORING_OP_WRITE_FIXED", index, fd)

    def _do(self, opcode: int, name: str, index: int, fd: int) -> None:
        address, length = self._buffers[index]
        entry = io_uring.io_uring_sqe(
            opcode=opcode, fd=fd, addr=address, len=length, buf_index=index
        )
        # Nobody else submits, and the kernel looks only while we are in io_uring_enter: no barriers
        self._sqes[: ctypes.sizeof(entry)] = bytes(entry)
        tail = self._word(self._sq, self._sq_off.tail)
        mask = self._word(self._sq, self._sq_off.ring_mask)
        self._set_word(self._sq, self._sq_off.array + 4 * (tail & mask), 0)
        self._set_word(self._sq, self._sq_off.tail, (tail + 1) & 0xFFFFFFFF)
        io_uring_enter(self._fd, 1, 1)
        head = self._word(self._cq, self._cq_off.head)
        at = self._cq_off.cqes + ctypes.sizeof(io_uring.io_uring_cqe) * (
            head & self._word(self._cq, self._cq_off.ring_mask)
        )
        completion = io_uring.io_uring_cqe.from_buffer_copy(self._cq, at)
        self._set_word(self._cq, self._cq_off.head, (head + 1) & 0xFFFFFFFF)
        if completion.res < 0:
            raise failed(name, -completion.res)
        if completion.res != length:
            raise OSError(f"{name}: {completion.res} of {length} bytes")

    @staticmethod
    def _word(ring: mmap.mmap, offset: int) -> int:
        return int.from_bytes(ring[offset : offset + 4], "little")

    @staticmethod
    def _set_word(ring: mmap.mmap, offset: int, value: int) -> None:
        ring[offset : offset + 4] = value.to_bytes(4, "little")

    def close(self) -> None:
        """Let go of all memory. May be called again."""
        while self._maps:
            self._maps.pop().close()
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Ring:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
