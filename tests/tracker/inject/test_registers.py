"""Registers made for a call: both machines, on whichever this runs."""

from __future__ import annotations

import ctypes
import os

import pytest

from tracker.abi import ptrace, unistd
from tracker.abi.rseq import rseq_cs
from tracker.errors import UnsupportedMachine
from tracker.inject.registers import X86_64, Aarch64, find_instruction, machine_of, resume_address

ADDRESS = 0x7FFF_0000_1234


def numbered_x86_64() -> ptrace.user_regs_struct:
    """Every register holds another value."""
    registers = ptrace.user_regs_struct()
    for i, field in enumerate(registers._fields_):
        setattr(registers, field[0], 1000 + i)
    return registers


def numbered_aarch64() -> ptrace.user_pt_regs:
    registers = ptrace.user_pt_regs(sp=2000, pc=2001, pstate=0x6000_0C00)
    for i in range(31):
        registers.regs[i] = 1000 + i
    return registers


def differences(before: ctypes.Structure, after: ctypes.Structure) -> dict[int, int]:
    """Index of each 64-bit word that changed, and its new value."""
    words = ctypes.sizeof(before) // 8
    array = ctypes.c_uint64 * words
    old, new = array.from_buffer_copy(before), array.from_buffer_copy(after)
    return {i: new[i] for i in range(words) if old[i] != new[i]}


def index(name: str) -> int:
    return int(getattr(ptrace.user_regs_struct, name).offset) // 8


def test_call_x86_64() -> None:
    saved = numbered_x86_64()
    made = X86_64().call(saved, ADDRESS, 323, (1, 2, 3, 4, 5, 6))
    arguments = zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), range(1, 7), strict=True)
    assert differences(saved, made) == {
        index("rip"): ADDRESS,
        index("rax"): 323,
        index("orig_rax"): 2**64 - 1,
        **{index(name): value for name, value in arguments},
    }
    assert not differences(saved, numbered_x86_64())


def test_call_aarch64() -> None:
    saved = numbered_aarch64()
    made = Aarch64().call(saved, ADDRESS, 282, (1, 2, 3, 4, 5, 6))
    flags_without_branch_type = 0x6000_0000
    assert differences(saved, made) == {
        **{i: i + 1 for i in range(6)},
        8: 282,
        32: ADDRESS,
        33: flags_without_branch_type,
    }
    assert not differences(saved, numbered_aarch64())


@pytest.mark.parametrize(("value", "result"), [(5, 5), (2**64 - 1, -1), (2**64 - 38, -38)])
def test_result(value: int, result: int) -> None:
    assert X86_64().result(ptrace.user_regs_struct(rax=value)) == result
    registers = ptrace.user_pt_regs()
    registers.regs[0] = value
    assert Aarch64().result(registers) == result


def test_moved_leaves_the_rest() -> None:
    before = numbered_x86_64()
    after = X86_64().moved(before, ADDRESS)
    assert differences(before, after) == {index("rip"): ADDRESS, index("orig_rax"): 2**64 - 1}
    assert X86_64().instruction_pointer(after) == ADDRESS
    pc = Aarch64().moved(numbered_aarch64(), ADDRESS)
    assert Aarch64().instruction_pointer(pc) == ADDRESS


def test_find_instruction() -> None:
    assert find_instruction(X86_64(), b"\x90\x0f\x05\xc3") == 1
    assert find_instruction(X86_64(), b"\x90" * 100) is None
    svc = Aarch64.instruction
    assert find_instruction(Aarch64(), b"\0" * 8 + svc) == 8
    # Arm64 instructions lie at multiples of four; these bytes are parts of two others.
    assert find_instruction(Aarch64(), b"\0\0" + svc + b"\0\0") is None
    assert find_instruction(Aarch64(), b"\0\0" + svc + b"\0\0" + svc) == 8


def test_machine_of() -> None:
    assert machine_of(1, "x86_64").numbers is unistd.X86_64
    assert machine_of(1, "aarch64").numbers is unistd.AARCH64
    assert machine_of(1).registers is machine_of(1, os.uname().machine).registers
    with pytest.raises(UnsupportedMachine, match=r"process 42: .*riscv64") as caught:
        machine_of(42, "riscv64")
    assert caught.value.pid == 42


@pytest.mark.parametrize(
    ("ip", "resume"),
    [(99, 99), (100, 7000), (119, 7000), (120, 120), (0, 0)],
    ids=["before", "first", "last", "committed", "far"],
)
def test_resume_address(ip: int, resume: int) -> None:
    section = rseq_cs(start_ip=100, post_commit_offset=20, abort_ip=7000)
    assert resume_address(ip, section) == resume
    assert resume_address(ip, None) == ip
