"""Histories of pages against the naive oracle.

This module runs twice, compiled and as plain Python, as :mod:`tests.tracker.bits.test_words` does.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba.core.registry import CPUDispatcher

from tests.tracker import naive
from tests.tracker.bits.test_words import INTERPRETED, NPAGES, ROOT, subsets
from tracker.bits import history
from tracker.errors import BitmapError


def histories(npages: int) -> st.SearchStrategy[list[int]]:
    few = st.sampled_from([0, 127, 128, 192, 255])  # so that many pages are at one
    return st.lists(few | st.integers(0, 255), min_size=npages, max_size=npages)


@given(st.data())
def test_age(data: st.DataObject) -> None:
    npages = data.draw(NPAGES)
    before, written = data.draw(histories(npages)), data.draw(subsets(npages))
    found = np.array(before, np.uint8)
    history.age(naive.words_of(written, npages), found)
    assert found.tolist() == naive.aged(before, written)


@given(st.data())
def test_tally(data: st.DataObject) -> None:
    npages = data.draw(NPAGES)
    past, pages = data.draw(histories(npages)), data.draw(subsets(npages))
    counts = np.ones(256, np.int64)
    history.tally(naive.words_of(pages, npages), np.array(past, np.uint8), counts)
    assert (counts - 1).tolist() == naive.tally(pages, past)


@given(st.data())
def test_count(data: st.DataObject) -> None:
    npages = data.draw(NPAGES)
    past = np.array(data.draw(histories(npages)), np.uint8)
    counts = np.ones(256, np.int64)
    history.count(past, counts)
    assert (counts - 1).tolist() == np.bincount(past, minlength=256).tolist()


@given(st.data(), st.sampled_from([0, 1, 128, 192, 255]), st.integers(0, 70))
def test_choose(data: st.DataObject, least: int, limit: int) -> None:
    npages = data.draw(NPAGES)
    past, pages = data.draw(histories(npages)), data.draw(subsets(npages))
    words = naive.words_of(pages, npages)
    chosen = np.full_like(words, 2**64 - 1)
    at_least = history.choose(words, np.array(past, np.uint8), least, limit, chosen)
    assert naive.pages_of(chosen) == naive.choose(pages, past, least, limit)
    assert at_least == sum(past[page] == least for page in naive.pages_of(chosen))


@given(st.data(), st.integers(0, 40))
def test_find_spans(data: st.DataObject, room: int) -> None:
    npages = data.draw(NPAGES)
    barred = data.draw(subsets(npages))
    wanted = data.draw(subsets(npages)) - barred
    starts, stops = np.full((2, room), -1, np.int64)
    n = history.find_spans(
        naive.words_of(wanted, npages), naive.words_of(barred, npages), starts, stops
    )
    expected = naive.spans(wanted, barred)
    assert n == len(expected)
    found = list(zip(starts.tolist(), stops.tolist(), strict=True))
    assert found[:n] == expected[:room]
    assert all(span == (-1, -1) for span in found[n:])


def test_what_does_not_fit() -> None:
    words, past = np.zeros(2, np.uint64), np.zeros(64, np.uint8)
    with pytest.raises(BitmapError):
        history.age(words, past)
    with pytest.raises(BitmapError):
        history.tally(words, past, np.zeros(256, np.int64))
    with pytest.raises(BitmapError):
        history.tally(words[:1], past, np.zeros(255, np.int64))
    with pytest.raises(BitmapError):
        history.count(past, np.zeros(255, np.int64))
    with pytest.raises(BitmapError):
        history.choose(words[:1], past, 0, 0, words)
    with pytest.raises(BitmapError):
        history.find_spans(words, words[:1], np.zeros(1, np.int64), np.zeros(1, np.int64))
    both = np.ones(1, np.uint64)
    with pytest.raises(BitmapError):
        history.find_spans(both, both, np.zeros(1, np.int64), np.zeros(1, np.int64))


def test_it_is_compiled_or_not() -> None:
    assert isinstance(history.age, CPUDispatcher) is not INTERPRETED


@pytest.mark.skipif(INTERPRETED, reason="this is the plain run")
def test_the_same_as_plain_python() -> None:
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stdout
    assert "passed" in child.stdout
