"""A guest that reads a disk by DMA for ever, and a test VM with it.

A boot sector like that of :mod:`migrator.guest.bootsector`, for a PC with i440fx and PIIX3
(``-machine pc``). It reads from the second disk of the first IDE channel, by bus mastering: places
on the disk, one after the other, into places in memory, one after the other; each over again from
the first when the last was reached. One heartbeat comes every so many reads, so a guest whose read
stays in flight has none. If a read fails it writes ``!`` and halts.

It never uses an interrupt: it looks at the controller's status now and then. Registers:

====  =====================================  ====  =====================================
ebx   the next heartbeat's number            edi   where in memory the next read goes
ebp   the bus master's first port            esi   where on the disk it comes from: a sector
====  =====================================  ====  =====================================

Memory written by the processor: the bus master's table of one entry, the reads until the next
heartbeat, and a few bytes of stack, all in one page.

Bus mastering as in "Programming Interface for Bus Master IDE Controller", revision 1.0; QEMU:
hw/ide/piix.c, hw/ide/pci.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from migrator.guest import bootsector
from migrator.guest.assembler import SECTOR_SIZE, Assembly
from migrator.guest.workload import IMAGE_BYTES, MIB, PAGE_SIZE
from tests.live.vms import Machine

TABLE = 0x6000
"""Guest-physical address of the page that the processor writes."""

_READS_LEFT = TABLE + 8
_BMIDE = 0x8000_0920  # PCI configuration address of 00:01.1, its base address 4
_COMMAND = 0x8000_0904  # its command register
_SLAVE = 0xF0  # of the channel, addressed by sector number
_READ_DMA = 0xC8
_PAUSE = 2000  # turns of a loop between two looks at the status


@dataclass(frozen=True)
class Reading:
    """What the guest does.

    :ivar start: guest-physical address of the memory that it reads into, a multiple of
        ``read_bytes``
    :ivar length: of that memory in bytes, likewise
    :ivar read_bytes: of one read: 4, 8, 16 or 32 KiB. What is not whole pages, QEMU would not read
        past the page cache straight into the guest's memory; and what an entry of the bus master's
        table describes may not cross a multiple of 64 KiB.
    :ivar disk_bytes: how much of the disk it reads, a multiple of ``read_bytes``
    :ivar reads_per_heartbeat: at least 1
    """

    start: int = 16 * MIB
    length: int = 16 * MIB
    read_bytes: int = 8 * PAGE_SIZE
    disk_bytes: int = MIB
    reads_per_heartbeat: int = 4

    def __post_init__(self) -> None:
        assert self.read_bytes in (PAGE_SIZE, 2 * PAGE_SIZE, 4 * PAGE_SIZE, 8 * PAGE_SIZE)
        assert self.start % self.read_bytes == 0
        assert self.length > 0
        assert self.length % self.read_bytes == 0
        assert 0 < self.disk_bytes < (1 << 24) * SECTOR_SIZE
        assert self.disk_bytes % self.read_bytes == 0
        assert self.reads_per_heartbeat > 0

    @property
    def end(self) -> int:
        """Guest-physical address after the last page."""
        return self.start + self.length


_READING = Reading()


@dataclass(frozen=True)
class Reader(Machine):
    """A test VM with this guest in it.

    Source and destination read the same disk. Start and end it while the disk answers: the guest's
    heart does not beat while its read is in flight, and QEMU stops a guest, and answers then, once
    nothing is in flight any more.

    :ivar disk: path of a raw image of at least ``reading.disk_bytes``
    :ivar direct: whether QEMU reads it past the page cache
    :ivar on_error: what becomes of a read that fails: QEMU's ``rerror``
    """

    memory: int = 64 * MIB
    machine: str = "pc"
    disk: str = ""
    direct: bool = True
    on_error: str = "report"
    reading: Reading = _READING

    def arguments(self, image: Path, console: Path, *, destination: bool = False) -> list[str]:
        ours = image.with_name("reader.img")
        if not ours.exists():
            ours.write_bytes(boot_image(self.reading))
        cache = "none" if self.direct else "writeback"
        return [
            *super().arguments(ours, console, destination=destination),
            "-drive",
            f"if=ide,index=1,id=slow,format=raw,cache={cache},rerror={self.on_error},"
            f"file.locking=off,file={self.disk}",
        ]


def boot_image(reading: Reading) -> bytes:
    """Make the disk that the guest boots from, a raw image."""
    return _program(reading).finish(SECTOR_SIZE).ljust(IMAGE_BYTES, b"\0")


def listing(reading: Reading) -> str:
    """Give the program as source for GNU ``as``, to be linked at 0x7C00."""
    return "\n".join([".intel_syntax noprefix", *_program(reading).listing, ""])


def _program(r: Reading) -> Assembly:
    s = Assembly(bootsector.ORIGIN)
    s.listing.append(".code16")
    bootsector.enter_protected_mode(s)
    _find_bus_master(s)
    _read_for_ever(s, r)
    _heartbeat(s, r)
    bootsector.put(s)
    bootsector.segments(s)
    # no gates: a fault resets the machine, and the heartbeats start at 0 again
    s.label("idtr")
    s.op("imm16:0 imm32:0", ".word 0; .long 0")
    s.end_boot_sector()
    return s


def _find_bus_master(s: Assembly) -> None:
    s.op("66 ba imm16:3320", "mov dx, 0xcf8")
    s.op(f"b8 imm32:{_COMMAND}", f"mov eax, {_COMMAND}")
    s.op("ef", "out dx, eax")
    s.op("b2 fc", "mov dl, 0xfc")
    s.op("ed", "in eax, dx")
    s.op("0c 05", "or al, 5")  # its ports are on, and it may be master
    s.op("66 ef", "out dx, ax")
    s.op("b2 f8", "mov dl, 0xf8")
    s.op(f"b8 imm32:{_BMIDE}", f"mov eax, {_BMIDE}")
    s.op("ef", "out dx, eax")
    s.op("b2 fc", "mov dl, 0xfc")
    s.op("ed", "in eax, dx")
    s.op("24 fc", "and al, 0xfc")  # the lowest bits say that it is a port
    s.op("89 c5", "mov ebp, eax")


def _read_for_ever(s: Assembly, r: Reading) -> None:
    s.op("31 db", "xor ebx, ebx")
    s.op(f"c7 05 imm32:{_READS_LEFT} imm32:1", f"mov dword ptr [{_READS_LEFT}], 1")
    s.op(f"bf imm32:{r.start}", f"mov edi, {r.start}")
    s.op("31 f6", "xor esi, esi")

    s.label("read")
    # the table: where to, how many bytes, and that this is the last entry
    s.op(f"89 3d imm32:{TABLE}", f"mov [{TABLE}], edi")
    entry = 1 << 31 | r.read_bytes
    s.op(f"c7 05 imm32:{TABLE + 4} imm32:{entry}", f"mov dword ptr [{TABLE + 4}], {entry}")
    _bus_master(s, 0, 8)  # stopped; from the disk to memory
    _bus_master(s, 2, 6)  # forget the last interrupt, and error
    s.op("8d 55 04", "lea edx, [ebp + 4]")
    s.op(f"b8 imm32:{TABLE}", f"mov eax, {TABLE}")
    s.op("ef", "out dx, eax")

    s.op("66 ba imm16:502", "mov dx, 0x1f6")
    s.op(f"b0 imm8:{_SLAVE}", f"mov al, {_SLAVE}")
    s.op("ee", "out dx, al")
    s.op("b2 f2", "mov dl, 0xf2")
    s.op(f"b0 imm8:{r.read_bytes // SECTOR_SIZE}", f"mov al, {r.read_bytes // SECTOR_SIZE}")
    s.op("ee", "out dx, al")
    s.op("89 f0", "mov eax, esi")
    for register in (0xF3, 0xF4, 0xF5):
        s.op(f"b2 imm8:{register}", f"mov dl, {register}")
        s.op("ee", "out dx, al")
        s.op("c1 e8 08", "shr eax, 8")
    s.op("b2 f7", "mov dl, 0xf7")
    s.op(f"b0 imm8:{_READ_DMA}", f"mov al, {_READ_DMA}")
    s.op("ee", "out dx, al")
    _bus_master(s, 0, 9)  # go

    s.label("wait")
    s.op(f"b9 imm32:{_PAUSE}", f"mov ecx, {_PAUSE}")
    s.label("pause")
    s.op("e2 rel8:pause", "loop pause")
    s.op("8d 55 02", "lea edx, [ebp + 2]")
    s.op("ec", "in al, dx")
    s.op("a8 02", "test al, 2")
    s.op("75 rel8:failed", "jnz failed")
    s.op("a8 04", "test al, 4")  # the disk has raised its interrupt
    s.op("74 rel8:wait", "jz wait")
    _bus_master(s, 0, 0)
    s.op("66 ba imm16:503", "mov dx, 0x1f7")
    s.op("ec", "in al, dx")  # takes the interrupt back
    s.op("a8 01", "test al, 1")
    s.op("75 rel8:failed", "jnz failed")

    sectors = r.read_bytes // SECTOR_SIZE
    s.op(f"83 c6 imm8:{sectors}", f"add esi, {sectors}")
    s.op(f"81 fe imm32:{r.disk_bytes // SECTOR_SIZE}", f"cmp esi, {r.disk_bytes // SECTOR_SIZE}")
    s.op("72 rel8:memory", "jb memory")
    s.op("31 f6", "xor esi, esi")
    s.label("memory")
    s.op(f"81 c7 imm32:{r.read_bytes}", f"add edi, {r.read_bytes}")
    s.op(f"81 ff imm32:{r.end}", f"cmp edi, {r.end}")
    s.op("72 rel8:count", "jb count")
    s.op(f"bf imm32:{r.start}", f"mov edi, {r.start}")
    s.label("count")
    s.op(f"ff 0d imm32:{_READS_LEFT}", f"dec dword ptr [{_READS_LEFT}]")
    s.op("0f 85 rel32:read", "jnz read")


def _bus_master(s: Assembly, register: int, value: int) -> None:
    s.op(f"8d 55 imm8:{register}", f"lea edx, [ebp + {register}]" if register else "lea edx, [ebp]")
    s.op(f"b0 imm8:{value}", f"mov al, {value}")
    s.op("ee", "out dx, al")


def _heartbeat(s: Assembly, r: Reading) -> None:
    left = r.reads_per_heartbeat
    s.op(f"c7 05 imm32:{_READS_LEFT} imm32:{left}", f"mov dword ptr [{_READS_LEFT}], {left}")
    bootsector.say_number(s)
    s.op("e9 rel32:read", "jmp read")

    s.label("failed")
    s.op("b0 21", "mov al, '!'")
    s.op("e8 rel32:put", "call put")
    s.op("f4", "hlt")
