"""One thread of another process, stopped to run system calls, and put back as it was.

Nothing is written to the target's memory. Its registers, its signal mask and the system call it
was in are as before when it goes on: :mod:`tracker.inject.registers` says why the place where they
are put back matters. Vector and floating-point registers are never touched. What the target may
notice is what any stop (SIGSTOP, a debugger) makes visible: time, and EINTR from the few calls
that the kernel does not restart (``epoll_wait``, ``sigtimedwait``, ``semop``; see ptrace(2)).
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Any

from tracker.abi import ptrace, rseq, uio
from tracker.abi.ptrace import Request
from tracker.errors import InjectionError, TargetGone
from tracker.inject.refusal import proc_status, why_refused
from tracker.inject.registers import Machine, find_instruction, machine_of, resume_address
from tracker.syscalls import failed, ptrace_request

_WALL = 0x40000000  # wait for any kind of child; Python's os module lacks it
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_KERNEL_SIGSET_BYTES = 8
_CHUNK = 1 << 20


class Tracee:
    """The main thread of process ``pid``, stopped while the ``with`` block runs.

    The calling thread is the tracer; it must have SIGCHLD blocked, and nobody else in its process
    may take SIGCHLD. **The process must not be killed inside the block**: the kernel would let the
    target go on with the registers it has at that moment.

    :ivar machine: the target's architecture
    :ivar stopped_ns: how long the thread was stopped, once the block is left
    """

    def __init__(self, pid: int, deadline: float) -> None:
        """Prepare; nothing is done to the target yet.

        :param deadline: until when the thread must have stopped, in :func:`time.monotonic` seconds
        :raise UnsupportedMachine: neither x86-64 nor arm64
        """
        self.pid = pid
        self.machine: Machine = machine_of(pid)
        self.stopped_ns = 0
        self._deadline = deadline
        self._saved: Any = None
        self._mask = ctypes.c_uint64()
        self._address: int | None = None

    def __enter__(self) -> Tracee:
        """Stop the thread.

        When this fails, a thread that had not stopped yet stays traced until our process ends.

        :raise TargetGone: it ended, or never was
        :raise InjectionError: it may not be traced, does not stop in time, or is a 32-bit process
        """
        self._seize()
        self._memory = open(f"/proc/{self.pid}/mem", "rb", buffering=0)
        self._address = self._find_instruction()
        self._stop()
        try:
            self._save()
        except BaseException:
            self._ptrace(Request.DETACH)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """Put the thread back and let it go; waits for as long as that takes.

        :raise TargetGone: it ended meanwhile
        """
        # The thread is at the end of a system call. It has to be at a stop that the kernel leaves
        # by way of its signal code, which is what restarts the call that was interrupted.
        self._ptrace(Request.INTERRUPT)
        resume_signal = 0
        while True:
            self._ptrace(Request.CONT, data=resume_signal)
            stop, resume_signal = self._wait(None)
            if stop == ptrace.PTRACE_EVENT_STOP:
                break
        self._set_registers(self._saved)
        self._set_mask(self._mask)
        self._ptrace(Request.DETACH)
        self.stopped_ns = time.monotonic_ns() - self._stopped_at_ns
        self._memory.close()

    def call(self, name: str, nr: int, *arguments: int) -> int:
        """Run one system call in the thread. It must not block, nor be one that is restarted.

        There is no deadline: the thread cannot be put back before its call is over.

        :param name: of the call, for errors
        :return: what it returned
        :raise OSError: it failed
        :raise TargetGone: the process ended meanwhile
        """
        assert self._address is not None
        self._set_registers(self.machine.call(self._saved, self._address, nr, arguments))
        for _ in ("entry", "exit"):
            resume_signal = 0
            while True:
                self._ptrace(Request.SYSCALL, data=resume_signal)
                stop, resume_signal = self._wait(None)
                if stop == _SYSCALL_STOP:
                    break
        result = self.machine.result(self._registers())
        if result < 0:
            raise failed(f"{name} inside the process", -result)
        return result

    def _seize(self) -> None:
        try:
            status = proc_status(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            raise TargetGone(self.pid, "there is no such process") from None
        if status["State"][0] in "ZX":
            raise TargetGone(self.pid, "its main thread has ended")
        options = ptrace.PTRACE_O_TRACESYSGOOD
        if status.get("Seccomp", "0") != "0":
            # A filter that lists what is allowed would answer our call by killing the process.
            # Suspending filters takes CAP_SYS_ADMIN and CONFIG_CHECKPOINT_RESTORE; without, QEMU's
            # own sandbox still lets the call through, since it lists what is denied.
            try:
                suspend = options | ptrace.PTRACE_O_SUSPEND_SECCOMP
                return ptrace_request(Request.SEIZE, self.pid, data=suspend)
            except OSError:
                pass
        try:
            ptrace_request(Request.SEIZE, self.pid, data=options)
        except ProcessLookupError:
            raise TargetGone(self.pid, "there is no such process") from None
        except PermissionError:
            try:
                reason = why_refused(self.pid)
            except OSError:
                raise TargetGone(self.pid, "it ended") from None
            raise InjectionError(self.pid, reason) from None
        return None

    def _stop(self) -> None:
        self._ptrace(Request.INTERRUPT)
        while True:
            stop, resume_signal = self._wait(self._deadline)
            if stop == ptrace.PTRACE_EVENT_STOP:
                break
            self._ptrace(Request.CONT, data=resume_signal)  # a signal on its way: deliver it
        self._stopped_at_ns = time.monotonic_ns()

    def _save(self) -> None:
        self._saved = self._registers()
        if self._address is None or self._instruction_at(self._address) is None:
            raise InjectionError(self.pid, "it maps no code that has a system call instruction")
        size = _KERNEL_SIGSET_BYTES
        mask = ctypes.addressof(self._mask)
        self._ptrace(Request.GETSIGMASK, size, mask)
        ip = self.machine.instruction_pointer(self._saved)
        resume = resume_address(ip, self._rseq_section())
        if resume != ip:
            self._saved = self.machine.moved(self._saved, resume)
        # No handler may run on the registers of our call.
        self._set_mask(ctypes.c_uint64(2**64 - 1))

    def _wait(self, deadline: float | None) -> tuple[int, int]:
        """Wait until the thread stops.

        :return: the kind of stop, and the signal to go on with: PTRACE_EVENT_STOP, _SYSCALL_STOP,
            or 0 when the signal is about to be delivered. Once all are blocked, that is SIGSTOP.
        :raise TargetGone: it ended
        :raise InjectionError: it did not stop before the deadline
        """
        while True:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG | _WALL)
            except ChildProcessError:
                raise TargetGone(self.pid, "it ended") from None
            if pid:
                break
            seconds = 60.0 if deadline is None else deadline - time.monotonic()
            if seconds <= 0:
                raise InjectionError(self.pid, f"its main thread does not stop: {self._state()}")
            signal.sigtimedwait((signal.SIGCHLD,), seconds)
        if not os.WIFSTOPPED(status):
            raise TargetGone(self.pid, "it ended")
        if status >> 16 == ptrace.PTRACE_EVENT_STOP:
            return ptrace.PTRACE_EVENT_STOP, 0
        if os.WSTOPSIG(status) == _SYSCALL_STOP:
            return _SYSCALL_STOP, 0
        return 0, os.WSTOPSIG(status)

    def _state(self) -> str:
        try:
            return f"state {proc_status(self.pid)['State']}"
        except OSError:
            return "it ended"

    def _ptrace(self, request: Request, addr: int = 0, data: int = 0) -> None:
        try:
            ptrace_request(request, self.pid, addr, data)
        except ProcessLookupError:  # only SIGKILL takes a thread out of a stop
            raise TargetGone(self.pid, "it ended") from None

    def _registers(self) -> ctypes.Structure:
        registers = self.machine.registers()
        vector = uio.iovec(ctypes.addressof(registers), ctypes.sizeof(registers))
        self._ptrace(Request.GETREGSET, ptrace.NT_PRSTATUS, ctypes.addressof(vector))
        if vector.iov_len != ctypes.sizeof(registers):
            raise InjectionError(self.pid, "it is a 32-bit process")
        return registers

    def _set_registers(self, registers: ctypes.Structure) -> None:
        vector = uio.iovec(ctypes.addressof(registers), ctypes.sizeof(registers))
        self._ptrace(Request.SETREGSET, ptrace.NT_PRSTATUS, ctypes.addressof(vector))

    def _set_mask(self, mask: ctypes.c_uint64) -> None:
        self._ptrace(Request.SETSIGMASK, _KERNEL_SIGSET_BYTES, ctypes.addressof(mask))

    def _find_instruction(self) -> int | None:
        """Look for the instruction in the vDSO, then in other code that nobody writes to."""
        regions = []
        with open(f"/proc/{self.pid}/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
                if permissions == "r-xp":
                    start, end = (int(address, 16) for address in addresses.split("-"))
                    regions.append((path != ["[vdso]\n"], start, end))
        for _, start, end in sorted(regions):
            for at in range(start, end, _CHUNK):
                code = os.pread(self._memory.fileno(), min(_CHUNK, end - at), at)
                found = find_instruction(self.machine, code)
                if found is not None:
                    return at + found
        return None

    def _instruction_at(self, address: int) -> int | None:
        code = os.pread(self._memory.fileno(), len(self.machine.instruction), address)
        return find_instruction(self.machine, code)

    def _rseq_section(self) -> rseq.rseq_cs | None:
        """Read the restartable sequence that the thread has announced, if any."""
        configuration = ptrace.ptrace_rseq_configuration()
        size, address = ctypes.sizeof(configuration), ctypes.addressof(configuration)
        try:
            self._ptrace(Request.GET_RSEQ_CONFIGURATION, size, address)
        except OSError:  # EIO: a kernel before 5.13
            return None
        if not configuration.rseq_abi_pointer:
            return None
        area = self._read(configuration.rseq_abi_pointer, rseq.rseq)
        return self._read(area.rseq_cs, rseq.rseq_cs) if area.rseq_cs else None

    def _read(self, address: int, kind: type[Any]) -> Any:
        data = os.pread(self._memory.fileno(), ctypes.sizeof(kind), address)
        if len(data) < ctypes.sizeof(kind):  # there is no memory any more
            raise TargetGone(self.pid, "it ended")
        return kind.from_buffer_copy(data)
