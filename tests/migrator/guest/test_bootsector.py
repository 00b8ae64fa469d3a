"""The machine code says what its mnemonics say."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from migrator.guest.assembler import SECTOR_SIZE, Assembly
from migrator.guest.bootsector import FULL_SPEED, Parameters, assemble, listing
from migrator.guest.edu import Region
from tests.conftest import require

# Numbers too wide for a sign-extended byte, as `as` would choose the shorter encoding for those.
PARAMETERS = Parameters(
    start=0x0123_4000,
    end=0x0567_8000,
    pit_divisor=0x9ABC,
    ticks_per_heartbeat=0x1DEF,
    budget=0x2345_6789,
    budget_fraction=0x0BCD_EF01,
)


WITH_DMA = replace(PARAMETERS, dma=Region(start=0x0890_1000, end=0x0ABC_D000))


def test_a_sector_with_the_boot_signature() -> None:
    sector = assemble(PARAMETERS)
    assert len(sector) == SECTOR_SIZE
    assert sector[-2:] == b"\x55\xaa"


def test_a_second_sector_where_a_device_is_to_write() -> None:
    sectors = assemble(WITH_DMA)
    assert len(sectors) == 2 * SECTOR_SIZE
    assert sectors[SECTOR_SIZE - 2 : SECTOR_SIZE] == b"\x55\xaa"
    assert any(sectors[SECTOR_SIZE:])


@pytest.mark.parametrize(
    ("parameters", "needle"),
    [
        (PARAMETERS, b"\xbf\x00\x40\x23\x01"),  # mov edi, start
        (PARAMETERS, b"\x81\xff\x00\x80\x67\x05"),  # cmp edi, end
        (PARAMETERS, b"\xb0\xbc\xe6\x40\xb0\x9a\xe6\x40"),  # PIT divisor, low byte first
        (PARAMETERS, b"\xbd\xef\x1d\x00\x00"),  # mov ebp, ticks
        (PARAMETERS, b"\xb9\x89\x67\x45\x23"),  # mov ecx, budget
        (PARAMETERS, b"\x81\xc6\x01\xef\xcd\x0b"),  # add esi, fraction
        (WITH_DMA, b"\xbf\x00\x40\x23\x01"),
        (WITH_DMA, b"\xbf\x00\x10\x90\x08"),  # mov edi, region start
        (WITH_DMA, b"\x81\xff\x00\xd0\xbc\x0a"),  # cmp edi, region end
        (Parameters(0x100000, 0x101000, 1, 1, FULL_SPEED, 0), b"\xb9\xff\xff\xff\x7f"),
    ],
)
def test_parameters_are_in_the_code(parameters: Parameters, needle: bytes) -> None:
    assert needle in assemble(parameters)


@pytest.mark.parametrize("parameters", [PARAMETERS, WITH_DMA], ids=["plain", "dma"])
def test_bytes_and_mnemonics_agree(tmp_path: Path, parameters: Parameters) -> None:
    for tool in ("as", "ld"):
        require(None if shutil.which(tool) else f"no {tool} (binutils)")
    source, elf, binary = (tmp_path / name for name in ("boot.s", "boot.o", "boot.bin"))
    source.write_text(listing(parameters))
    subprocess.run(["as", "--32", "-o", elf, source], check=True)
    link = ["ld", "-m", "elf_i386", "-Ttext=0x7c00", "-e", "0x7c00", "--oformat", "binary"]
    subprocess.run([*link, "-o", binary, elf], check=True)
    code = assemble(parameters)
    assert len(code.rstrip(b"\0")) > 300
    assert code == binary.read_bytes().ljust(len(code), b"\0")


def test_what_does_not_fit_is_refused() -> None:
    code = Assembly(origin=0)
    for _ in range(SECTOR_SIZE - 2):
        code.op("90", "nop")
    code.end_boot_sector()
    assert code.finish(SECTOR_SIZE) == b"\x90" * (SECTOR_SIZE - 2) + b"\x55\xaa"
    code.op("90", "nop")
    with pytest.raises(ValueError, match="513 bytes of code do not fit 512"):
        code.finish(SECTOR_SIZE)
    with pytest.raises(ValueError, match="513 bytes of code do not fit 510"):
        code.end_boot_sector()
