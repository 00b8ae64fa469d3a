"""Pages counted by region against the naive oracle.

This module runs twice: compiled, and as plain Python (see :mod:`tests.tracker.bits.test_words`).
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tracker import naive
from tests.tracker.bits.test_words import INTERPRETED, NPAGES, ROOT, subsets
from tracker.bits import regions
from tracker.bits.bitmap import DirtyBitmap
from tracker.errors import BitmapError


@given(st.data())
def test_counts(data: st.DataObject) -> None:
    npages = data.draw(NPAGES.filter(bool))
    pages = data.draw(subsets(npages))
    wanted = data.draw(st.integers(1, npages))
    bitmap = DirtyBitmap(npages, naive.words_of(pages, npages))
    found = regions.by_region(bitmap, wanted)
    assert found.tolist() == naive.by_region(pages, npages, wanted)
    assert naive.pages_of(bitmap.words) == pages
    edges = regions.edges(npages, wanted).tolist()
    assert edges == [region * npages // wanted for region in range(wanted + 1)]


@given(st.data())
def test_counts_of_any_range(data: st.DataObject) -> None:
    npages = data.draw(NPAGES)
    pages = data.draw(subsets(npages))
    start, stop = data.draw(st.integers(0, npages)), data.draw(st.integers(0, npages))
    words = naive.words_of(pages, npages)
    assert regions.count_range(words, start, stop) == len(pages & set(range(start, stop)))


def test_regions_are_as_equal_as_they_can_be() -> None:
    sizes = np.diff(regions.edges((1 << 40) // 4096 + 1, 256))
    assert sizes.max() - sizes.min() == 1


def test_lengths_that_do_not_fit() -> None:
    with pytest.raises(BitmapError, match="more regions"):
        regions.by_region(DirtyBitmap(3), 4)
    counts = np.zeros(1, np.int64)
    for words in (np.zeros(1, np.uint64), np.zeros(3, np.uint64), np.full(2, 2, np.uint64)):
        with pytest.raises(BitmapError):
            regions.count_regions(words, 65, counts)


_WARM = """
import sys
from tracker.bits import regions
from tracker.bits.bitmap import DirtyBitmap
if sys.argv[1] == "warm":
    regions.warm_up()
before = len(regions.count_regions.signatures)
regions.by_region(DirtyBitmap.full(65), 7)
print(len(regions.count_regions.signatures) - before)
"""


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("warm", [True, False])
def test_nothing_is_compiled_after_warm_up(warm: bool) -> None:
    command = [sys.executable, "-c", _WARM, "warm" if warm else "cold"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout == ("0\n" if warm else "1\n")
