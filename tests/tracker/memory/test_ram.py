"""Blocks are found, watched and opened in real processes that map real files."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tracker.mapper import PAGE, Mapper, shm_directory, small_tmpfs
from tracker.errors import MapChanged, NotShared, RamError
from tracker.memory.ram import (
    GuestRange,
    Mapping,
    RamBlock,
    check_unmoved,
    find_block,
    mappings,
    open_file,
    other_mappers,
    parse_flat_view,
    parse_mappings,
)

SIZE = 16 * PAGE


@pytest.fixture
def directory() -> Iterator[Path]:
    with shm_directory() as path:
        yield path


@pytest.fixture
def path(directory: Path) -> Path:
    return make(directory / "ram")


@pytest.fixture
def mapper() -> Iterator[Mapper]:
    with Mapper() as process:
        yield process


def make(path: Path, size: int = SIZE) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


# -- /proc/PID/maps -----------------------------------------------------------------------------


def test_parse_mappings() -> None:
    text = (
        b"55d0c0a00000-55d0c0b00000 rw-p 00000000 00:00 0                          [heap]\n"
        b"7f0000000000-7f0040000000 rw-s 00010000 00:1b 15560    /dev/shm/with space (deleted)\n"
        b"7f0040000000-7f0040001000 ---p 00000000 00:00 0 \n"
        b"7f0040001000-7f0040002000 r--s 00000000 fd:10a 18446744073709551615 /a\\012b\xff\n"
    )
    assert parse_mappings(text) == [
        Mapping(0x55D0C0A00000, 0x55D0C0B00000, "rw-p", 0, 0, 0, "[heap]"),
        Mapping(
            *(0x7F0000000000, 0x7F0040000000, "rw-s", 0x10000),
            *(os.makedev(0, 0x1B), 15560, "/dev/shm/with space (deleted)"),
        ),
        Mapping(0x7F0040000000, 0x7F0040001000, "---p", 0, 0, 0, ""),
        Mapping(
            *(0x7F0040001000, 0x7F0040002000, "r--s", 0),
            *(os.makedev(0xFD, 0x10A), 2**64 - 1, os.fsdecode(b"/a\\012b\xff")),
        ),
    ]


def test_no_line_of_a_real_process_is_left_out(mapper: Mapper, path: Path) -> None:
    mapper.map(path, SIZE)
    lines = Path(f"/proc/{mapper.pid}/maps").read_text().splitlines()
    found = mappings(mapper.pid)
    assert len(found) == len(lines)
    for line, mapping in zip(lines, found, strict=True):
        addresses, permissions, offset, device, inode, *rest = line.split(None, 5)
        assert addresses == f"{mapping.start:08x}-{mapping.end:08x}"
        assert permissions == mapping.permissions
        assert int(offset, 16) == mapping.offset
        assert device == f"{os.major(mapping.device):02x}:{os.minor(mapping.device):02x}"
        assert (int(inode), rest) == (mapping.inode, [mapping.path] if mapping.path else [])
    assert [m.shared for m in found if m.path == str(path)] == [True]


def test_mappings_of_nobody() -> None:
    with pytest.raises(OSError, match="No such file"):
        mappings(2**22 + 1)  # more than any pid_max


# -- finding a block ----------------------------------------------------------------------------


def test_a_shared_file(mapper: Mapper, path: Path) -> None:
    hva = mapper.map(path, SIZE)
    block = find_block(mapper.pid, "ram", SIZE, str(path))
    status = path.stat()
    assert block == RamBlock("ram", SIZE, PAGE, hva, status.st_dev, status.st_ino)
    assert block.npages == 16
    assert not block.is_hugetlb


def test_a_private_mapping_is_refused(mapper: Mapper, path: Path) -> None:
    mapper.map(path, SIZE, shared=False)
    with pytest.raises(NotShared, match="share=on"):
        find_block(mapper.pid, "ram", SIZE, str(path))


def test_a_private_mapping_beside_a_shared_one_is_refused(mapper: Mapper, path: Path) -> None:
    mapper.map(path, SIZE)
    mapper.map(path, PAGE, shared=False)
    with pytest.raises(NotShared):
        find_block(mapper.pid, "ram", SIZE, str(path))


@pytest.mark.parametrize(("size", "offset"), [(SIZE, 0), (PAGE, 0), (PAGE, SIZE - PAGE)])
def test_a_second_mapping_is_refused(mapper: Mapper, path: Path, size: int, offset: int) -> None:
    mapper.map(path, SIZE)
    mapper.map(path, size, offset=offset)
    with pytest.raises(RamError, match=r"second time|starts \d+ bytes into|bytes are mapped"):
        find_block(mapper.pid, "ram", SIZE, str(path))


def test_a_mapping_that_starts_later_in_the_file_is_refused(mapper: Mapper, path: Path) -> None:
    mapper.map(path, SIZE - PAGE, offset=PAGE)
    with pytest.raises(RamError, match=f"starts {PAGE} bytes into the file"):
        find_block(mapper.pid, "ram", SIZE, str(path))


def test_a_mapping_that_is_too_short_is_refused(mapper: Mapper, path: Path) -> None:
    mapper.map(path, SIZE - PAGE)
    with pytest.raises(RamError, match=f"only {SIZE - PAGE} of its {SIZE} bytes"):
        find_block(mapper.pid, "ram", SIZE, str(path))


def test_a_mapping_that_is_longer_than_the_block(mapper: Mapper, path: Path) -> None:
    hva = mapper.map(path, SIZE)
    assert find_block(mapper.pid, "ram", SIZE - PAGE, str(path)).hva == hva


@pytest.mark.parametrize("split", ["advise({}, {}, 16)", "bind({}, {})"], ids=["madvise", "mbind"])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (5, 3), (15, 1)])
def test_one_mapping_in_several_lines(
    mapper: Mapper, path: Path, split: str, first: int, count: int
) -> None:
    hva = mapper.map(path, SIZE)
    try:
        mapper(split.format(hva + first * PAGE, count * PAGE))
    except OSError as error:  # a kernel without NUMA
        pytest.skip(str(error))
    lines = [m for m in mappings(mapper.pid) if m.path == str(path)]
    assert len(lines) > 1
    block = find_block(mapper.pid, "ram", SIZE, str(path))
    assert (block.hva, block.size) == (hva, SIZE)
    check_unmoved(mapper.pid, [block])


@pytest.mark.parametrize(("first", "count"), [(0, 16), (0, 1), (5, 3), (15, 1)])
def test_a_part_that_cannot_be_written_is_refused(
    mapper: Mapper, path: Path, first: int, count: int
) -> None:
    hva = mapper.map(path, SIZE)
    mapper(f"protect({hva + first * PAGE}, {count * PAGE}, 1)")
    with pytest.raises(RamError, match="is mapped r--s"):
        find_block(mapper.pid, "ram", SIZE, str(path))


@pytest.mark.parametrize("page", [0, 7, 15])
def test_a_part_that_is_not_mapped_is_refused(mapper: Mapper, path: Path, page: int) -> None:
    hva = mapper.map(path, SIZE)
    mapper(f"unmap({hva + page * PAGE}, {PAGE})")
    with pytest.raises(RamError):
        find_block(mapper.pid, "ram", SIZE, str(path))


@pytest.mark.parametrize("name", ["with space", "new\nline", "back\\slash", "\udcff", "a\rb"])
def test_strange_names(mapper: Mapper, directory: Path, name: str) -> None:
    path = make(directory / name)
    hva = mapper.map(path, SIZE)
    block = find_block(mapper.pid, "ram", SIZE, str(path))
    assert block.hva == hva
    check_unmoved(mapper.pid, [block])


def test_a_file_that_was_removed_is_not_found(mapper: Mapper, path: Path) -> None:
    mapper.map(path, SIZE)
    path.unlink()
    with pytest.raises(RamError, match="nothing of"):
        find_block(mapper.pid, "ram", SIZE, str(path))


def test_a_file_that_was_replaced_is_not_taken_for_the_old_one(mapper: Mapper, path: Path) -> None:
    mapper.map(path, SIZE)
    path.unlink()
    make(path)
    with pytest.raises(RamError, match="nothing of"):
        find_block(mapper.pid, "ram", SIZE, str(path))


def test_nothing_mapped(mapper: Mapper, path: Path) -> None:
    with pytest.raises(RamError, match=f"nothing of .*{path.name} is mapped in process"):
        find_block(mapper.pid, "ram", SIZE, str(path))


def nameless(mapper: Mapper, directory: Path, name: str) -> int:
    """Map a file as QEMU does when mem-path is a directory."""
    path = make(directory / f"qemu_back_mem.{name}.Qx3a9Z")
    hva = mapper.map(path, SIZE)
    path.unlink()
    return hva


@pytest.mark.parametrize("suffix", ["", "/", "//"])
@pytest.mark.parametrize("name", ["ram", "dimm-1", "/objects/ram"])
def test_a_nameless_file_in_a_directory(
    mapper: Mapper, directory: Path, name: str, suffix: str
) -> None:
    hva = nameless(mapper, directory, name.replace("/", "_"))
    nameless(mapper, directory, "another")
    nameless(mapper, directory, name.replace("/", "_") + "1")
    block = find_block(mapper.pid, name, SIZE, f"{directory}{suffix}")
    assert block.hva == hva
    check_unmoved(mapper.pid, [block])


def test_two_nameless_files_of_one_name_are_refused(mapper: Mapper, directory: Path) -> None:
    nameless(mapper, directory, "ram")
    nameless(mapper, directory, "ram")
    with pytest.raises(RamError, match=r"several files match|second time"):
        find_block(mapper.pid, "ram", SIZE, str(directory))


# -- watching it --------------------------------------------------------------------------------


@pytest.fixture
def block(mapper: Mapper, path: Path) -> RamBlock:
    mapper.map(path, SIZE)
    return find_block(mapper.pid, "ram", SIZE, str(path))


def test_unmoved(mapper: Mapper, block: RamBlock, directory: Path) -> None:
    mapper.map(make(directory / "other"), SIZE)
    check_unmoved(mapper.pid, [block])


@pytest.mark.parametrize(
    "change",
    [
        f"unmap({{}}, {SIZE})",
        f"unmap({{}}, {PAGE})",
        f"unmap({{}} + {SIZE - PAGE}, {PAGE})",
        f"unmap({{}} + 3 * {PAGE}, {PAGE})",
        f"move({{}}, {SIZE})",
        f"move({{}} + 3 * {PAGE}, {PAGE})",
        f"protect({{}} + 3 * {PAGE}, {PAGE}, 1)",
    ],
)
def test_changes(mapper: Mapper, block: RamBlock, change: str) -> None:
    mapper(change.format(block.hva))
    with pytest.raises(MapChanged) as caught:
        check_unmoved(mapper.pid, [block])
    assert caught.value.block == "ram"


def test_a_change_of_the_last_block_of_several(mapper: Mapper, directory: Path) -> None:
    blocks = []
    for name in "abc":
        path = make(directory / name)
        mapper.map(path, SIZE)
        blocks.append(find_block(mapper.pid, name, SIZE, str(path)))
    check_unmoved(mapper.pid, blocks)
    mapper(f"unmap({blocks[2].hva}, {SIZE})")
    with pytest.raises(MapChanged) as caught:
        check_unmoved(mapper.pid, blocks)
    assert caught.value.block == "c"


def test_mapped_a_second_time_meanwhile(mapper: Mapper, block: RamBlock, path: Path) -> None:
    mapper.map(path, PAGE)
    with pytest.raises(MapChanged):
        check_unmoved(mapper.pid, [block])


def test_another_file_in_its_place(mapper: Mapper, block: RamBlock, directory: Path) -> None:
    mapper.map(make(directory / "other"), SIZE, at=block.hva)
    with pytest.raises(MapChanged, match="no longer mapped"):
        check_unmoved(mapper.pid, [block])


def test_a_process_that_was_killed(mapper: Mapper, block: RamBlock) -> None:
    """Not waited for yet, as when it is the child of somebody else: its page tables look clean."""
    os.kill(mapper.pid, signal.SIGKILL)
    os.waitid(os.P_PID, mapper.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises((MapChanged, OSError)):
        check_unmoved(mapper.pid, [block])


# -- its file -----------------------------------------------------------------------------------


def test_the_file_is_opened_anew(mapper: Mapper, block: RamBlock, path: Path) -> None:
    path.unlink()
    fd = open_file(mapper.pid, block)
    try:
        status = os.fstat(fd)
        assert (status.st_dev, status.st_ino) == (block.device, block.inode)
        os.pwrite(fd, b"\x2a", 5 * PAGE)
        assert mapper(f"read({block.hva + 5 * PAGE})") == 0x2A
        os.lseek(fd, 7, os.SEEK_SET)  # a position of its own: QEMU's does not move
        positions = Path(f"/proc/{mapper.pid}/fdinfo").iterdir()
        assert all("pos:\t7\n" not in info.read_text() for info in positions)
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_a_file_whose_descriptor_was_closed(mapper: Mapper, path: Path) -> None:
    fd = mapper.open(path)
    mapper(f"map_({fd}, {SIZE})")
    block = find_block(mapper.pid, "ram", SIZE, str(path))
    mapper(f"os.close({fd})")
    with pytest.raises(RamError, match="holds no descriptor"):
        open_file(mapper.pid, block)


def test_a_file_that_became_shorter(mapper: Mapper, block: RamBlock, path: Path) -> None:
    os.truncate(path, SIZE - 1)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RamError, match="shorter"):
        open_file(mapper.pid, block)
    assert len(os.listdir("/proc/self/fd")) == before


def test_other_mappers(mapper: Mapper, block: RamBlock, path: Path, directory: Path) -> None:
    with Mapper() as other:
        other.map(make(directory / "other"), SIZE)
        assert other_mappers(mapper.pid, [block]) == []
        other.map(path, PAGE, offset=3 * PAGE)
        assert other_mappers(mapper.pid, [block]) == [(other.pid, "ram")]
        assert other_mappers(other.pid, [block]) == [(mapper.pid, "ram")]
    assert other_mappers(mapper.pid, [block]) == []


def test_the_same_inode_of_another_file_system_is_no_other_mapper(
    mapper: Mapper, tmp_path: Path
) -> None:
    with small_tmpfs(tmp_path / "a", "1m") as one, small_tmpfs(tmp_path / "b", "1m") as two:
        ours, theirs = make(one / "ram"), make(two / "ram")
        assert ours.stat().st_ino == theirs.stat().st_ino
        mapper.map(ours, SIZE)
        block = find_block(mapper.pid, "ram", SIZE, str(ours))
        with Mapper() as other:
            other.map(theirs, SIZE)
            assert other_mappers(mapper.pid, [block]) == []
            mapper.map(theirs, PAGE)  # nor is it a second mapping of ours
            check_unmoved(mapper.pid, [block])
        mapper.end()


# -- the guest's view ---------------------------------------------------------------------------

FLAT_VIEW = """\
FlatView #0
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-00000000ffffffff (prio 0, ram): not-this-one

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): ram KVM
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom KVM
  00000000000e0000-00000000000fffff (prio -1, rom): pc.bios @0000000000020000
  0000000000100000-000000007fffffff (prio 0, ram): ram @0000000000100000 KVM
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  0000000100000000-000000013fffffff (prio 0, ram): ram @0000000080000000
  0000000140000000-000000015fffffff (prio 0, ram): ram @00000000c0000000
  0000000160000000-00000001bfffffff (prio 0, ram): a name @00000000e0000000

