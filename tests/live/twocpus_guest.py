"""A guest of two processors, one of which writes memory for ever while the other only reads it.

A boot sector like that of :mod:`migrator.guest.bootsector`. The first processor adds one to the
first byte of each page of a working set, in order, over and over, with a heartbeat on the serial
port every so many pages; the second one reads the same bytes, and writes nothing at all. Each
counts its pages in a register, which QEMU's monitor shows: :func:`progress`.

====  =====================================  ====  =====================================
esi   pages that were written, or read       ebp   pages until the next heartbeat
edi   the next page                          ebx   the next heartbeat's number
====  =====================================  ====  =====================================

The second processor is started by the first one's local APIC: INIT, and the address of its first
page ("Multiprocessor Specification" 1.4, B.4).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from migrator.guest import bootsector
from migrator.guest.assembler import SECTOR_SIZE, Assembly
from migrator.guest.workload import IMAGE_BYTES, MIB, PAGE_SIZE
from migrator.qemu.qmp import Qmp
from tests.live.vms import Machine

_STACK = 0x7000
_SECOND = 0x8000  # a page, that is: two sectors behind the first
_ICR = 0xFEE0_0300
_INIT, _START = 0x000C_4500, 0x000C_4600 | _SECOND // PAGE_SIZE  # to all others
_START_PAGE = 16 * MIB
_PAGES_PER_HEARTBEAT = 1 << 15
_REGISTERS = re.compile(r"\bESI=(\w+)")


@dataclass(frozen=True)
class TwoProcessors(Machine):
    """A test VM with this guest in it, whose working set is that of its ``workload``."""

    def arguments(self, image: Path, console: Path, *, destination: bool = False) -> list[str]:
        ours = image.with_name("twocpus.img")
        if not ours.exists():
            end = _START_PAGE + self.workload.working_set_bytes
            ours.write_bytes(_program(end).finish(4 * SECTOR_SIZE).ljust(IMAGE_BYTES, b"\0"))
        return [*super().arguments(ours, console, destination=destination), "-smp", "2"]


async def progress(vm: Qmp) -> tuple[int, int]:
    """Pages that were written and pages that were read, modulo 2**32."""
    said = await vm.human("info registers -a")
    written, read = (int(esi, 16) for esi in _REGISTERS.findall(said))
    return written, read


def _program(end: int) -> Assembly:
    s = Assembly(bootsector.ORIGIN)
    _load_the_rest(s)
    bootsector.enter_flat_segments(s, "first")
    _start_the_other(s)
    _write_for_ever(s, end)
    _heartbeat(s)
    bootsector.segments(s)
    s.end_boot_sector()
    s.op("00 " * (_SECOND - bootsector.ORIGIN - SECTOR_SIZE), f".org {_SECOND - bootsector.ORIGIN}")
    bootsector.enter_flat_segments(s, "second")
    _read_for_ever(s, end)
    return s


def _load_the_rest(s: Assembly) -> None:
    """The BIOS has left its drive in dl."""
    s.op("31 c0", "xor ax, ax")
    s.op("8e c0", "mov es, ax")
    s.op("8e d0", "mov ss, ax")
    s.op(f"bc imm16:{_STACK}", f"mov sp, {_STACK}")
    s.label("load")
    s.op("b8 03 02", "mov ax, 0x0203")  # read, three sectors
    s.op(
        f"bb imm16:{bootsector.ORIGIN + SECTOR_SIZE}", f"mov bx, {bootsector.ORIGIN + SECTOR_SIZE}"
    )
    s.op("b9 02 00", "mov cx, 2")  # cylinder 0, sector 2: they count from 1
    s.op("b6 00", "mov dh, 0")  # head 0
    s.op("cd 13", "int 0x13")
    s.op("72 rel8:load", "jc load")


def _start_the_other(s: Assembly) -> None:
    for n, command in enumerate((_INIT, _START, _START)):
        s.op(f"c7 05 imm32:{_ICR} imm32:{command}", f"mov dword ptr [{_ICR}], {command}")
        s.op(f"b9 imm32:{10_000_000}", f"mov ecx, {10_000_000}")
        s.label(f"pause{n}")
        s.op(f"e2 rel8:pause{n}", f"loop pause{n}")


def _write_for_ever(s: Assembly, end: int) -> None:
    s.op(f"bc imm32:{_STACK}", f"mov esp, {_STACK}")
    s.op("31 db", "xor ebx, ebx")
    s.op("31 f6", "xor esi, esi")
    s.op("bd imm32:1", "mov ebp, 1")
    s.op(f"bf imm32:{_START_PAGE}", f"mov edi, {_START_PAGE}")
    s.label("walk")
    s.op("fe 07", "inc byte ptr [edi]")
    _next_page(s, end, "walk")
    s.op("4d", "dec ebp")
    s.op("75 rel8:walk", "jnz walk")


def _read_for_ever(s: Assembly, end: int) -> None:
    s.op("31 f6", "xor esi, esi")
    s.op(f"bf imm32:{_START_PAGE}", f"mov edi, {_START_PAGE}")
    s.label("look")
    s.op("8a 07", "mov al, [edi]")
    _next_page(s, end, "look")
    s.op("eb rel8:look", "jmp look")


def _next_page(s: Assembly, end: int, name: str) -> None:
    s.op("46", "inc esi")
    s.op("81 c7 imm32:4096", "add edi, 4096")
    s.op(f"81 ff imm32:{end}", f"cmp edi, {end}")
    s.op(f"72 rel8:{name}_on", f"jb {name}_on")
    s.op(f"bf imm32:{_START_PAGE}", f"mov edi, {_START_PAGE}")
    s.label(f"{name}_on")


def _heartbeat(s: Assembly) -> None:
    s.op(f"bd imm32:{_PAGES_PER_HEARTBEAT}", f"mov ebp, {_PAGES_PER_HEARTBEAT}")
    bootsector.say_number(s)
    s.op("e9 rel32:walk", "jmp walk")

    bootsector.put(s)
