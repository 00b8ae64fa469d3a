"""What people see of a VM that is watched."""

from __future__ import annotations

from dataclasses import replace

import pytest

from migrator.policy.forecast import Forecast
from migrator.policy.judge import Limits
from migrator.watch import view as heatmap
from migrator.watch.sample import Sight, Watched
from migrator.watch.view import HEIGHTS, legend, level, lines, strip
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.heat import History
from tracker.memory.ram import RamBlock

MIB = 1 << 20
BLOCK = RamBlock("ram0", 64 * MIB, 4096, 0x7F0000000000, 1, 2)


def sight() -> Sight:
    history = History(BLOCK.npages)
    written = DirtyBitmap(BLOCK.npages)
    written.set_range(BLOCK.npages // 2, BLOCK.npages // 2 + 1024)
    for _ in range(60):
        history.note(written, 1.0)
    return Sight(
        at_s=12.0,
        over_s=1.0,
        state="running",
        tracker="uffd",
        notes=("a [note]",),
        dirty_pages_per_s={"uffd": 12345.6, "holes": 7.0},
        dirty_bytes_per_s=48.0 * MIB,
        working_set_bytes={1: 48 * MIB, 10: 60 * MIB, 60: None},
        blocks=(Watched(BLOCK, 30 * MIB, history),),
        bytes_per_s=1000.0 * MIB,
        limits=Limits(downtime_ms=100.0),
        forecast=Forecast(True, 3, 1.5, 40.0, 90 * MIB, "fits"),
    )


def test_each_height_is_twice_the_one_before() -> None:
    assert level(0.0) == 0
    assert level(1e-9) == level(1 / 128) == 1
    for height in range(1, 8):
        top = 2.0 ** (height - 8)
        assert (level(top), level(top * 1.001)) == (height, height + 1)
    assert level(1.0) == 8


def test_the_strip_can_be_read_without_colours() -> None:
    assert strip([0.0, 0.005, 0.3, 1.0]).plain == "·▁▇█"


def test_every_height_has_a_colour_of_its_own() -> None:
    assert len(set(heatmap._COLOURS)) == len(HEIGHTS) == 9


@pytest.mark.parametrize("width", [10, 80, 200])
def test_the_strip_is_as_wide_as_the_terminal_and_hot_where_it_was_written(width: int) -> None:
    shown = lines(sight(), width)[-1].plain
    assert len(shown) == width
    hot = [i for i, cell in enumerate(shown) if cell != "·"]
    first, last = width // 2, width * (BLOCK.npages // 2 + 1023) // BLOCK.npages
    assert hot == list(range(first, last + 1))
    assert set(shown[first + 1 : last]) <= {"█"}


def test_what_is_said() -> None:
    said = "\n".join(line.plain for line in lines(sight(), 80))
    assert "uffd 12,346, holes 7" in said
    assert "48.0 MiB/s" in said
    assert "1 s 48.0 MiB, 10 s 60.0 MiB, 60 s –" in said
    assert "1.50 s, downtime 40 ms at 1,000.0 MiB/s" in said
    assert "ram0, 64.0 MiB, 30.0 MiB of it with data" in said
    assert HEIGHTS[1:] in legend().plain


def test_what_does_not_converge() -> None:
    hopeless = replace(sight(), forecast=Forecast(False, 60, 9.0, 320.0, 9, "does not converge"))
    said = "\n".join(line.plain for line in lines(hopeless, 80))
    assert "does not converge at 1,000.0 MiB/s: 320 ms of downtime, the limit is 100 ms" in said


def test_json() -> None:
    said = sight().to_json()
    assert said["working_set_bytes"] == {"1": 48 * MIB, "10": 60 * MIB, "60": None}
    assert said["forecast"]["converges"] is True
    assert [i for i, heat in enumerate(said["blocks"][0]["heat"]) if heat] == [32, 33, 34, 35]
