"""Stopping a thread and changing its registers: ``include/uapi/linux/ptrace.h``.

With the two register layouts of the regset NT_PRSTATUS (``linux/elf.h``): x86-64's
``struct user_regs_struct`` (``sys/user.h``) and arm64's ``struct user_pt_regs``
(``arch/arm64/include/uapi/asm/ptrace.h``).
"""

from __future__ import annotations

import ctypes
import enum


class Request(enum.IntEnum):
    """First argument of ptrace(2); in C each with ``PTRACE_`` before its name."""

    CONT = 7
    DETACH = 17
    SYSCALL = 24
    GETREGSET = 0x4204
    SETREGSET = 0x4205
    SEIZE = 0x4206
    INTERRUPT = 0x4207
    GETSIGMASK = 0x420A
    SETSIGMASK = 0x420B
    GET_RSEQ_CONFIGURATION = 0x420F


PTRACE_O_TRACESYSGOOD = 1 << 0  # stops at system calls show as SIGTRAP | 0x80
PTRACE_O_SUSPEND_SECCOMP = 1 << 21  # the thread's seccomp filters do not run while traced

PTRACE_EVENT_STOP = 128

NT_PRSTATUS = 1


class ptrace_rseq_configuration(ctypes.Structure):
    """Answer of PTRACE_GET_RSEQ_CONFIGURATION (in v5.13): where the thread's struct rseq is."""

    _fields_ = (
        ("rseq_abi_pointer", ctypes.c_uint64),
        ("rseq_abi_size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class user_regs_struct(ctypes.Structure):
    """x86-64: the general registers of a thread."""

    _fields_ = (
        ("r15", ctypes.c_uint64),
        ("r14", ctypes.c_uint64),
        ("r13", ctypes.c_uint64),
        ("r12", ctypes.c_uint64),
        ("rbp", ctypes.c_uint64),
        ("rbx", ctypes.c_uint64),
        ("r11", ctypes.c_uint64),
        ("r10", ctypes.c_uint64),
        ("r9", ctypes.c_uint64),
        ("r8", ctypes.c_uint64),
        ("rax", ctypes.c_uint64),
        ("rcx", ctypes.c_uint64),
        ("rdx", ctypes.c_uint64),
        ("rsi", ctypes.c_uint64),
        ("rdi", ctypes.c_uint64),
        ("orig_rax", ctypes.c_uint64),
        ("rip", ctypes.c_uint64),
        ("cs", ctypes.c_uint64),
        ("eflags", ctypes.c_uint64),
        ("rsp", ctypes.c_uint64),
        ("ss", ctypes.c_uint64),
        ("fs_base", ctypes.c_uint64),
        ("gs_base", ctypes.c_uint64),
        ("ds", ctypes.c_uint64),
        ("es", ctypes.c_uint64),
        ("fs", ctypes.c_uint64),
        ("gs", ctypes.c_uint64),
    )


class user_pt_regs(ctypes.Structure):
    """arm64: the general registers of a thread."""

    _fields_ = (
        ("regs", ctypes.c_uint64 * 31),
        ("sp", ctypes.c_uint64),
        ("pc", ctypes.c_uint64),
        ("pstate", ctypes.c_uint64),
    )
