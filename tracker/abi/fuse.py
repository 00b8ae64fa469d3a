"""A file whose reads and writes are answered by a process: ``include/uapi/linux/fuse.h``.

Of version 7.31 of the protocol, which every kernel that has ``fsopen`` speaks.
"""

from __future__ import annotations

import ctypes

FUSE_KERNEL_VERSION = 7
FUSE_MIN_READ_BUFFER = 8192

FUSE_GETATTR = 3
FUSE_OPEN = 14
FUSE_READ = 15
FUSE_WRITE = 16
FUSE_RELEASE = 18
FUSE_FLUSH = 25
FUSE_INIT = 26

FOPEN_DIRECT_IO = 1 << 0


class fuse_in_header(ctypes.Structure):
    """Before each request; ``len`` is bytes of all of it."""

    _fields_ = (
        ("len", ctypes.c_uint32),
        ("opcode", ctypes.c_uint32),
        ("unique", ctypes.c_uint64),
        ("nodeid", ctypes.c_uint64),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("pid", ctypes.c_uint32),
        ("total_extlen", ctypes.c_uint16),
        ("padding", ctypes.c_uint16),
    )


class fuse_out_header(ctypes.Structure):
    """Before each answer; ``error`` is 0 or an errno below zero."""

    _fields_ = (
        ("len", ctypes.c_uint32),
        ("error", ctypes.c_int32),
        ("unique", ctypes.c_uint64),
    )


class fuse_init_out(ctypes.Structure):
    """Answer to FUSE_INIT: ``max_write`` in bytes."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("max_readahead", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("max_background", ctypes.c_uint16),
        ("congestion_threshold", ctypes.c_uint16),
        ("max_write", ctypes.c_uint32),
        ("time_gran", ctypes.c_uint32),
        ("max_pages", ctypes.c_uint16),
        ("map_alignment", ctypes.c_uint16),
        ("flags2", ctypes.c_uint32),
        ("unused", ctypes.c_uint32 * 7),
    )


class fuse_attr(ctypes.Structure):
    """What stat(2) shows."""

    _fields_ = (
        ("ino", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("atime", ctypes.c_uint64),
        ("mtime", ctypes.c_uint64),
        ("ctime", ctypes.c_uint64),
        ("atimensec", ctypes.c_uint32),
        ("mtimensec", ctypes.c_uint32),
        ("ctimensec", ctypes.c_uint32),
        ("mode", ctypes.c_uint32),
        ("nlink", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("rdev", ctypes.c_uint32),
        ("blksize", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class fuse_attr_out(ctypes.Structure):
    """Answer to FUSE_GETATTR."""

    _fields_ = (
        ("attr_valid", ctypes.c_uint64),
        ("attr_valid_nsec", ctypes.c_uint32),
        ("dummy", ctypes.c_uint32),
        ("attr", fuse_attr),
    )


class fuse_open_out(ctypes.Structure):
    """Answer to FUSE_OPEN."""

    _fields_ = (
        ("fh", ctypes.c_uint64),
        ("open_flags", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
    )


class fuse_read_in(ctypes.Structure):
    """FUSE_READ: ``offset`` and ``size`` in bytes; answered with the data."""

    _fields_ = (
        ("fh", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("read_flags", ctypes.c_uint32),
        ("lock_owner", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
    )


class fuse_write_in(ctypes.Structure):
    """FUSE_WRITE: ``offset`` and ``size`` in bytes; the data follow."""

    _fields_ = (
        ("fh", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("write_flags", ctypes.c_uint32),
        ("lock_owner", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
    )


class fuse_write_out(ctypes.Structure):
    """Answer to FUSE_WRITE."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
    )
