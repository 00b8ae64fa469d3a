"""Reading and writing through buffers that stay pinned: ``include/uapi/linux/io_uring.h``.

Since Linux commit 2b188cc1bb85 ("Add io_uring IO interface", in v5.1); registered buffers since
edafccee56ff, of the same version. Of the unions in an entry only what ``READ_FIXED`` and
``WRITE_FIXED`` use.
"""

from __future__ import annotations

import ctypes

IORING_OFF_SQ_RING = 0
IORING_OFF_CQ_RING = 0x8000000
IORING_OFF_SQES = 0x10000000

IORING_ENTER_GETEVENTS = 1 << 0

IORING_REGISTER_BUFFERS = 0
IORING_UNREGISTER_BUFFERS = 1

IORING_OP_READ_FIXED = 4
IORING_OP_WRITE_FIXED = 5


class io_uring_sqe(ctypes.Structure):
    """What is asked for; ``addr`` lies in the registered buffer ``buf_index``."""

    _fields_ = (
        ("opcode", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("ioprio", ctypes.c_uint16),
        ("fd", ctypes.c_int32),
        ("off", ctypes.c_uint64),
        ("addr", ctypes.c_uint64),
        ("len", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("user_data", ctypes.c_uint64),
        ("buf_index", ctypes.c_uint16),
        ("personality", ctypes.c_uint16),
        ("splice_fd_in", ctypes.c_int32),
        ("addr3", ctypes.c_uint64),
        ("__pad2", ctypes.c_uint64),
    )


class io_uring_cqe(ctypes.Structure):
    """What became of it: ``res`` is bytes, or an errno below zero."""

    _fields_ = (
        ("user_data", ctypes.c_uint64),
        ("res", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
    )


class io_sqring_offsets(ctypes.Structure):
    """Bytes from the beginning of the submission ring."""

    _fields_ = (
        ("head", ctypes.c_uint32),
        ("tail", ctypes.c_uint32),
        ("ring_mask", ctypes.c_uint32),
        ("ring_entries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("dropped", ctypes.c_uint32),
        ("array", ctypes.c_uint32),
        ("resv1", ctypes.c_uint32),
        ("resv2", ctypes.c_uint64),
    )


class io_cqring_offsets(ctypes.Structure):
    """Bytes from the beginning of the completion ring."""

    _fields_ = (
        ("head", ctypes.c_uint32),
        ("tail", ctypes.c_uint32),
        ("ring_mask", ctypes.c_uint32),
        ("ring_entries", ctypes.c_uint32),
        ("overflow", ctypes.c_uint32),
        ("cqes", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("resv1", ctypes.c_uint32),
        ("resv2", ctypes.c_uint64),
    )


class io_uring_params(ctypes.Structure):
    """Argument of io_uring_setup(2), which fills in all but ``flags``."""

    _fields_ = (
        ("sq_entries", ctypes.c_uint32),
        ("cq_entries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("sq_thread_cpu", ctypes.c_uint32),
        ("sq_thread_idle", ctypes.c_uint32),
        ("features", ctypes.c_uint32),
        ("wq_fd", ctypes.c_uint32),
        ("resv", ctypes.c_uint32 * 3),
        ("sq_off", io_sqring_offsets),
        ("cq_off", io_cqring_offsets),
    )
