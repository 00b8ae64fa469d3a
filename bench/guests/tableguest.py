"""The machine code of the synthetic guests: one program that walks over a table of pages.

A boot sector like that of :mod:`migrator.guest.bootsector`, of whose parts it is made. The table
(:func:`table`) is put into RAM by QEMU before the guest runs. The guest fills its working set with
bytes that hardly compress, and then lives in two places only:

``walk``
    the main loop: takes the next entry from the table, increments, rewrites or reads the first
    byte of the page that it names, and counts that, while the budget of this tick lasts;
``tick``
    the handler of the timer interrupt: heartbeats, and the walk's next budget, which is nothing
    where the guest pauses.

====  =====================================  ====  =====================================
ebx   the next heartbeat's number            esi   the next entry of the table
ecx   accesses left in this tick; <= 0:      edi   fraction of an access carried over
      none                                   ebp   ticks until the next heartbeat
mm0   accesses until now                     mm1   1
====  =====================================  ====  =====================================

An entry is the guest-physical address of a page, and in its lowest two bits what to do there. A
stage ends with a record of four words: 3 at an address of 0; how many more times the stage is to
be gone through; that number to begin with; where the stage begins; where the next one does.

Memory written: the working set; the page with the counter, which is the stack's; those of the
table with the ends of its stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.guests.patterns import INCREMENT, Pattern, at, increments
from migrator.guest import bootsector
from migrator.guest.assembler import SECTOR_SIZE, Assembly
from migrator.guest.workload import MIB, PAGE_SIZE

COUNTER = 0x6000
"""Guest-physical address of a little-endian u64: accesses until now. Written at once."""

TABLE = MIB
"""Guest-physical address of the table."""

START = 16 * MIB
"""Guest-physical address of the working set; the table ends below."""

_PHASE = COUNTER + 8  # ticks until the next burst
_CHUNK = 4096  # pages
_END = 3  # neither INCREMENT nor REWRITE nor READ
_END_WORDS = 5
_FACTOR, _SUMMAND = 1_664_525, 1_013_904_223  # a linear congruential generator's


@dataclass(frozen=True)
class Program:
    """The numbers in the code.

    :ivar pace: those that it shares with the built-in guest: its working set, ticks and budget
    :ivar busy_ticks: for so many ticks it has that budget,
    :ivar pause_ticks: and then none for so many
    """

    pace: bootsector.Parameters
    busy_ticks: int = 1
    pause_ticks: int = 0


def assemble(program: Program) -> bytes:
    """:return: the boot sector, 512 bytes ending in 55 AA."""
    return _code(program).finish(SECTOR_SIZE)


def listing(program: Program) -> str:
    """:return: the same program as source for GNU ``as``, to be linked at 0x7C00."""
    return "\n".join([".intel_syntax noprefix", *_code(program).listing, ""])


def table(pattern: Pattern) -> bytes:
    """Make the table, to be put at :data:`TABLE`.

    :raise ValueError: there is no room for it below the working set
    """
    words: list[NDArray[np.uint32]] = []
    starts = [TABLE]
    for stage in pattern:
        starts.append(starts[-1] + 4 * (len(stage) + _END_WORDS))
    for number, stage in enumerate(pattern):
        following = starts[(number + 1) % len(pattern)]
        end = [_END, stage.times, stage.times, starts[number], following]
        words += [START + stage.pages * PAGE_SIZE + stage.kinds, np.array(end, np.uint32)]
    if starts[-1] > START:
        raise ValueError(f"a table of {starts[-1] - TABLE} bytes: make the working set smaller")
    return np.concatenate(words).astype("<u4").tobytes()


def _code(p: Program) -> Assembly:
    s = Assembly(bootsector.ORIGIN)
    s.listing.append(".code16")
    bootsector.enter_protected_mode(s)
    _fill(s, p.pace.start, p.pace.end)
    bootsector.start_timer(s, p.pace.pit_divisor)
    _begin(s)
    _walk(s)
    _tick(s, p)
    bootsector.tables(s)
    s.end_boot_sector()
    return s


def _fill(s: Assembly, start: int, end: int) -> None:
    """Fill each page with the numbers that follow its own address; no two pages are alike."""
    s.op(f"bf imm32:{start}", f"mov edi, {start}")
    s.op("fc", "cld")
    s.label("fill")
    s.op("89 f8", "mov eax, edi")
    s.op(f"b9 imm32:{PAGE_SIZE // 4}", f"mov ecx, {PAGE_SIZE // 4}")
    s.label("filling")
    s.op(f"69 c0 imm32:{_FACTOR}", f"imul eax, eax, {_FACTOR}")
    s.op(f"05 imm32:{_SUMMAND}", f"add eax, {_SUMMAND}")
    s.op("ab", "stosd")
    s.op("e2 rel8:filling", "loop filling")
    s.op(f"81 ff imm32:{end}", f"cmp edi, {end}")
    s.op("72 rel8:fill", "jb fill")


def _begin(s: Assembly) -> None:
    s.op("31 db", "xor ebx, ebx")
    s.op("31 c9", "xor ecx, ecx")
    s.op("31 ff", "xor edi, edi")
    s.op("bd imm32:1", "mov ebp, 1")  # the first tick is heartbeat 0
    s.op(f"be imm32:{TABLE}", f"mov esi, {TABLE}")
    s.op("0f 6e cd", "movd mm1, ebp")
    s.op("0f 6e c1", "movd mm0, ecx")
    _store_counter(s)
    s.op(f"89 0d imm32:{_PHASE}", f"mov dword ptr ds:[{_PHASE}], ecx")
    s.op("eb rel8:pause", "jmp pause")


def _store_counter(s: Assembly) -> None:
    # all eight bytes at once, so that whoever reads them from outside never sees half a carry
    s.op(f"0f 7f 05 imm32:{COUNTER}", f"movq qword ptr ds:[{COUNTER}], mm0")


def _walk(s: Assembly) -> None:
    s.label("walk")
    s.op("8b 06", "mov eax, dword ptr [esi]")
    s.op("a8 03", "test al, 3")
    s.op("75 rel8:other", "jnz other")
    s.op("fe 00", "inc byte ptr [eax]")
    s.label("count")
    s.op("83 c6 04", "add esi, 4")
    s.op("0f d4 c1", "paddq mm0, mm1")
    _store_counter(s)
    # Signed: a tick may put 0 here at any moment, and the budget is then -1, not four billion.
    s.op("49", "dec ecx")
    s.op("7f rel8:walk", "jg walk")
    bootsector.pause(s)

    s.label("other")
    s.op("3c 03", "cmp al, 3")
    s.op("74 rel8:end", "je end")
    s.op("a8 01", "test al, 1")
    s.op("b0 00", "mov al, 0")
    s.op("8a 10", "mov dl, byte ptr [eax]")
    s.op("74 rel8:count", "jz count")
    s.op("88 10", "mov byte ptr [eax], dl")
    s.op("eb rel8:count", "jmp count")

    s.label("end")
    s.op("ff 4e 04", "dec dword ptr [esi + 4]")
    s.op("74 rel8:next", "jz next")
    s.op("8b 76 0c", "mov esi, dword ptr [esi + 12]")
    s.op("eb rel8:walk", "jmp walk")
    s.label("next")
    s.op("8b 46 08", "mov eax, dword ptr [esi + 8]")
    s.op("89 46 04", "mov dword ptr [esi + 4], eax")
    s.op("8b 76 10", "mov esi, dword ptr [esi + 16]")
    s.op("eb rel8:walk", "jmp walk")


def _tick(s: Assembly, p: Program) -> None:
    s.label("tick")
    s.op("50", "push eax")
    s.op("52", "push edx")
    bootsector.end_of_interrupt(s)
    bootsector.heartbeat(s, p.pace.ticks_per_heartbeat)
    if p.pause_ticks:
        _phase(s, p)
    s.op(f"81 c7 imm32:{p.pace.budget_fraction}", f"add edi, {p.pace.budget_fraction}")
    s.op(f"b9 imm32:{p.pace.budget}", f"mov ecx, {p.pace.budget}")  # leaves the carry alone
    s.op("83 d1 00", "adc ecx, 0")
    s.label("leave")
    s.op("5a", "pop edx")
    s.op("58", "pop eax")
    bootsector.return_from_interrupt(s)
    bootsector.put(s)


def _phase(s: Assembly, p: Program) -> None:
    period = p.busy_ticks + p.pause_ticks
    s.op("31 c9", "xor ecx, ecx")
    s.op(f"ff 0d imm32:{_PHASE}", f"dec dword ptr ds:[{_PHASE}]")
    s.op("79 rel8:counted", "jns counted")
    s.op(
        f"c7 05 imm32:{_PHASE} imm32:{period - 1}",
        f"mov dword ptr ds:[{_PHASE}], {period - 1}",
    )
    s.label("counted")
    s.op(
        f"81 3d imm32:{_PHASE} imm32:{p.pause_ticks}",
        f"cmp dword ptr ds:[{_PHASE}], {p.pause_ticks}",
    )
    s.op("72 rel8:leave", "jb leave")


def accesses(ram: NDArray[np.uint8]) -> int:
    """Read the counter.

    :param ram: shape (bytes,), the guest's RAM from guest-physical address 0 on
    """
    return int(np.ascontiguousarray(ram[COUNTER : COUNTER + 8]).view("<u8")[0])


def problem(ram: NDArray[np.uint8], pattern: Pattern, npages: int) -> str:
    """Look for anything in a stopped guest's working set that the walk does not leave.

    After so many accesses as it has counted, every byte of every page is known; but for the page
    of the next access, which may have been made and not counted yet.

    :param ram: shape (bytes,), the RAM from guest-physical address 0 on
    :param npages: of the working set
    :return: what is wrong; empty if nothing is
    :raise ValueError: the RAM ends before the working set does
    """
    end = START + npages * PAGE_SIZE
    if len(ram) < end:
        raise ValueError(f"{len(ram)} bytes of RAM do not hold a working set that ends at {end}")
    done = accesses(ram)
    counts = increments(pattern, npages, done)
    following, kind = at(pattern, done)
    wrong: list[int] = []
    for first in range(0, npages, _CHUNK):  # not all at once, which would take as much memory again
        pages = np.arange(first, min(first + _CHUNK, npages))
        found = ram[START + first * PAGE_SIZE :][: len(pages) * PAGE_SIZE].reshape(-1, PAGE_SIZE)
        expected = _filled(pages)
        expected[:, 0] += counts[pages].astype(np.uint8)
        in_flight = (pages == following) & (kind == INCREMENT) & (found[:, 0] != expected[:, 0])
        expected[in_flight, 0] += 1
        wrong += pages[(found != expected).any(axis=1)].tolist()
    if not wrong:
        return ""
    return f"{len(wrong)} pages are not as {done} accesses leave them; the first is page {wrong[0]}"


def _filled(pages: NDArray[np.int64]) -> NDArray[np.uint8]:
    """:return: shape (len(pages), PAGE_SIZE), as the guest leaves them before its first access."""
    words = np.empty((PAGE_SIZE // 4, len(pages)), "<u4")
    word = (START + pages * PAGE_SIZE).astype("<u4")
    for row in words:
        word = word * np.uint32(_FACTOR) + np.uint32(_SUMMAND)
        row[:] = word
    return np.ascontiguousarray(words.T).view(np.uint8)
