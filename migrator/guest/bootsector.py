"""The machine code of the workload guest: an x86 boot sector, assembled here byte by byte.

The BIOS loads the sector at 0x7C00 in real mode. It switches to flat 32-bit protected mode and
then lives in two places only:

``walk``
    the main loop: adds one to the first byte of each page, in order, for ever, while the budget
    of this tick lasts, and halts until the next tick when it is spent;
``tick``
    the handler of the timer interrupt (PIT channel 0): every so many ticks writes a heartbeat to
    COM1, and gives the walk its next budget.

Time costs the walk nothing that way (no clock is ever polled), an idle guest leaves its core
alone, and the PIT is the same under TCG and under KVM. All variables live in registers:

====  =====================================  ====  =====================================
ebx   the next heartbeat's number            edi   the page to be written next
ecx   pages left in this tick; <= 0: none    ebp   ticks until the next heartbeat
esi   fraction of a page carried over        eax, edx   the handler's own
====  =====================================  ====  =====================================

Memory written: the working set, and a few dozen bytes of stack below 0x7000. The stack is not in
the sector's own page, as TCG throws translated code away when its page is written.

If a device is to write memory as well, a second sector holds its driver
(:mod:`migrator.guest.edu`). The first then begins by loading it, calls ``find_edu`` before the
walk, and ``run_edu`` at each tick.
"""

from __future__ import annotations

from dataclasses import dataclass

from migrator.guest import edu
from migrator.guest.assembler import SECTOR_SIZE, Assembly

PIT_HZ = 1_193_182

FULL_SPEED = 0x7FFF_FFFF
"""A budget that no tick can use up."""

ORIGIN = 0x7C00
"""Where the BIOS loads a boot sector, and begins to run it."""

_STACK = 0x7000
_CODE, _DATA = 0x08, 0x10
_TICK_VECTOR = 0x20


@dataclass(frozen=True)
class Parameters:
    """The numbers in the code.

    :ivar start: guest-physical address of the working set's first page
    :ivar end: guest-physical address after its last page
    :ivar pit_divisor: PIT clocks a tick, 1 to 65535
    :ivar ticks_per_heartbeat: at least 1
    :ivar budget: pages a tick, up to :data:`FULL_SPEED`
    :ivar budget_fraction: and so many 2**-32ths of a page
    :ivar dma: what the ``edu`` device is to write, if it is
    """

    start: int
    end: int
    pit_divisor: int
    ticks_per_heartbeat: int
    budget: int
    budget_fraction: int
    dma: edu.Region | None = None


def assemble(parameters: Parameters) -> bytes:
    """:return: the boot sector, 512 bytes ending in 55 AA; with ``dma`` also the next sector."""
    return _program(parameters).finish(SECTOR_SIZE * (2 if parameters.dma else 1))


def listing(parameters: Parameters) -> str:
    """:return: the same program as source for GNU ``as``, to be linked at 0x7C00."""
    return "\n".join([".intel_syntax noprefix", *_program(parameters).listing, ""])


def _program(p: Parameters) -> Assembly:
    s = Assembly(ORIGIN)
    s.listing.append(".code16")
    if p.dma:
        _load_second_sector(s)
    enter_protected_mode(s)
    start_timer(s, p.pit_divisor)
    if p.dma:
        s.op("e8 rel32:find_edu", "call find_edu")
    _walk(s, p)
    _tick(s, p)
    tables(s)
    s.end_boot_sector()
    if p.dma:
        edu.find_edu(s, p.dma)
        edu.run_edu(s, p.dma)
    return s


def _load_second_sector(s: Assembly) -> None:
    """Read it to where it belongs, behind the first; the BIOS has left its drive in dl."""
    s.op("31 c0", "xor ax, ax")
    s.op("8e c0", "mov es, ax")
    s.op("8e d0", "mov ss, ax")  # no interrupt until after the next instruction
    s.op(f"bc imm16:{_STACK}", f"mov sp, {_STACK}")
    s.label("load")
    s.op("b8 01 02", "mov ax, 0x0201")  # read, one sector
    s.op(f"bb imm16:{ORIGIN + SECTOR_SIZE}", f"mov bx, {ORIGIN + SECTOR_SIZE}")
    s.op("b9 02 00", "mov cx, 2")  # cylinder 0, sector 2: they count from 1
    s.op("b6 00", "mov dh, 0")  # head 0
    s.op("cd 13", "int 0x13")
    s.op("72 rel8:load", "jc load")


