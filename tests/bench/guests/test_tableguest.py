"""The synthetic guests' machine code, table and oracle, without a guest."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.guests import patterns, tableguest
from bench.guests.patterns import INCREMENT, READ, REWRITE, Pattern, Stage
from bench.guests.tableguest import (
    COUNTER,
    START,
    TABLE,
    Program,
    assemble,
    listing,
    problem,
    table,
)
from migrator.guest.assembler import SECTOR_SIZE
from migrator.guest.bootsector import Parameters
from migrator.guest.workload import PAGE_SIZE
from tests.conftest import require

# Numbers too wide for a sign-extended byte, as `as` would choose the shorter encoding for those.
_PACE = Parameters(START, 0x0567_8000, 0x9ABC, 0x1DEF, 0x2345_6789, 0x0BCD_EF01)
STEADY = Program(_PACE)
BURSTS = Program(_PACE, busy_ticks=0x1234, pause_ticks=0x0567)

PATTERN = (
    Stage(np.array([1, 0, 1], np.uint32), np.array([INCREMENT, REWRITE, READ], np.uint8), 7),
    Stage(np.array([2], np.uint32), np.array([INCREMENT], np.uint8)),
)


@pytest.mark.parametrize("program", [STEADY, BURSTS], ids=["steady", "bursts"])
def test_bytes_and_mnemonics_agree(tmp_path: Path, program: Program) -> None:
    for tool in ("as", "ld"):
        require(None if shutil.which(tool) else f"no {tool} (binutils)")
    source, elf, binary = (tmp_path / name for name in ("boot.s", "boot.o", "boot.bin"))
    source.write_text(listing(program))
    subprocess.run(["as", "--32", "-o", elf, source], check=True)
    link = ["ld", "-m", "elf_i386", "-Ttext=0x7c00", "-e", "0x7c00", "--oformat", "binary"]
    subprocess.run([*link, "-o", binary, elf], check=True)
    code = assemble(program)
    assert len(code) == SECTOR_SIZE
    assert code == binary.read_bytes()


def test_the_table_by_hand() -> None:
    first, second = TABLE, TABLE + 8 * 4
    expected = [
        *[START + PAGE_SIZE + INCREMENT, START + REWRITE, START + PAGE_SIZE + READ],
        *[3, 7, 7, first, second],
        START + 2 * PAGE_SIZE,
        *[3, 1, 1, second, first],
    ]
    assert np.frombuffer(table(PATTERN), "<u4").tolist() == expected


def test_a_table_too_long_is_refused() -> None:
    npages = (START - TABLE) // 4 - 5
    assert len(table(patterns.make("sequential", npages, 0))) == START - TABLE
    with pytest.raises(ValueError, match="make the working set smaller"):
        table(patterns.make("sequential", npages + 1, 0))


# -- the oracle: a guest of four pages, one access after the other ------------------------------


def filled() -> NDArray[np.uint8]:
    """The guest's RAM before its first access, made one word after the other."""
    ram = np.zeros(START + 4 * PAGE_SIZE, np.uint8)
    for page in range(START, len(ram), PAGE_SIZE):
        word = page
        for at in range(page, page + PAGE_SIZE, 4):
            word = (word * 1_664_525 + 1_013_904_223) % (1 << 32)
            ram[at : at + 4] = np.frombuffer(word.to_bytes(4, "little"), np.uint8)
    return ram


def after(accesses: int, pattern: Pattern = PATTERN) -> NDArray[np.uint8]:
    ram = filled()
    ram[COUNTER : COUNTER + 8] = np.frombuffer(accesses.to_bytes(8, "little"), np.uint8)
    for number in range(accesses):
        page, kind = patterns.at(pattern, number)
        ram[START + page * PAGE_SIZE] += kind == INCREMENT
    return ram


@pytest.mark.parametrize("accesses", [0, 1, 2, 3, 20, 21, 22, 23, 300])
def test_what_the_walk_leaves(accesses: int) -> None:
    ram = after(accesses)
    assert tableguest.accesses(ram) == accesses
    assert problem(ram, PATTERN, 4) == ""
    page, kind = patterns.at(PATTERN, accesses)  # the next: made, but not counted yet
    ram[START + page * PAGE_SIZE] += 1
    assert (problem(ram, PATTERN, 4) == "") == (kind == INCREMENT)


@pytest.mark.parametrize("at", [0, 1, PAGE_SIZE - 1])
@pytest.mark.parametrize("page", range(4))
@pytest.mark.parametrize("change", [-2, -1, 1, 2])
def test_any_other_byte_is_a_problem(page: int, at: int, change: int) -> None:
    ram = after(23)  # the next is a rewrite
    byte = START + page * PAGE_SIZE + at
    ram[byte] = (int(ram[byte]) + change) % 256
    assert f"1 pages are not as 23 accesses leave them; the first is page {page}" in problem(
        ram, PATTERN, 4
    )


def test_a_page_in_flight_is_still_looked_at() -> None:
    ram = after(21)  # the next increments page 2
    ram[START + 2 * PAGE_SIZE] += 1
    assert problem(ram, PATTERN, 4) == ""
    ram[START + 2 * PAGE_SIZE + 5] ^= 1
    assert "page 2" in problem(ram, PATTERN, 4)


@pytest.mark.parametrize("chunk", [1, 3])
def test_it_is_looked_at_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tableguest, "_CHUNK", chunk)
    ram = after(21)
    ram[START + 2 * PAGE_SIZE] += 1  # in flight
    assert problem(ram, PATTERN, 4) == ""
    ram[[START + 5, START + 3 * PAGE_SIZE + 7]] ^= 1
    assert "2 pages are not" in problem(ram, PATTERN, 4)


def test_ram_that_ends_too_early() -> None:
    with pytest.raises(ValueError, match="do not hold a working set"):
        problem(after(0)[:-1], PATTERN, 4)
