"""Pages of one size to pages of another, against sets; compiled and as plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tracker import naive
from tests.tracker.bits.test_words import NPAGES, subsets
from tracker.bits import rescale
from tracker.errors import BitmapError

SIZES = st.sampled_from([512, 1024, 2048, 4096, 8192, 65536, 1 << 18])


@given(st.data(), SIZES, SIZES)
def test_spread(data: st.DataObject, bit_size: int, page_size: int) -> None:
    """Any place in the bits, any offset of the block, IO pages larger, smaller or of one size."""
    nbits = data.draw(NPAGES)
    before_bits, after_bits = data.draw(st.integers(0, 130)), data.draw(st.integers(0, 70))
    bits = data.draw(subsets(before_bits + nbits + after_bits))  # noise around what counts
    unit = data.draw(st.sampled_from([1, 512, page_size]))
    offset = unit * data.draw(st.integers(0, 200))
    npages = max(1, -(-(offset + nbits * bit_size) // page_size)) + data.draw(st.integers(0, 70))
    already = data.draw(st.sets(st.integers(0, npages - 1), max_size=5))
    words = naive.words_of(already, npages)
    rescale.spread(
        naive.words_of(bits, before_bits + nbits + after_bits),
        before_bits,
        nbits,
        bit_size,
        words,
        page_size,
        offset,
    )
    counted = {bit - before_bits for bit in bits if before_bits <= bit < before_bits + nbits}
    assert naive.pages_of(words) == already | naive.spread(counted, bit_size, page_size, offset)


@pytest.mark.parametrize(
    "change",
    [
        {"bit_size": 0},
        {"bit_size": 3000},
        {"page_size": 0},
        {"page_size": 4095},
        {"first": -1},
        {"first": 65},
        {"nbits": -1},
        {"nbits": 129},
        {"offset": -1},
        {"offset": 1},
        {"offset": 4096 * 65},
    ],
)
def test_spread_refuses_what_does_not_fit(change: dict[str, int]) -> None:
    fitting = {"first": 64, "nbits": 64, "bit_size": 4096, "page_size": 4096, "offset": 0}
    bits, words = np.zeros(2, np.uint64), np.zeros(1, np.uint64)

    def spread(first: int, nbits: int, bit_size: int, page_size: int, offset: int) -> None:
        rescale.spread(bits, first, nbits, bit_size, words, page_size, offset)

    spread(**fitting)
    with pytest.raises(BitmapError):
        spread(**fitting | change)


# what decides which way is taken: more bits than a page has, as many, fewer, and places in a word
@pytest.mark.parametrize("bit_size", [4096, 8192, 32768, 65536, 128 << 10, 256 << 10, 2 << 20])
@pytest.mark.parametrize("page_size", [4096, 2 << 20])
@pytest.mark.parametrize("offset", [0, 4096, 63 * 4096, 256 << 10, 4 << 20, 1])
def test_edges_of_words(bit_size: int, page_size: int, offset: int) -> None:
    nbits = 130
    for bit in (0, 1, 31, 32, 62, 63, 64, 65, 127, 128, 129):
        for bits in ({bit}, set(range(bit)), set(range(bit, nbits)), {bit, nbits - 1}):
            npages = -(-(offset + nbits * bit_size) // page_size)
            words = naive.words_of(set(), npages)
            source = naive.words_of(bits, nbits)
            rescale.spread(source, 0, nbits, bit_size, words, page_size, offset)
            wanted = set[int]()
            for at in bits:  # as naive.spread, which looks at every page each time
                start = offset + at * bit_size
                wanted |= set(range(start // page_size, -(-(start + bit_size) // page_size)))
            assert naive.pages_of(words) == wanted


def test_nothing_is_written_past_the_last_word() -> None:
    """Of 64 KiB to 4 KiB, the last bit's pages end within it."""
    whole = np.zeros(5, np.uint64)
    rescale.spread(np.array([0x1_0001], np.uint64), 0, 17, 65536, whole[:5], 4096, 0)
    assert naive.pages_of(whole) == {*range(16), *range(256, 272)}
    padded = np.zeros(6, np.uint64)
    rescale.spread(np.array([0x1_0001], np.uint64), 0, 17, 65536, padded[:5], 4096, 0)
    assert padded[5] == 0
