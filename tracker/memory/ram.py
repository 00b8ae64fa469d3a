"""RAM blocks of a QEMU process: where they are mapped, which file is behind them.

A guest's RAM is one or more *blocks* (QEMU: ``RAMBlock``, one for each memory backend). A page has
three addresses, and this module is where they are turned into each other:

- *block offset*: bytes from the start of the block, which is also the offset in its file
- *host virtual address* (HVA): where QEMU's process sees it; what the kernel's trackers speak
- *guest-physical address* (GPA): where the guest sees it; a PC's RAM has a hole below 4 GiB, so one
  block is often seen at two places
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tracker.errors import MapChanged, NotShared, RamError

_MAPS_LINE = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ([rwxsp-]{4}) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)$",
    re.MULTILINE,
)
_FLAT_RANGE = re.compile(
    r"^ +([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (?:ram|rom)\): (.+?)(?: @([0-9a-f]{16}))?"
    r"(?: KVM)?\s*$"
)


@dataclass(frozen=True)
class Mapping:
    """One line of ``/proc/PID/maps`` (Linux: ``fs/proc/task_mmu.c``). Addresses in bytes."""

    start: int
    end: int
    permissions: str
    offset: int
    device: int
    inode: int
    path: str

    @property
    def shared(self) -> bool:
        """Whether writes through this mapping reach the file."""
        return self.permissions.endswith("s")


@dataclass(frozen=True)
class RamBlock:
    """A block of guest RAM: one shared file, but for what :mod:`tracker.memory.address` finds.

    :ivar name: id of the memory backend
    :ivar size: bytes, a multiple of ``page_size``
    :ivar page_size: bytes a page: 4096, or that of hugetlbfs
    :ivar hva: address of its first byte in QEMU's process
    :ivar device: ``st_dev`` of the file; 0 if there is none
    :ivar inode: ``st_ino`` of the file; 0 if there is none
    """

    name: str
    size: int
    page_size: int
    hva: int
    device: int
    inode: int

    @property
    def npages(self) -> int:
        """Pages in the block."""
        return self.size // self.page_size

    @property
    def is_hugetlb(self) -> bool:
        """Whether the pages are huge pages out of the kernel's pool."""
        return self.page_size > os.sysconf("SC_PAGE_SIZE")

    @property
    def has_file(self) -> bool:
        """Whether there is a file, without which RAM can be tracked, but not moved."""
        return self.inode != 0


@dataclass(frozen=True)
class GuestRange:
    """A piece of a block as the guest sees it.

    :ivar gpa: guest-physical address of the first byte
    :ivar size: bytes
    :ivar block: QEMU's name of the memory region
    :ivar offset: block offset of the first byte
    """

    gpa: int
    size: int
    block: str
    offset: int


def mappings(pid: int) -> list[Mapping]:
    """Everything a process has mapped, in order of address.

    :raise OSError: no such process, or not ours to look at
    """
    return parse_mappings(Path(f"/proc/{pid}/maps").read_bytes())


def _mappings_of_inodes(pid: int, inodes: Iterable[int]) -> list[Mapping]:
    # most lines are of libraries, and parsing them all takes milliseconds of a downtime
    wanted = [b" %d " % inode for inode in inodes]
    lines = Path(f"/proc/{pid}/maps").read_bytes().splitlines()
    ours = [line for line in lines if any(inode in line for inode in wanted)]
    return parse_mappings(b"\n".join(ours))


def parse_mappings(text: bytes) -> list[Mapping]:
    """Parse what ``/proc/PID/maps`` says."""
    return [
        Mapping(
            start=int(start, 16),
            end=int(end, 16),
            permissions=permissions.decode(),
            offset=int(offset, 16),
            device=os.makedev(int(major, 16), int(minor, 16)),
            inode=int(inode),
            path=os.fsdecode(path),
        )
        for start, end, permissions, offset, major, minor, inode, path in _MAPS_LINE.findall(text)
    ]


def find_block(pid: int, name: str, size: int, mem_path: str) -> RamBlock:
    """Find a memory backend of QEMU in its address space.

    :param name: the backend's id
    :param size: the backend's size in bytes
    :param mem_path: its ``mem-path``: a file, or a directory in which QEMU made (and unlinked) one
    :raise NotShared: the backend is mapped privately
    :raise RamError: it is not mapped, not in one piece, or more than once
    """
    ours = _mappings_of(pid, name, mem_path)
    if not ours:
        raise RamError(name, f"nothing of {mem_path} is mapped in process {pid}")
    if not all(m.shared for m in ours):
        raise NotShared(name, "its file is mapped privately: add share=on to the memory backend")
    if len({(m.device, m.inode) for m in ours}) > 1:
        raise RamError(name, f"several files match {mem_path}")
    hva = _whole(name, size, ours)
    return RamBlock(
        name, size, kernel_page_size(pid, hva), hva, device=ours[0].device, inode=ours[0].inode
    )


def _mappings_of(pid: int, name: str, mem_path: str) -> list[Mapping]:
    path = mem_path if mem_path.startswith("/") else f"/proc/{pid}/cwd/{mem_path}"
    # QEMU names the file after the backend, with '/' replaced, and six random characters
    # (softmmu/physmem.c, file_ram_open)
    inside = re.compile(
        rf"{re.escape(os.path.realpath(path))}/qemu_back_mem\."
        rf"{re.escape(name.replace('/', '_'))}\.[A-Za-z0-9]{{6}}( \(deleted\))?"
    )
    try:
        # through /proc, because QEMU may live in another mount namespace
        found = os.stat(f"/proc/{pid}/root/{path}" if path == mem_path else path)
        file_id = (found.st_dev, found.st_ino)
    except OSError:
        file_id = None
    return [
        m
        for m in mappings(pid)
        if m.inode
        and ((m.device, m.inode) == file_id or m.path == mem_path or inside.fullmatch(m.path))
    ]


