"""The workload guest's driver of QEMU's ``edu`` device, which writes guest RAM by DMA.

``edu`` (QEMU: ``docs/specs/edu.rst``, ``hw/misc/edu.c``) copies up to 4096 bytes between RAM and a
buffer of its own, about 100 ms after it is told to. The driver has two routines, both without
arguments:

``find_edu``
    looks for the device on PCI bus 0, lets it decode and master the bus, and starts the first
    transfer. Where there is none, it says :data:`NO_DEVICE` on COM1 and halts for ever, so that
    nobody takes a guest without a device for one whose device loses nothing.
``run_edu``
    called at every tick: if the device is idle, starts its next transfer. First, once a pass, a
    page in which each word is the number of the pass, from RAM into the buffer. Then from the
    buffer to each page of the region, in order, for ever.

The last of a page's 1024 words is left alone: up to QEMU 7.2 a transfer that reaches the very end
of the buffer is taken for one beyond it, and ends QEMU.

Everything is polled, no interrupt is asked for, and what was done last is read from the device's
command register. In RAM of its own the driver has the page that it fills and two words.
"""

from __future__ import annotations

from dataclasses import dataclass

from migrator.guest.assembler import Assembly

PAGE_SIZE = 4096
DMA_LIMIT = 256 << 20
"""Addresses for DMA are below this: the device has 28 address bits."""

WORDS = PAGE_SIZE // 4 - 1
"""So many words of each page are written, from its first on."""

NO_DEVICE = b"no edu"
"""The line that the guest writes, instead of heartbeats, where the device is missing."""

SOURCE = 0x5000
"""Guest-physical address of the page that goes into the device's buffer."""

BAR = 0x6000
"""Guest-physical address of the word that says where the device's registers are."""

COMMAND_REGISTER = 0x98
"""Offset in the device's registers; holds the command that was given last."""

RUN = 1
"""The bit of it that starts a transfer, and is there until it is done."""

_NEXT = 0x6004  # the page that the device writes next; with BAR at the far end of the stack's page
_BUFFER = 0x40000
_CONFIG_ADDRESS, _CONFIG_DATA = 0xCF8, 0xCFC
_ENABLE = 0x8000_0000
_BUS_END = _ENABLE + (1 << 16)
_FUNCTION = 1 << 8
_VENDOR_DEVICE = 0x11E8_1234
_COMMAND, _BAR0 = 0x04, 0x10  # in configuration space
_IDENTIFICATION = 0x0100_00ED
_SRC, _DST, _COUNT = 0x80, 0x88, 0x90
_TO_RAM = 2  # in the command, without it: from RAM


@dataclass(frozen=True)
class Region:
    """Where the device writes.

    :ivar start: guest-physical address of the first page
    :ivar end: guest-physical address after the last page
    """

    start: int
    end: int


