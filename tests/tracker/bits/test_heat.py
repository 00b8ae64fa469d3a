"""Ages and heats against the naive oracle.

This module runs twice: compiled, and as plain Python (see :mod:`tests.tracker.bits.test_words`).
"""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tracker import naive
from tests.tracker.bits.test_words import INTERPRETED, NPAGES, ROOT, subsets
from tracker.bits import heat
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.heat import HOTTEST, MEMORY_S, NEVER, History
from tracker.errors import BitmapError

GAINS = st.sampled_from([1, 652, 6237, 0x8000, 0xFFFF, 0x10000]) | st.integers(1, 0x10000)


def bitmap(pages: set[int], npages: int) -> DirtyBitmap:
    return DirtyBitmap(npages, naive.words_of(pages, npages))


def counters(npages: int) -> tuple[heat.Counters, heat.Counters]:
    return np.full(npages, NEVER, np.uint16), np.zeros(npages, np.uint16)


@given(st.data())
def test_ages_and_heats(data: st.DataObject) -> None:
    npages, gain = data.draw(NPAGES), data.draw(GAINS)
    bitmaps = [data.draw(subsets(npages)) for _ in range(data.draw(st.integers(0, 6)))]
    ages, heats = counters(npages)
    for pages in bitmaps:
        heat.note(naive.words_of(pages, npages), ages, heats, gain)
    assert ages.tolist() == [naive.ages(bitmaps, page) for page in range(npages)]
    for page in range(npages):
        exact = naive.heat(bitmaps, page, gain) * 0x10000
        assert abs(int(heats[page]) - exact) <= len(bitmaps) + 1
    for than in (0, 1, 3, NEVER):
        recent = set().union(*bitmaps[max(0, len(bitmaps) - than) :]) if than else set()
        assert heat.count_younger(ages, than) == len(recent)


@pytest.mark.parametrize("gain", [1, 652, 0x8000, 0x10000])
def test_heat_stays_in_bounds_and_cools_to_nothing(gain: int) -> None:
    ages, heats = counters(2)
    heats[:] = HOTTEST
    words = naive.words_of({0}, 2)
    for _ in range(100):
        heat.note(words, ages, heats, gain)
    assert heats[0] >= HOTTEST - 1
    heats[1] = min(heats[1], 300)
    for _ in range(1000):  # what is rounded to the nearest stands still long before 0
        heat.note(words, ages, heats, gain)
    assert heats[1] == 0


def test_an_age_stays_at_its_last_value() -> None:
    ages, heats = counters(1)
    ages[0] = NEVER - 1
    for _ in range(3):
        heat.note(np.zeros(1, np.uint64), ages, heats, 1)
        assert ages[0] == NEVER
    assert heat.count_younger(ages, NEVER) == 0


@given(st.data())
def test_averages(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, HOTTEST), min_size=1, max_size=200))
    cells = data.draw(st.integers(1, len(values)))
    found = np.full(cells, math.nan)
    heat.average(np.array(values, np.uint16), found)
    wanted = [mean / HOTTEST for mean in naive.averages(values, cells)]
    assert found.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("gain", [0, -1, 0x10001])
def test_a_weight_that_makes_no_sense(gain: int) -> None:
    with pytest.raises(BitmapError, match="weight"):
        heat.note(np.zeros(1, np.uint64), *counters(1), gain)


def test_lengths_that_do_not_fit() -> None:
    ages, heats = counters(65)
    for words in (np.zeros(1, np.uint64), np.zeros(3, np.uint64), np.full(2, 2, np.uint64)):
        with pytest.raises(BitmapError):
            heat.note(words, ages, heats, 1)
    with pytest.raises(BitmapError, match="different lengths"):
        heat.note(np.zeros(2, np.uint64), ages, heats[:64], 1)
    with pytest.raises(BitmapError, match="more cells"):
        heat.average(heats, np.zeros(66))
    with pytest.raises(BitmapError, match="of 64 pages for 65"):
        History(65).note(DirtyBitmap(64), 1.0)


def test_history() -> None:
    history = History(130)
    history.note(bitmap({0, 129}, 130), 1.0)
    history.note(bitmap({0, 64}, 130), 1.0)
    assert [history.written_in(last) for last in (0, 1, 2, 3)] == [0, 2, 3, 3]
    strip = history.strip(13)
    assert np.flatnonzero(strip).tolist() == [0, 6, 12]
    assert strip[0] > strip[6] > strip[12]  # twice, once just now, once before
    assert len(history.strip(1000)) == 130


@pytest.mark.parametrize("seconds", [0.1, 1.0, 5.0])
def test_heat_is_of_time_not_of_readings(seconds: float) -> None:
    """However often one looks, and from the first time on."""
    history = History(3)
    assert history.strip(3).tolist() == [0, 0, 0]
    half = round(MEMORY_S / seconds)
    for number in range(2 * half):
        history.note(bitmap({0, 1 if number < half else 2}, 3), seconds)
        if number < half:
            assert history.strip(3) == pytest.approx([1, 1, 0], abs=0.01)
    earlier = 1 / (math.e + 1)  # of the weight of both halves, the earlier one's
    assert history.strip(3) == pytest.approx([1, earlier, 1 - earlier], abs=0.01)


def test_four_bytes_a_page() -> None:
    history = History(1 << 16)
    held = [value for value in vars(history).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in held) == 4 * history.npages


_WARM = """
import sys
import numpy as np
from tracker.bits import heat
from tracker.bits.bitmap import DirtyBitmap
names = ("note", "count_younger", "average")
if sys.argv[1] == "warm":
    heat.warm_up()
before = {n: len(getattr(heat, n).signatures) for n in names}
history = heat.History(65)
history.note(DirtyBitmap.full(65), 1.0)
history.written_in(1), history.strip(8)
print([n for n in names if len(getattr(heat, n).signatures) != before[n]])
"""


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("warm", [True, False])
def test_nothing_is_compiled_after_warm_up(warm: bool) -> None:
    command = [sys.executable, "-c", _WARM, "warm" if warm else "cold"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert eval(child.stdout) == ([] if warm else ["note", "count_younger", "average"])
