"""Guest RAM in files that other users of the host can read: worth a warning, not a refusal.

QEMU makes a ``mem-path`` that is a file with mode 0644, less its umask.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import PurePosixPath

from tracker.errors import RamError
from tracker.memory.ram import RamBlock, open_file

_READ = stat.S_IRGRP | stat.S_IROTH
_SEARCH = stat.S_IXGRP | stat.S_IXOTH


def exposure_warnings(vm: str, pid: int, blocks: Sequence[RamBlock]) -> tuple[str, ...]:
    """A sentence for each RAM file that has a name, and that other users can reach and read.

    :param vm: the name of the VM in the sentences
    :param pid: its QEMU, which may have another root directory
    """
    found = ((block, _exposed(pid, block)) for block in blocks)
    return tuple(
        f"RAM {block.name!r} of the {vm} is in {file[0]}, which other users can read, and the "
        f"guest's memory with it (its mode is {file[1]:04o}): chmod 600, and start QEMU with umask "
        "077, or with a directory as mem-path"
        for block, file in found
        if file is not None
    )


def _exposed(pid: int, block: RamBlock) -> tuple[str, int] | None:
    """The path and the mode of the block's file, if other users can reach and read it."""
    try:
        fd = open_file(pid, block)
    except (OSError, RamError):
        return None  # without a file, or one that preflight complains about elsewhere
    try:
        file, path = os.fstat(fd), os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    if file.st_nlink == 0 or not file.st_mode & _READ:
        return None
    for directory in PurePosixPath(path).parents:
        try:
            mode = os.stat(f"/proc/{pid}/root{directory}").st_mode
        except OSError:
            break  # it has another name here than there
        if not mode & _SEARCH:
            return None
    return path, stat.S_IMODE(file.st_mode)
