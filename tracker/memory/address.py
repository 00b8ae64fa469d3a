"""RAM that is found by its address: whatever is mapped there, private memory too.

Writes to private memory are tracked like any other (Linux: ``vma_can_userfault`` allows
asynchronous write-protection of everything), and a page that is given back there counts as written.
Only moving it takes a file. A huge page is split where it is written, and a page that KSM merges
counts as written (mm/ksm.c, ``replace_page``).
"""

from __future__ import annotations

import os

from tracker.errors import MapChanged, RamError
from tracker.memory.ram import (
    Mapping,
    RamBlock,
    check_unmoved,
    kernel_page_size,
    mappings,
    open_file,
)


def find_block_at(pid: int, name: str, size: int, hva: int) -> RamBlock:
    """Find out what is mapped at an address where the process says that it has RAM.

    :param name: of the block
    :param size: of it, in bytes
    :param hva: of its first byte
    :return: a block with a file, if it is shared and a descriptor of it is held; else one without
    :raise RamError: not all of it is mapped, or not all alike
    :raise OSError: the process cannot be looked at
    """
    pieces = _pieces(pid, name, size, hva)
    first = pieces[0]
    page_size = kernel_page_size(pid, first.start)
    if first.shared:
        block = RamBlock(name, size, page_size, hva, first.device, first.inode)
        try:
            os.close(open_file(pid, block))
        except RamError:
            return RamBlock(name, size, page_size, hva, 0, 0)
        check_unmoved(pid, [block])
        return block
    return RamBlock(name, size, page_size, hva, 0, 0)


def check_mapped(pid: int, block: RamBlock) -> None:
    """Check that there is memory all over a block that has no file.

    :raise MapChanged: there is not
    :raise OSError: the process is gone
    """
    try:
        _pieces(pid, block.name, block.size, block.hva)
    except RamError as error:
        raise MapChanged(block.name, error.reason) from error


def _pieces(pid: int, name: str, size: int, hva: int) -> list[Mapping]:
    """The mappings of an address range, which they cover without a gap."""
    pieces = [m for m in mappings(pid) if m.start < hva + size and hva < m.end]
    expected = hva
    for piece in pieces:
        if piece.start > expected:
            break
        if piece.permissions[:2] != "rw":
            raise RamError(name, f"is mapped {piece.permissions} at {piece.start:#x}")
        if piece.shared != pieces[0].shared:
            raise RamError(name, f"is in part shared, in part private, at {piece.start:#x}")
        expected = piece.end
    if expected < hva + size:
        raise RamError(name, f"is not mapped at {expected:#x}")
    return pieces
