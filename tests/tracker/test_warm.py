"""One list of what is compiled before a migration, and nothing is missing in it."""

from __future__ import annotations

from pathlib import Path

import migrator
import tracker
from migrator.transport import runs
from tracker import warm


def _rooms(package: str, directory: Path) -> set[str]:
    return {
        ".".join((package, *file.relative_to(directory).with_suffix("").parts))
        for file in directory.rglob("*.py")
        if "\ndef warm_up() -> None:" in file.read_text() and file.stem != "warm"
    }


def test_every_module_that_can_be_warmed_up_is_listed() -> None:
    found = _rooms("tracker", *map(Path, tracker.__path__))
    assert len(found) > 5
    assert {room.__name__ for room in warm.ROOMS} == found


def test_the_migrators_own_are_those_of_frames() -> None:
    assert _rooms("migrator", *map(Path, migrator.__path__)) == {runs.__name__}
