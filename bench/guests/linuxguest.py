"""The Linux guests that are measured: a distribution's kernel, and ``linux-guest.d/init``."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

PROGRAM = "sqlite3"
INIT = Path(__file__).with_name("linux-guest.d") / "init"

_MAKE = Path(__file__).parents[2] / "configs" / "linux-guest"
_FILES = ("vmlinuz", "initramfs.gz")
_BROKEN = re.compile(rb"guest: FAULT.*|.*(?:Kernel panic|BUG:|Oops|general protection).*")


class GuestError(Exception):
    """A guest cannot be made here; the text says what to do about it."""


def prepare(directory: Path) -> None:
    """Make the kernel and the initramfs in the user's cache, once; and their names in a directory.

    :raise GuestError: they cannot be made
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    made = cache / "qemu-migrator" / "linux-bench"
    if not _MAKE.exists():
        raise GuestError(f"there is no {_MAKE}: run this from the project's checkout")
    command = [str(_MAKE), str(made), str(INIT), PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GuestError(f"the Linux guest cannot be made: {done.stderr.strip()}")
    for name in _FILES:
        link = directory / name
        link.unlink(missing_ok=True)
        link.symlink_to(made / name)


def arguments(directory: Path, workload: str) -> list[str]:
    """Give the QEMU arguments of the guest but machine, RAM and the serial port.

    :param directory: with what :func:`prepare` has made
    :param workload: ``boot`` or ``sqlite``
    """
    kernel, initramfs = (str(directory / name) for name in _FILES)
    return [
        # QEMU 7.2's emulation of cx16 crashes newer kernels
        *["-cpu", "qemu64,-cx16", "-nodefaults", "-display", "none", "-vga", "none"],
        *["-kernel", kernel, "-initrd", initramfs],
        *["-append", f"console=ttyS0 quiet WORKLOAD={workload}"],
    ]


def problem(console: bytes) -> str:
    """Look for what a guest complains of.

    :return: the first such line; empty if there is none
    """
    found = _BROKEN.search(console)
    return found[0].decode(errors="replace").strip() if found else ""
