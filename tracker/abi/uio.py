"""A piece of memory as system calls take it: ``include/uapi/linux/uio.h``."""

from __future__ import annotations

import ctypes


class iovec(ctypes.Structure):
    """Address and length in bytes, on a 64-bit machine."""

    _fields_ = (
        ("iov_base", ctypes.c_uint64),
        ("iov_len", ctypes.c_uint64),
    )
