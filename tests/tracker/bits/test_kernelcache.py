"""Kernels where nothing is writable: as another user, in a process of its own."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NOBODY = 65534
AS_NOBODY: list[str] = []
if os.geteuid() == 0:  # the capability reads the interpreter in /root, and writes nothing
    capabilities = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    AS_NOBODY = ["setpriv", "--reuid", f"{NOBODY}", "--regid", f"{NOBODY}", "--clear-groups"]
    AS_NOBODY += capabilities
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from tracker import warm
from tracker.answered import faults
from tracker.bits import words as kernels
assert kernels.__file__.startswith(sys.argv[1])
print(kernels.popcount(np.array([7], dtype=np.uint64)))
"""


class Place:
    """A copy of the package that is not writable, and a directory for temporary files.

    :ivar user: the one that runs the program: another one, if this is root
    """

    def __init__(self, base: Path) -> None:
        self.user = NOBODY if os.geteuid() == 0 else os.geteuid()
        self.package, self.temporary = base / "package", base / "tmp"
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tracker", self.package / "tracker", ignore=ignore)
        self.writable(False)
        self.temporary.mkdir()
        self.temporary.chmod(0o1777)
        self.kept = self.temporary / f"qemu-migrator-kernels-{self.user}"

    def writable(self, yes: bool) -> None:
        """Let the package's directories be written to, or not."""
        for path in (self.package, *self.package.rglob("*")):
            if path.is_dir():
                path.chmod(0o755 if yes else 0o555)

    def change(self, file: str) -> None:
        """Add a line to a source that says nothing."""
        self.writable(True)
        with (self.package / file).open("a") as source:
            source.write("# changed\n")
        self.writable(False)

    def run(self) -> subprocess.CompletedProcess[str]:
        """Count the bits of 7, without a home."""
        environment = {
            "HOME": "/proc/none",
            "TMPDIR": str(self.temporary),
            "PATH": os.environ["PATH"],
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(
            [*AS_NOBODY, sys.executable, "-c", PROGRAM, str(self.package)],
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "3\n"
        return done


@pytest.fixture
def place() -> Iterator[Place]:
    base = Path(tempfile.mkdtemp(prefix="kernels", dir="/tmp"))  # pytest's are for one user only
    try:
        base.chmod(0o755)
        made = Place(base)
        yield made
    finally:
        made.writable(True)
        shutil.rmtree(base)


def index_files(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*.nbi")}


def test_they_are_kept_in_a_directory_of_the_users_own(place: Place) -> None:
    done = place.run()
    assert f"kernels are in {place.kept}" in done.stderr
    found = place.kept.lstat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o700, place.user)
    kept = index_files(place.kept)
    assert [path for path in kept if "popcount" in path.name]
    place.run()
    assert index_files(place.kept) == kept  # loaded, not compiled again


@pytest.mark.parametrize("file", ["tracker/bits/native.py", "tracker/memory/extents.py"])
@pytest.mark.one_in(2)
def test_they_are_compiled_anew_when_another_source_has_changed(place: Place, file: str) -> None:
    place.run()
    before = index_files(place.kept)
    place.change(file)
    place.run()
    after = index_files(place.kept)
    (popcount,) = [path for path in after if "words.popcount" in path.name]
    assert after[popcount] != before[popcount]
    place.change("tracker/sources/uffd.py")  # which has no kernels, and none that call it
    place.run()
    assert index_files(place.kept) == after


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes directories of other users")
@pytest.mark.parametrize("made", ["by another user", "open to others", "a link", "a file"])
def test_a_directory_that_others_may_write_is_not_used(place: Place, made: str) -> None:
    elsewhere = place.temporary / "elsewhere"
    elsewhere.mkdir()
    os.chown(elsewhere, NOBODY, NOBODY)
    if made == "a link":
        place.kept.symlink_to(elsewhere)
    elif made == "a file":
        place.kept.touch()
    else:
        place.kept.mkdir(mode=0o700)
    if made == "open to others":
        place.kept.chmod(0o777)
        os.chown(place.kept, NOBODY, NOBODY)
    done = place.run()
    assert "compiled anew by each process" in done.stderr
    assert index_files(place.temporary) == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes directories of other users")
@pytest.mark.parametrize("mode", [0o777, 0o1777])
@pytest.mark.one_in(2)
def test_nor_one_that_others_may_replace(place: Place, mode: int) -> None:
    """Without the sticky bit any user; with it, the owner of the directory."""
    os.chown(place.temporary, 0 if mode == 0o777 else 1, 0)
    place.temporary.chmod(mode)
    place.kept.mkdir(mode=0o700)
    os.chown(place.kept, NOBODY, NOBODY)
    done = place.run()
    assert "compiled anew by each process" in done.stderr
    assert index_files(place.temporary) == {}