def enter_protected_mode(s: Assembly) -> None:
    """Append the way there from real mode: a stack, interrupts off; changes eax.

    Needs ``gdtr`` and ``idtr``.
    """
    enter_flat_segments(s, "protected")
    s.op(f"bc imm32:{_STACK}", f"mov esp, {_STACK}")
    s.op("0f 01 1d abs32:idtr", "lidt [idtr]")


def enter_flat_segments(s: Assembly, label: str) -> None:
    """Append the way to protected mode: A20 on, interrupts off, no stack yet; changes eax.

    Needs ``gdtr``.

    :param label: for the first instruction there
    """
    s.op("fa", "cli")
    s.op("31 c0", "xor ax, ax")
    s.op("8e d8", "mov ds, ax")
    s.op("e4 92", "in al, 0x92")  # system control port A:
    s.op("0c 02", "or al, 2")  # A20 on,
    s.op("24 fe", "and al, 0xfe")  # and no reset
    s.op("e6 92", "out 0x92, al")
    s.op("0f 01 16 abs16:gdtr", "lgdtw [gdtr]")
    s.op("0f 20 c0", "mov eax, cr0")
    s.op("0c 01", "or al, 1")
    s.op("0f 22 c0", "mov cr0, eax")
    s.op(f"ea abs16:{label} imm16:{_CODE}", f"ljmp {_CODE}, offset {label}")
    s.listing.append(".code32")
    s.label(label)
    s.op(f"66 b8 imm16:{_DATA}", f"mov ax, {_DATA}")
    s.op("8e d8", "mov ds, eax")
    s.op("8e c0", "mov es, eax")
    s.op("8e d0", "mov ss, eax")


def start_timer(s: Assembly, pit_divisor: int) -> None:
    """Append: let through the timer interrupt alone, every ``pit_divisor`` clocks; changes al."""
    _out(s, 0x20, 0x11)  # first PIC, ICW1: edge-triggered, cascaded, ICW4 follows
    _out(s, 0x21, _TICK_VECTOR)  # ICW2: IRQ 0 is this vector
    _out(s, 0x21, 0x04)  # ICW3: the second PIC is at IRQ 2
    _out(s, 0x21, 0x01)  # ICW4: 8086 mode
    _out(s, 0x21, 0xFE)  # mask: all but IRQ 0
    _out(s, 0xA1, 0xFF)  # second PIC: all masked
    _out(s, 0x43, 0x34)  # PIT channel 0, low byte then high byte, mode 2 (rate generator)
    _out(s, 0x40, pit_divisor & 0xFF)
    _out(s, 0x40, pit_divisor >> 8)


def _out(s: Assembly, port: int, value: int) -> None:
    s.op(f"b0 imm8:{value}", f"mov al, {value}")
    s.op(f"e6 imm8:{port}", f"out {port}, al")


def _walk(s: Assembly, p: Parameters) -> None:
    s.op("31 db", "xor ebx, ebx")
    s.op("31 c9", "xor ecx, ecx")
    s.op("31 f6", "xor esi, esi")
    s.op("bd imm32:1", "mov ebp, 1")  # the first tick is heartbeat 0
    s.op(f"bf imm32:{p.start}", f"mov edi, {p.start}")
    s.op("eb rel8:pause", "jmp pause")

    s.label("walk")
    s.op("fe 07", "inc byte ptr [edi]")
    s.op("81 c7 imm32:4096", "add edi, 4096")
    s.op(f"81 ff imm32:{p.end}", f"cmp edi, {p.end}")
    s.op("72 rel8:spend", "jb spend")
    s.op(f"bf imm32:{p.start}", f"mov edi, {p.start}")
    s.label("spend")
    # Signed: a tick may put 0 here at any moment, and the budget is then -1, not four billion.
    s.op("49", "dec ecx")
    s.op("7f rel8:walk", "jg walk")
    pause(s)


def pause(s: Assembly) -> None:
    """Append ``pause``: halts while no page is left in ecx, and then goes to ``walk``."""
    s.label("pause")
    s.op("fa", "cli")
    s.op("85 c9", "test ecx, ecx")
    s.op("7f rel8:resume", "jg resume")
    s.op("fb", "sti")  # takes effect after hlt: no tick can slip in between
    s.op("f4", "hlt")
    s.op("eb rel8:pause", "jmp pause")
    s.label("resume")
    s.op("fb", "sti")
    s.op("eb rel8:walk", "jmp walk")


def _tick(s: Assembly, p: Parameters) -> None:
    s.label("tick")
    end_of_interrupt(s)
    if p.dma:
        s.op("e8 rel32:run_edu", "call run_edu")
    heartbeat(s, p.ticks_per_heartbeat)
    s.op(f"81 c6 imm32:{p.budget_fraction}", f"add esi, {p.budget_fraction}")
    s.op(f"b9 imm32:{p.budget}", f"mov ecx, {p.budget}")  # leaves the carry alone
    s.op("83 d1 00", "adc ecx, 0")
    return_from_interrupt(s)
    put(s)


