"""Numbers of the system calls: ``asm/unistd_64.h`` (x86-64), ``asm-generic/unistd.h`` (arm64)."""

from __future__ import annotations

from typing import NamedTuple


class Numbers(NamedTuple):
    """The calls used here, as one architecture numbers them; in C each with ``__NR_``."""

    close: int
    userfaultfd: int
    pidfd_open: int
    pidfd_getfd: int
    kcmp: int
    vmsplice: int
    io_uring_setup: int
    io_uring_enter: int
    io_uring_register: int
    fsopen: int
    fsconfig: int
    fsmount: int


X86_64 = Numbers(
    close=3,
    userfaultfd=323,
    pidfd_open=434,
    pidfd_getfd=438,
    kcmp=312,
    vmsplice=278,
    io_uring_setup=425,
    io_uring_enter=426,
    io_uring_register=427,
    fsopen=430,
    fsconfig=431,
    fsmount=432,
)
AARCH64 = Numbers(
    close=57,
    userfaultfd=282,
    pidfd_open=434,
    pidfd_getfd=438,
    kcmp=272,
    vmsplice=75,
    io_uring_setup=425,
    io_uring_enter=426,
    io_uring_register=427,
    fsopen=430,
    fsconfig=431,
    fsmount=432,
)

KCMP_FILE = 0  # include/uapi/linux/kcmp.h: two descriptors are one open file
