"""The QEMUs that the live tests run: the system's, and where that is old a newer one beside it.

The newer one is fetched when a test asks for it, by ``fetch-qemu`` in this directory.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import require

_SYSTEM = "qemu-system-x86_64"
_FETCH = Path(__file__).with_name("fetch-qemu")
_NEWER = 10  # what fetch-qemu fetches


@dataclass(frozen=True)
class Qemu:
    """One QEMU.

    :ivar name: what the tests call it
    """

    name: str

    def __str__(self) -> str:
        return self.name

    def require(self) -> tuple[str, ...]:
        """The command; skips the running test, or fails it, where it cannot be had."""
        command, missing = _system() if self.name == "system" else _fetched()
        require(missing)
        return (command,)


def _system() -> tuple[str, str]:
    found = shutil.which(_SYSTEM)
    return found or _SYSTEM, "" if found else f"{_SYSTEM} is not installed"


@functools.cache
def _fetched() -> tuple[str, str]:
    done = subprocess.run([_FETCH], capture_output=True, text=True, check=False)
    command = done.stdout.strip()
    missing = "" if command else done.stderr.strip() or "fetch-qemu said nothing"
    return command, missing


def major_version(command: str) -> int:
    """The first number of a QEMU's version; 0 if it cannot be run."""
    try:
        said = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return 0
    found = re.search(r"emulator version (\d+)", said.stdout)
    return int(found[1]) if found else 0


SYSTEM = Qemu("system")
BACKPORTS = Qemu("backports")
QEMUS = (SYSTEM,) if major_version(_SYSTEM) >= _NEWER else (SYSTEM, BACKPORTS)
"""All of them."""

each_qemu = pytest.mark.parametrize(
    "qemu", [SYSTEM, *(pytest.param(q, marks=pytest.mark.thorough) for q in QEMUS[1:])], ids=str
)
"""A test for each of them: the system's in every run, the newer one in thorough ones."""