def end_of_interrupt(s: Assembly) -> None:
    """Append the word to the first PIC that another one may come; changes al."""
    _out(s, 0x20, 0x20)


def heartbeat(s: Assembly, ticks: int) -> None:
    """Append: every so many ticks, say the number in ebx and add one to it.

    :param ticks: of which ebp has those that are left

    Needs ``put``; changes eax, ecx and edx.
    """
    s.op("4d", "dec ebp")
    s.op("75 rel8:refill", "jnz refill")
    s.op(f"bd imm32:{ticks}", f"mov ebp, {ticks}")
    say_number(s)
    s.label("refill")


def say_number(s: Assembly) -> None:
    """Append: say the number in ebx, a heartbeat, and add one to it.

    Needs ``put``; changes eax, ecx and edx.
    """
    s.op("b9 imm32:8", "mov ecx, 8")
    s.label("digit")
    s.op("c1 c3 04", "rol ebx, 4")  # eight of these leave ebx as it was
    s.op("88 d8", "mov al, bl")
    s.op("24 0f", "and al, 0x0f")
    s.op("04 30", "add al, '0'")
    s.op("3c 39", "cmp al, '9'")
    s.op("76 rel8:decimal", "jbe decimal")
    s.op("04 27", "add al, 'a' - '9' - 1")
    s.label("decimal")
    s.op("e8 rel32:put", "call put")
    s.op("e2 rel8:digit", "loop digit")
    s.op("b0 0a", "mov al, 10")
    s.op("e8 rel32:put", "call put")
    s.op("43", "inc ebx")


def return_from_interrupt(s: Assembly) -> None:
    """Append ``ignore``, the end of every handler: back to where it interrupted."""
    s.label("ignore")
    # What iretd does within one ring. KVM's instruction emulator, which is all that runs guests on
    # some nested hosts, has no protected-mode iretd (arch/x86/kvm/emulate.c, em_iret).
    s.op("ff 74 24 08", "push dword ptr [esp + 8]")  # the flags, from below the return address
    s.op("80 64 24 01 fd", "and byte ptr [esp + 1], 0xfd")  # with interrupts still off,
    s.op("9d", "popfd")
    s.op("fb", "sti")  # until after the next instruction
    s.op("c2 imm16:8", "ret 8")


def put(s: Assembly) -> None:
    """Append ``put``, which writes al to COM1; changes ah and edx."""
    s.label("put")
    s.op("88 c4", "mov ah, al")
    s.op("66 ba imm16:1021", "mov dx, 0x3f8 + 5")
    s.label("busy")
    s.op("ec", "in al, dx")
    s.op("a8 20", "test al, 0x20")  # line status: the transmitter takes another byte
    s.op("74 rel8:busy", "jz busy")
    s.op("88 e0", "mov al, ah")
    s.op("66 ba imm16:1016", "mov dx, 0x3f8")
    s.op("ee", "out dx, al")
    s.op("c3", "ret")


def segments(s: Assembly) -> None:
    """Append ``gdtr``, and the descriptors of the flat segments."""
    s.label("gdt")
    s.op("imm32:0 imm32:0", ".quad 0")
    # Base 0, limit 4 GiB, ring 0, already marked as accessed: the CPU need not write here.
    s.op("ff ff 00 00 00 9b cf 00", ".quad 0x00cf9b000000ffff")
    s.op("ff ff 00 00 00 93 cf 00", ".quad 0x00cf93000000ffff")
    s.label("gdtr")
    s.op("imm16:23 abs32:gdt", ".word 23; .long gdt")


def tables(s: Assembly) -> None:
    """Append the descriptors: of the segments, and of ``tick`` and ``ignore`` as handlers."""
    segments(s)
    # Only the first PIC's eight vectors have gates; IRQ 7 may come unasked ("spurious"). Anything
    # else is a fault of this program: it resets the machine, and the heartbeats start at 0 again.
    s.label("idt", -8 * _TICK_VECTOR)
    for vector in range(_TICK_VECTOR, _TICK_VECTOR + 8):
        handler = "tick" if vector == _TICK_VECTOR else "ignore"
        s.op(
            f"abs16:{handler} imm16:{_CODE} 00 8e 00 00",
            f".word {handler}, {_CODE}, 0x8e00, 0",
        )
    s.label("idtr")
    s.op("imm16:319 abs32:idt", ".word 319; .long idt")
