"""One list of what is compiled before a migration, and nothing is missing in it."""

from __future__ import annotations

from pathlib import Path

import tracker
from tracker import warm


def test_every_room_that_can_be_warmed_up_is_listed() -> None:
    (directory,) = map(Path, tracker.__path__)
    found = {
        f"tracker.{file.stem}"
        for file in directory.glob("*.py")
        if "\ndef warm_up() -> None:" in file.read_text() and file.stem != "warm"
    }
    assert len(found) > 5
    assert {room.__name__ for room in warm.ROOMS} == found