FlatView #2
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, ram): nor-this
"""


def test_flat_view_with_a_hole_below_4_gib() -> None:
    assert parse_flat_view(FLAT_VIEW) == [
        GuestRange(0, 0xC0000, "ram", 0),
        GuestRange(0xC0000, 0x20000, "pc.rom", 0),
        GuestRange(0xE0000, 0x20000, "pc.bios", 0x20000),
        GuestRange(0x100000, 0x7FF00000, "ram", 0x100000),
        # the two neighbours, which follow each other in the block too, are one
        GuestRange(1 << 32, 0x60000000, "ram", 0x80000000),
        GuestRange(0x160000000, 0x60000000, "a name", 0xE0000000),
    ]


def test_neighbours_that_do_not_follow_each_other_in_the_block_stay_two() -> None:
    text = (
        ' AS "memory", root: system\n'
        "  0000000000000000-0000000000000fff (prio 0, ram): ram\n"
        "  0000000000001000-0000000000001fff (prio 0, ram): ram @0000000000002000\n"
        "  0000000000003000-0000000000003fff (prio 0, ram): ram @0000000000003000\n"
    )
    assert [(r.gpa, r.offset, r.size) for r in parse_flat_view(text)] == [
        (0, 0, PAGE),
        (PAGE, 2 * PAGE, PAGE),
        (3 * PAGE, 3 * PAGE, PAGE),
    ]


def test_no_flat_view() -> None:
    assert parse_flat_view("") == []
