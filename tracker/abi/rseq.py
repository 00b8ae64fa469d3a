"""Restartable sequences: ``include/uapi/linux/rseq.h`` (in v4.18)."""

from __future__ import annotations

import ctypes


class rseq(ctypes.Structure):
    """Beginning of what a thread shares with the kernel; ``rseq_cs`` is an address or 0."""

    _fields_ = (
        ("cpu_id_start", ctypes.c_uint32),
        ("cpu_id", ctypes.c_uint32),
        ("rseq_cs", ctypes.c_uint64),
    )


class rseq_cs(ctypes.Structure):
    """One critical section: ``post_commit_offset`` bytes of code from ``start_ip`` on."""

    _fields_ = (
        ("version", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("start_ip", ctypes.c_uint64),
        ("post_commit_offset", ctypes.c_uint64),
        ("abort_ip", ctypes.c_uint64),
    )
