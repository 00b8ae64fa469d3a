"""Numbers of the system calls: ``asm/unistd_64.h`` (x86-64), ``asm-generic/unistd.h`` (arm64)."""

from __future__ import annotations

from typing import NamedTuple


class Numbers(NamedTuple):
    """The calls used here, as one architecture numbers them; in C each with ``__NR_``."""

    close: int
    userfaultfd: int
    pidfd_open: int
    pidfd_getfd: int


X86_64 = Numbers(close=3, userfaultfd=323, pidfd_open=434, pidfd_getfd=438)
AARCH64 = Numbers(close=57, userfaultfd=282, pidfd_open=434, pidfd_getfd=438)
