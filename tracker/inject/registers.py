"""How a thread's registers are made to run one system call: pure functions, one class a machine.

Where a thread is put back is as important. The kernel decides about restarting an interrupted
call on the way out of the stop that a signal or PTRACE_INTERRUPT leads to:

- **x86-64** decides *after* the stop, from the registers as the tracer leaves them
  (``arch_do_signal_or_restart``): a tracer that puts back ``rax == -ERESTART…`` and ``orig_rax``
  at such a stop gets the restart, with ``restart_syscall`` where the call needs it. A thread
  that goes on with them from the end of another system call hands -512 to its program.
- **arm64** decides *before* the stop (``do_signal``): ``pc`` is rewound and ``x0`` is the first
  argument again, so the registers as they were run the call once more. What is lost is
  ``restart_syscall``, which it sets up after the stop: a relative sleep or futex timeout that was
  interrupted begins anew with its full length.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Protocol

from tracker.abi import ptrace, rseq, unistd
from tracker.errors import UnsupportedMachine

_MINUS_ONE = (1 << 64) - 1


class Machine(Protocol):
    """What has to be known of an architecture."""

    @property
    def registers(self) -> type[ctypes.Structure]:
        """Layout of the regset NT_PRSTATUS of a 64-bit process."""

    @property
    def numbers(self) -> unistd.Numbers:
        """Numbers of the system calls."""

    @property
    def instruction(self) -> bytes:
        """The instruction that enters the kernel."""

    @property
    def alignment(self) -> int:
        """Alignment of instructions, in bytes."""

    def call(self, saved: Any, address: int, nr: int, arguments: tuple[int, ...]) -> Any:
        """Make the registers that run system call ``nr`` from the instruction at ``address``.

        :param saved: the thread's registers, left unchanged
        :param arguments: at most six, unsigned
        """

    def result(self, registers: Any) -> int:
        """Return what the system call that has just ended returned: -errno if it failed."""

    def instruction_pointer(self, registers: Any) -> int:
        """Return the address where the thread goes on."""

    def moved(self, registers: Any, address: int) -> Any:
        """Make registers that go on at ``address`` instead, outside of any system call."""


class X86_64:
    """x86-64: number in rax, arguments in rdi, rsi, rdx, r10, r8, r9."""

    registers = ptrace.user_regs_struct
    numbers = unistd.X86_64
    instruction = b"\x0f\x05"  # syscall
    alignment = 1

    def call(
        self, saved: ptrace.user_regs_struct, address: int, nr: int, arguments: tuple[int, ...]
    ) -> ptrace.user_regs_struct:
        """See :meth:`Machine.call`."""
        new = self.moved(saved, address)
        new.rax = nr
        names = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
        for name, value in zip(names, arguments, strict=False):
            setattr(new, name, value)
        return new

    def result(self, registers: ptrace.user_regs_struct) -> int:
        """See :meth:`Machine.result`."""
        return ctypes.c_int64(registers.rax).value

    def instruction_pointer(self, registers: ptrace.user_regs_struct) -> int:
        """See :meth:`Machine.instruction_pointer`."""
        return int(registers.rip)

    def moved(self, registers: ptrace.user_regs_struct, address: int) -> ptrace.user_regs_struct:
        """See :meth:`Machine.moved`."""
        new = ptrace.user_regs_struct.from_buffer_copy(registers)
        new.rip = address
        # "Not in a system call", else the kernel rewinds rip whenever rax looks like -ERESTART….
        new.orig_rax = _MINUS_ONE
        return new


class Aarch64:
    """arm64: number in x8, arguments in x0 to x5."""

    registers = ptrace.user_pt_regs
    numbers = unistd.AARCH64
    instruction = b"\x01\x00\x00\xd4"  # svc #0
    alignment = 4

    # PSTATE.BTYPE: set for one instruction after an indirect branch. In a guarded page (BTI) any
    # instruction but a landing pad would fault while it is set.
    BTYPE = 0b11 << 10

    def call(
        self, saved: ptrace.user_pt_regs, address: int, nr: int, arguments: tuple[int, ...]
    ) -> ptrace.user_pt_regs:
        """See :meth:`Machine.call`."""
        new = self.moved(saved, address)
        new.regs[8] = nr
        for i, value in enumerate(arguments):
            new.regs[i] = value
        return new

    def result(self, registers: ptrace.user_pt_regs) -> int:
        """See :meth:`Machine.result`."""
        return ctypes.c_int64(registers.regs[0]).value

    def instruction_pointer(self, registers: ptrace.user_pt_regs) -> int:
        """See :meth:`Machine.instruction_pointer`."""
        return int(registers.pc)

    def moved(self, registers: ptrace.user_pt_regs, address: int) -> ptrace.user_pt_regs:
        """See :meth:`Machine.moved`."""
        new = ptrace.user_pt_regs.from_buffer_copy(registers)
        new.pc = address
        new.pstate &= ~self.BTYPE
        return new


def machine_of(pid: int, name: str | None = None) -> Machine:
    """Return the machine that process ``pid`` runs on.

    :param name: as in uname(2); the running kernel's unless given
    :raise UnsupportedMachine: neither x86-64 nor arm64
    """
    name = os.uname().machine if name is None else name
    if name == "x86_64":
        return X86_64()
    if name == "aarch64":
        return Aarch64()
    raise UnsupportedMachine(pid, f"no register layout for {name}: only x86_64 and aarch64")


def find_instruction(machine: Machine, code: bytes) -> int | None:
    """Return the offset in ``code`` of an instruction that enters the kernel, if there is one.

    ``code`` begins at a page boundary. On x86-64 the two bytes may also be the middle of another
    instruction: that does as well, as the thread never runs what follows.
    """
    at = code.find(machine.instruction)
    while at >= 0 and at % machine.alignment:
        at = code.find(machine.instruction, at + 1)
    return at if at >= 0 else None


def resume_address(ip: int, section: rseq.rseq_cs | None) -> int:
    """Return where a stopped thread has to go on: at ``ip``, or where its sequence is aborted.

    A thread that was taken off its CPU inside a restartable sequence is moved to the abort
    address by the kernel when it returns to user mode. Running a system call from elsewhere makes
    the kernel forget the sequence instead (``kernel/rseq.c``, rseq_ip_fixup); then it is for us
    to do the same.
    """
    if section is None or not 0 <= ip - section.start_ip < section.post_commit_offset:
        return ip
    return int(section.abort_ip)
