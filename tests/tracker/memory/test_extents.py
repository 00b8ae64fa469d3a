"""Data and holes of real files, against asking for one page at a time."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hugepages import huge_pages
from tests.profiles import examples
from tests.tracker import naive
from tests.tracker.mapper import PAGE, Mapper, Ram, disk_directory, shm_directory
from tracker.errors import RamError
from tracker.memory.extents import data_pages
from tracker.memory.ram import RamBlock

NPAGES = 200  # three whole words, and some


@pytest.fixture(params=["tmpfs", "disk"])
def ram(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ram]:
    where = shm_directory() if request.param == "tmpfs" else disk_directory(tmp_path)
    with where as directory, contextlib.closing(_Closing(Ram(directory / "ram", NPAGES))) as it:
        yield it.ram


class _Closing:
    def __init__(self, ram: Ram) -> None:
        self.ram = ram

    def close(self) -> None:
        self.ram.end()


def found(ram: Ram) -> set[int]:
    with ram.path.open("rb") as file:
        data = data_pages(ram.pid, ram.block, file.fileno())
    assert data.npages == ram.npages
    return naive.pages_of(data.words)


@pytest.mark.parametrize(
    "pages",
    [set(), {0}, {NPAGES - 1}, {63, 64}, set(range(NPAGES)), set(range(0, NPAGES, 2)), {1, 2, 127}],
)
def test_what_was_written_is_data(ram: Ram, pages: set[int]) -> None:
    for page in pages:
        ram.write(page, b"x", offset=page % PAGE)
    before = ram.allocated()
    assert found(ram) == pages
    assert ram.allocated() == before


def test_at_random() -> None:
    with shm_directory() as directory, (directory / "ram").open("w+b") as file:
        fd = file.fileno()
        block = RamBlock("ram", NPAGES * PAGE, PAGE, 0, 0, 0)

        @settings(deadline=None, max_examples=examples(60))
        @given(st.sets(st.integers(0, NPAGES - 1)))
        def check(pages: set[int]) -> None:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, block.size)
            for page in pages:
                os.pwrite(fd, b"x", page * PAGE)
            data = naive.pages_of(data_pages(0, block, fd).words)
            assert data == pages == naive.data(fd, NPAGES, PAGE)

        check()


def test_pages_of_zeros_are_data(ram: Ram) -> None:
    ram.fill(5, 0)
    assert found(ram) == {5}


def test_pages_that_were_written_through_the_mapping(ram: Ram) -> None:
    ram.mapper(f"write({ram.hva + 7 * PAGE + 9}, 1)")
    assert found(ram) == {7}


def test_discarded_pages_are_holes(ram: Ram) -> None:
    for page in range(10):
        ram.fill(page, 1)
    ram.punch(3, 2)
    assert found(ram) == {0, 1, 2, 5, 6, 7, 8, 9}


def test_data_beyond_the_block_are_not_its_own(ram: Ram) -> None:
    """As when the file is longer than the memory backend."""
    os.truncate(ram.path, (NPAGES + 64) * PAGE)
    with ram.path.open("r+b") as file:
        file.seek((NPAGES - 1) * PAGE)
        file.write(bytes([1]) * 3 * PAGE)
    assert found(ram) == {NPAGES - 1}


def test_a_file_that_became_shorter(ram: Ram) -> None:
    os.truncate(ram.path, ram.size - 1)
    with pytest.raises(RamError, match="shorter"):
        found(ram)


def test_a_file_that_cannot_be_asked(ram: Ram) -> None:
    fd = os.open(ram.path, os.O_PATH)
    try:
        with pytest.raises(OSError, match="SEEK_DATA"):
            data_pages(ram.pid, ram.block, fd)
    finally:
        os.close(fd)


# -- huge pages ---------------------------------------------------------------------------------

HUGE = 2 << 20


@pytest.fixture
def pool() -> Iterator[None]:
    """Four huge pages of 2 MiB that are free."""
    with huge_pages(4):
        yield


@pytest.fixture
def huge(pool: None) -> Iterator[tuple[Mapper, RamBlock, int]]:
    """Four huge pages: a process that maps them, the block, and a descriptor of their file."""
    fd = os.memfd_create("ram", os.MFD_HUGETLB)
    try:
        os.ftruncate(fd, 4 * HUGE)
        with Mapper() as mapper:
            # aligned: its own reservation is not
            space = mapper(f"reserve({5 * HUGE})")
            hva = mapper.map(
                f"/proc/{os.getpid()}/fd/{fd}", 4 * HUGE, at=(space + HUGE - 1) // HUGE * HUGE
            )
            status = os.fstat(fd)
            block = RamBlock("ram", 4 * HUGE, HUGE, hva, status.st_dev, status.st_ino)
            assert block.is_hugetlb
            yield mapper, block, fd
    finally:
        os.close(fd)


def test_huge_pages_that_were_touched_are_data(huge: tuple[Mapper, RamBlock, int]) -> None:
    mapper, block, fd = huge
    assert not data_pages(mapper.pid, block, fd).any()
    mapper(f"write({block.hva + 2 * HUGE + 5}, 1)")
    mapper(f"read({block.hva + 3 * HUGE})")
    assert naive.pages_of(data_pages(mapper.pid, block, fd).words) == {2, 3}
    subprocess.run(
        ["fallocate", "-p", "-o", str(2 * HUGE), "-l", str(HUGE), f"/proc/{os.getpid()}/fd/{fd}"],
        check=True,
    )
    assert naive.pages_of(data_pages(mapper.pid, block, fd).words) == {3}


def test_huge_pages_of_somebody_else_are_not_taken_for_holes(
    huge: tuple[Mapper, RamBlock, int],
) -> None:
    mapper, block, fd = huge
    mapper(f"write({block.hva}, 1)")
    with mmap.mmap(fd, 4 * HUGE) as ours:
        ours[HUGE] = 1
        with pytest.raises(RamError, match="1 huge pages that QEMU does not map"):
            data_pages(mapper.pid, block, fd)
    mapper(f"read({block.hva + HUGE})")
    assert naive.pages_of(data_pages(mapper.pid, block, fd).words) == {0, 1}
