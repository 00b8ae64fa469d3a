"""Faults handled, or only noted, by another process: ``include/uapi/linux/userfaultfd.h``.

Asynchronous write-protection (``UFFD_FEATURE_WP_ASYNC``) came with Linux 6.7, together with
PAGEMAP_SCAN (:mod:`tracker.abi.pagemap`).
"""

from __future__ import annotations

import ctypes

from tracker.abi.ioctl import io, ior, iowr

# Flag of userfaultfd(2), besides O_CLOEXEC and O_NONBLOCK (in v5.11): faults of the kernel
# (copy_to_user, get_user_pages) are not handled, which lets unprivileged processes have one.
UFFD_USER_MODE_ONLY = 1

UFFD_API = 0xAA

UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
UFFD_FEATURE_EVENT_FORK = 1 << 1
UFFD_FEATURE_EVENT_REMAP = 1 << 2
UFFD_FEATURE_EVENT_REMOVE = 1 << 3
UFFD_FEATURE_MISSING_HUGETLBFS = 1 << 4
UFFD_FEATURE_MISSING_SHMEM = 1 << 5
UFFD_FEATURE_EVENT_UNMAP = 1 << 6
UFFD_FEATURE_SIGBUS = 1 << 7
UFFD_FEATURE_THREAD_ID = 1 << 8
UFFD_FEATURE_MINOR_HUGETLBFS = 1 << 9
UFFD_FEATURE_MINOR_SHMEM = 1 << 10
UFFD_FEATURE_EXACT_ADDRESS = 1 << 11
UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12  # in v5.19: write-protection of shared memory
UFFD_FEATURE_WP_UNPOPULATED = 1 << 13  # in v6.4: also where no page is yet
UFFD_FEATURE_POISON = 1 << 14  # in v6.6
UFFD_FEATURE_WP_ASYNC = 1 << 15  # in v6.7: a write only clears the protection, nobody waits
UFFD_FEATURE_MOVE = 1 << 16  # in v6.8

UFFDIO_REGISTER_MODE_MISSING = 1 << 0
UFFDIO_REGISTER_MODE_WP = 1 << 1
UFFDIO_REGISTER_MODE_MINOR = 1 << 2

UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0
UFFDIO_WRITEPROTECT_MODE_DONTWAKE = 1 << 1

UFFD_EVENT_PAGEFAULT = 0x12
UFFD_EVENT_FORK = 0x13
UFFD_EVENT_REMAP = 0x14
UFFD_EVENT_REMOVE = 0x15
UFFD_EVENT_UNMAP = 0x16

UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0
UFFD_PAGEFAULT_FLAG_WP = 1 << 1
UFFD_PAGEFAULT_FLAG_MINOR = 1 << 2


class uffdio_api(ctypes.Structure):
    """Argument of UFFDIO_API: the features wanted; answered with all that there are."""

    _fields_ = (
        ("api", ctypes.c_uint64),
        ("features", ctypes.c_uint64),
        ("ioctls", ctypes.c_uint64),
    )


class uffdio_range(ctypes.Structure):
    """Addresses of the process that called userfaultfd(2), in bytes."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
    )


class uffdio_register(ctypes.Structure):
    """Argument of UFFDIO_REGISTER; ``ioctls`` is the answer, one bit an ioctl."""

    _fields_ = (
        ("range", uffdio_range),
        ("mode", ctypes.c_uint64),
        ("ioctls", ctypes.c_uint64),
    )


class uffdio_writeprotect(ctypes.Structure):
    """Argument of UFFDIO_WRITEPROTECT."""

    _fields_ = (
        ("range", uffdio_range),
        ("mode", ctypes.c_uint64),
    )


class uffd_msg_pagefault(ctypes.Structure):
    """``uffd_msg.arg.pagefault``; ``ptid`` is ``feat.ptid`` in C."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("ptid", ctypes.c_uint32),
        ("_pad", ctypes.c_uint32),
    )


class uffd_msg(ctypes.Structure):
    """What read(2) on the descriptor returns; of the union ``arg`` only ``pagefault``.

    Packed in C, where every field lies at its natural alignment all the same.
    """

    _fields_ = (
        ("event", ctypes.c_uint8),
        ("reserved1", ctypes.c_uint8),
        ("reserved2", ctypes.c_uint16),
        ("reserved3", ctypes.c_uint32),
        ("pagefault", uffd_msg_pagefault),
    )


# The header has UNREGISTER and WAKE as reading, though the kernel reads: an old mix-up, now ABI.
UFFDIO_REGISTER = iowr(0xAA, 0x00, uffdio_register)
UFFDIO_UNREGISTER = ior(0xAA, 0x01, uffdio_range)
UFFDIO_WAKE = ior(0xAA, 0x02, uffdio_range)
UFFDIO_WRITEPROTECT = iowr(0xAA, 0x06, uffdio_writeprotect)
UFFDIO_API = iowr(0xAA, 0x3F, uffdio_api)

# On an open /dev/userfaultfd; the argument is the flags of userfaultfd(2). In v6.1.
USERFAULTFD_IOC_NEW = io(0xAA, 0x00)