def find_edu(s: Assembly, region: Region) -> None:
    """Append ``find_edu``: needs ``put``, which writes al to COM1; changes eax, ebx, edx, esi."""
    s.label("find_edu")
    s.op(f"bb imm32:{_ENABLE}", f"mov ebx, {_ENABLE}")
    s.label("probe")
    s.op("89 d8", "mov eax, ebx")
    s.op("e8 rel32:read_config", "call read_config")
    s.op(f"3d imm32:{_VENDOR_DEVICE}", f"cmp eax, {_VENDOR_DEVICE}")
    s.op("74 rel8:found", "je found")
    s.op(f"81 c3 imm32:{_FUNCTION}", f"add ebx, {_FUNCTION}")
    s.op(f"81 fb imm32:{_BUS_END}", f"cmp ebx, {_BUS_END}")
    s.op("72 rel8:probe", "jb probe")

    s.label("missing")
    s.op("be abs32:no_edu", "mov esi, offset no_edu")
    s.label("say")
    s.op("ac", "lodsb")
    s.op("84 c0", "test al, al")
    s.op("74 rel8:halt", "jz halt")
    s.op("e8 rel32:put", "call put")
    s.op("eb rel8:say", "jmp say")
    s.label("halt")
    s.op("f4", "hlt")  # interrupts are off
    s.op("eb rel8:halt", "jmp halt")
    s.label("no_edu")
    text = NO_DEVICE + b"\n\0"
    s.op(text.hex(" "), f".byte {', '.join(map(str, text))}")

    s.label("found")
    s.op(f"8d 43 {_COMMAND:02x}", f"lea eax, [ebx + {_COMMAND}]")
    s.op("e8 rel32:read_config", "call read_config")
    s.op("0c 06", "or al, 6")  # memory space, bus master
    # 16 bits: ones written to the other half, the status, would clear it.
    s.op("66 ef", "out dx, ax")
    s.op(f"8d 43 {_BAR0:02x}", f"lea eax, [ebx + {_BAR0}]")
    s.op("e8 rel32:read_config", "call read_config")
    s.op("24 f0", "and al, 0xf0")  # the flags of the BAR
    s.op(f"a3 imm32:{BAR}", f"mov dword ptr ds:[{BAR}], eax")
    s.op(f"81 38 imm32:{_IDENTIFICATION}", f"cmp dword ptr [eax], {_IDENTIFICATION}")
    s.op("75 rel8:missing", "jne missing")
    # A reset of the machine does not reset the device: it may be busy still.
    s.label("unfinished")
    _test_command(s, "eax", RUN)
    s.op("75 rel8:unfinished", "jnz unfinished")
    s.op("89 c2", "mov edx, eax")
    s.op(f"c7 05 imm32:{SOURCE} imm32:0", f"mov dword ptr ds:[{SOURCE}], 0")
    s.op(f"c7 05 imm32:{_NEXT} imm32:{region.start}", f"mov dword ptr ds:[{_NEXT}], {region.start}")
    s.op("60", "pusha")
    s.op("eb rel8:fetch", "jmp fetch")

    s.label("read_config")  # the word at address eax, into eax; leaves its data port in dx
    s.op(f"66 ba imm16:{_CONFIG_ADDRESS}", f"mov dx, {_CONFIG_ADDRESS}")
    s.op("ef", "out dx, eax")
    s.op(f"66 ba imm16:{_CONFIG_DATA}", f"mov dx, {_CONFIG_DATA}")
    s.op("ed", "in eax, dx")
    s.op("c3", "ret")


def run_edu(s: Assembly, region: Region) -> None:
    """Append ``run_edu``, which changes no register but the flags."""
    s.label("run_edu")
    s.op("60", "pusha")
    s.op(f"8b 15 imm32:{BAR}", f"mov edx, dword ptr ds:[{BAR}]")
    _test_command(s, "edx", RUN)
    s.op("0f 85 rel32:started", "jnz started")
    s.op(f"8b 3d imm32:{_NEXT}", f"mov edi, dword ptr ds:[{_NEXT}]")
    _test_command(s, "edx", _TO_RAM)
    s.op("74 rel8:write", "jz write")  # the buffer has just been filled
    s.op(f"81 ff imm32:{region.start}", f"cmp edi, {region.start}")
    s.op("75 rel8:write", "jne write")

    s.label("fetch")
    s.op(f"bf imm32:{SOURCE}", f"mov edi, {SOURCE}")
    s.op("8b 07", "mov eax, dword ptr [edi]")
    s.op("40", "inc eax")
    s.op(f"b9 imm32:{WORDS}", f"mov ecx, {WORDS}")
    s.op("fc", "cld")
    s.op("f3 ab", "rep stosd")
    _set(s, _SRC, SOURCE)
    _set(s, _DST, _BUFFER)
    _set(s, _COUNT, 4 * WORDS)
    _set(s, COMMAND_REGISTER, RUN)
    s.op("eb rel8:started", "jmp started")

    s.label("write")
    _set(s, _SRC, _BUFFER)
    s.op(f"89 ba imm32:{_DST}", f"mov dword ptr [edx + {_DST}], edi")
    _set(s, COMMAND_REGISTER, RUN | _TO_RAM)
    s.op(f"81 c7 imm32:{PAGE_SIZE}", f"add edi, {PAGE_SIZE}")
    s.op(f"81 ff imm32:{region.end}", f"cmp edi, {region.end}")
    s.op("72 rel8:advance", "jb advance")
    s.op(f"bf imm32:{region.start}", f"mov edi, {region.start}")
    s.label("advance")
    s.op(f"89 3d imm32:{_NEXT}", f"mov dword ptr ds:[{_NEXT}], edi")
    s.label("started")
    s.op("61", "popa")
    s.op("c3", "ret")


def _set(s: Assembly, register: int, value: int) -> None:
    s.op(
        f"c7 82 imm32:{register} imm32:{value}",
        f"mov dword ptr [edx + {register}], {value}",
    )


def _test_command(s: Assembly, base: str, bits: int) -> None:
    modrm = {"eax": "80", "edx": "82"}[base]
    s.op(
        f"f7 {modrm} imm32:{COMMAND_REGISTER} imm32:{bits}",
        f"test dword ptr [{base} + {COMMAND_REGISTER}], {bits}",
    )