def _whole(name: str, size: int, pieces: Sequence[Mapping]) -> int:
    """Check that the pieces are one mapping of the whole file; return its address."""
    first = pieces[0]
    if first.offset != 0:
        raise RamError(name, f"its mapping starts {first.offset} bytes into the file")
    expected = first.start
    for piece in pieces:
        if piece.start != expected or piece.offset != piece.start - first.start:
            raise RamError(name, f"is mapped a second time, at {piece.start:#x}")
        if "rw" not in piece.permissions:
            raise RamError(name, f"is mapped {piece.permissions} at {piece.start:#x}")
        expected = piece.end
    if expected - first.start < size:
        raise RamError(name, f"only {expected - first.start} of its {size} bytes are mapped")
    return first.start


def kernel_page_size(pid: int, address: int) -> int:
    """Bytes a page of the mapping that starts at an address.

    :raise OSError: none does, or the process cannot be looked at
    """
    here = f"{address:x}-".encode()
    with open(f"/proc/{pid}/smaps", "rb") as smaps:
        inside = False
        for line in smaps:
            if line.startswith(here):
                inside = True
            elif inside and line.startswith(b"KernelPageSize:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"no KernelPageSize for {address:#x} in /proc/{pid}/smaps")


def check_unmoved(pid: int, blocks: Iterable[RamBlock]) -> None:
    """Check that every block is still mapped where it was, whole and once.

    :raise MapChanged: one is not; nothing collected from now on could be trusted
    :raise OSError: the process is gone
    """
    by_file: dict[tuple[int, int], list[Mapping]] = {}
    blocks = tuple(blocks)
    for mapping in _mappings_of_inodes(pid, {block.inode for block in blocks}):
        by_file.setdefault((mapping.device, mapping.inode), []).append(mapping)
    for block in blocks:
        pieces = by_file.get((block.device, block.inode), [])
        if not pieces:
            raise MapChanged(block.name, f"is no longer mapped in process {pid}")
        try:
            hva = _whole(block.name, block.size, pieces)
        except RamError as error:
            raise MapChanged(block.name, error.reason) from error
        if hva != block.hva:
            raise MapChanged(block.name, f"moved from {block.hva:#x} to {hva:#x}")


def open_file(pid: int, block: RamBlock) -> int:
    """Open the block's file anew for reading and writing, by way of QEMU's own descriptor.

    That reaches files that have no name any more, or a name only in QEMU's mount namespace.

    :return: a descriptor of our own (its own file position), to be closed by the caller
    :raise RamError: QEMU holds no descriptor of the file
    :raise OSError: it may not be opened
    """
    directory = f"/proc/{pid}/fd"
    for number in os.listdir(directory):
        path = f"{directory}/{number}"
        try:
            status = os.stat(path)
        except OSError:
            continue
        if (status.st_dev, status.st_ino) == (block.device, block.inode):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if os.fstat(fd).st_size < block.size:
                os.close(fd)
                raise RamError(block.name, "its file is shorter than the block")
            return fd
    raise RamError(block.name, f"process {pid} holds no descriptor of its file")


def other_mappers(pid: int, blocks: Iterable[RamBlock]) -> list[tuple[int, str]]:
    """Processes other than ``pid`` that have a block's file mapped: writes of theirs are not seen.

    :return: (process, name of the block) pairs; processes we may not look at are left out
    """
    names = {(block.device, block.inode): block.name for block in blocks}
    inodes = [b" %d " % inode for _, inode in names]
    found: set[tuple[int, str]] = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in (pid, os.getpid()):
            continue
        try:
            text = Path(f"/proc/{entry}/maps").read_bytes()
        except OSError:
            continue
        if not any(inode in text for inode in inodes):
            continue
        for mapping in parse_mappings(text):
            name = names.get((mapping.device, mapping.inode))
            if name is not None:
                found.add((int(entry), name))
    return sorted(found)


def parse_flat_view(text: str) -> list[GuestRange]:
    """RAM and ROM as the guest's CPU sees it, out of QEMU's ``info mtree -f``.

    Only the view of the address space ``memory`` is read (QEMU: ``softmmu/memory.c``,
    ``mtree_print_flatview``). Neighbouring pieces of one block are joined.
    """
    ranges: list[GuestRange] = []
    in_view = False
    for line in text.splitlines():
        if line.startswith("FlatView"):
            in_view = False
        elif line.strip().startswith('AS "memory"'):
            in_view = True
        elif in_view and (match := _FLAT_RANGE.match(line)):
            start, last, block, offset = match.groups()
            piece = GuestRange(
                gpa=int(start, 16),
                size=int(last, 16) - int(start, 16) + 1,
                block=block,
                offset=int(offset, 16) if offset else 0,
            )
            if ranges and _continues(ranges[-1], piece):
                before = ranges.pop()
                piece = GuestRange(
                    before.gpa, before.size + piece.size, before.block, before.offset
                )
            ranges.append(piece)
    return ranges


def _continues(before: GuestRange, piece: GuestRange) -> bool:
    return (
        before.block == piece.block
        and before.gpa + before.size == piece.gpa
        and before.offset + before.size == piece.offset
    )
