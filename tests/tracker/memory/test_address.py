"""Blocks are found by their address in real processes, whatever is mapped there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tracker.mapper import PAGE, Mapper, shm_directory
from tests.tracker.memory.test_ram import SIZE, make
from tracker.errors import MapChanged, RamError
from tracker.memory.address import check_mapped, find_block_at
from tracker.memory.ram import RamBlock, find_block

READ = 1


@pytest.fixture
def path() -> Iterator[Path]:
    with shm_directory() as directory:
        yield make(directory / "ram")


@pytest.fixture
def mapper() -> Iterator[Mapper]:
    with Mapper() as process:
        yield process


def anonymous(mapper: Mapper, size: int = SIZE) -> int:
    return int(mapper(f"reserve({size} + 8192) + 4096"))  # with neighbours of its own kind


def writable(mapper: Mapper, size: int = SIZE) -> int:
    start = anonymous(mapper, size)
    mapper(f"protect({start} - 4096, {size} + 8192, 3)")
    return start


def test_private_memory(mapper: Mapper) -> None:
    hva = writable(mapper)
    block = find_block_at(mapper.pid, "ram", SIZE, hva)
    assert block == RamBlock("ram", SIZE, PAGE, hva, 0, 0)
    assert not block.has_file
    check_mapped(mapper.pid, block)


def test_private_memory_in_several_mappings(mapper: Mapper) -> None:
    """As advice to the kernel cuts it."""
    hva = writable(mapper)
    mapper(f"advise({hva + PAGE}, {PAGE}, 10)")  # MADV_DONTFORK
    assert find_block_at(mapper.pid, "ram", SIZE, hva).hva == hva


def test_a_shared_file(mapper: Mapper, path: Path) -> None:
    hva = mapper.map(path, SIZE)
    found = find_block_at(mapper.pid, "ram", SIZE, hva)
    assert found == find_block(mapper.pid, "ram", SIZE, str(path))
    assert found.has_file


def test_a_private_mapping_of_a_file_has_no_file(mapper: Mapper, path: Path) -> None:
    hva = mapper.map(path, SIZE, shared=False)
    assert not find_block_at(mapper.pid, "ram", SIZE, hva).has_file


def test_shared_memory_whose_file_nobody_holds(mapper: Mapper) -> None:
    start = anonymous(mapper)
    flags = 0x1 | 0x20 | 0x10  # MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED
    hva = int(mapper(f"libc.mmap(word({start}), word({SIZE}), 3, {flags}, -1, word(0))"))
    assert not find_block_at(mapper.pid, "ram", SIZE, hva).has_file


def test_a_file_that_is_mapped_twice_is_refused(mapper: Mapper, path: Path) -> None:
    hva = mapper.map(path, SIZE)
    mapper.map(path, SIZE)
    with pytest.raises(RamError, match="second time"):
        find_block_at(mapper.pid, "ram", SIZE, hva)


def test_what_cannot_be_ram(mapper: Mapper, path: Path) -> None:
    hva = writable(mapper)
    mapper(f"protect({hva + PAGE}, {PAGE}, {READ})")
    with pytest.raises(RamError, match="is mapped r--p"):
        find_block_at(mapper.pid, "ram", SIZE, hva)
    mapper(f"unmap({hva + PAGE}, {PAGE})")
    with pytest.raises(RamError, match=f"is not mapped at {hva + PAGE:#x}"):
        find_block_at(mapper.pid, "ram", SIZE, hva)
    fd = mapper.open(path)
    mapper(f"map_({fd}, {PAGE}, at={hva + PAGE})")
    with pytest.raises(RamError, match="in part shared, in part private"):
        find_block_at(mapper.pid, "ram", SIZE, hva)


def test_nothing_is_there(mapper: Mapper) -> None:
    hva = writable(mapper)
    mapper(f"unmap({hva - PAGE}, {SIZE + 2 * PAGE})")
    with pytest.raises(RamError, match="is not mapped at"):
        find_block_at(mapper.pid, "ram", SIZE, hva)


def test_memory_that_goes_away(mapper: Mapper) -> None:
    hva = writable(mapper)
    block = find_block_at(mapper.pid, "ram", SIZE, hva)
    mapper(f"unmap({hva + SIZE - PAGE}, {PAGE})")
    with pytest.raises(MapChanged, match="is not mapped at"):
        check_mapped(mapper.pid, block)
    mapper.end()
    with pytest.raises((MapChanged, OSError)):
        check_mapped(mapper.pid, block)
