"""Digests of pages against XXH64 in plain Python, and that against the published test vectors.

This module runs twice, compiled and as plain Python, as :mod:`tests.tracker.bits.test_words` does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numba.core.registry import CPUDispatcher

from tests.tracker import naive
from tests.tracker.bits.test_words import INTERPRETED, NPAGES, PAGE, ROOT, subsets
from tests.tracker.memory.test_pages import tmpfs_files
from tracker.errors import BitmapError
from tracker.memory import pagehash, xxh64

# plain Python on numpy's numbers would warn of every sum that wraps around
pytestmark = pytest.mark.filterwarnings("error")

SEEDS = st.sampled_from([0, 1, 2**63 - 1, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)
SIZES = st.sampled_from([32, 64, 96, 160])
PRIME32, PRIME64 = 2654435761, 11400714785074694797


def sanity_buffer(nbytes: int) -> bytes:
    """The bytes of which xxHash's own vectors are made (cli/xsum_sanity_check.c)."""
    state, found = PRIME32, bytearray()
    for _ in range(nbytes):
        found.append(state >> 56)
        state = state * PRIME64 % 2**64
    return bytes(found)


def random_bytes(nbytes: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def memory_of(content: bytes) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(bytearray(content), np.uint8)


def digests_of(content: bytes, page_size: int, seed: int) -> list[int]:
    """Digests of pages without holes."""
    npages = len(content) // page_size
    digests = np.zeros(npages, np.uint64)
    data = naive.words_of(range(npages), npages)
    pagehash.page_digests(memory_of(content), page_size, data, seed, digests, 0, npages)
    return [int(digest) for digest in digests]


def test_it_is_the_compiled_kernels_that_are_tested_or_not() -> None:
    assert isinstance(pagehash.differing, CPUDispatcher) is not INTERPRETED


# --- the algorithm --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "seed", "digest"),
    [
        (0, 0, 0xEF46DB3751D8E999),
        (0, PRIME32, 0xAC75FDA2929B17EF),
        (1, 0, 0xE934A84ADB052768),
        (1, PRIME32, 0x5014607643A9B4C3),
        (4, 0, 0x9136A0DCA57457EE),
        (14, 0, 0x8282DCC4994E35C8),
        (14, PRIME32, 0xC3BD6BF63DEB6DF0),
        (222, 0, 0xB641AE8CB691C174),
        (222, PRIME32, 0x20CB8AB7AE10C14A),
    ],
)
def test_the_oracle_is_xxh64(nbytes: int, seed: int, digest: int) -> None:
    """Vectors of xxHash's sanity check."""
    assert naive.xxh64(sanity_buffer(nbytes), seed) == digest


VECTORS = [
    (8, 0, 0xCDBCF538E71D1348),
    (8, PRIME32, 0xFE0C047A5353CDAC),
    (24, 0, 0xF75A6DEA42DC5BF4),
    (24, PRIME32, 0x8B7C67EB59778E22),
    (32, 0, 0x18B216492BB44B70),
    (32, PRIME32, 0xB3F33BDF93ADE409),
    (64, 0, 0xEF558F8ACAC2B5CD),
    (64, PRIME32, 0xB5EEBA99264CC44F),
    (4096, 0, 0xAB77F4AF85F4E70B),
    (4096, PRIME32, 0xCB8B60CBA513125D),
]
"""Of the same bytes, as the reference implementation (0.8.4) digests them."""


@pytest.mark.parametrize(("nbytes", "seed", "digest"), VECTORS)
def test_digests_are_xxh64(nbytes: int, seed: int, digest: int) -> None:
    content = sanity_buffer(nbytes)
    assert naive.xxh64(content, seed) == digest
    out = np.zeros(1, np.uint64)
    pagehash.chunk_digests(np.frombuffer(content, "<u8"), nbytes // 8, seed, out)
    assert int(out[0]) == digest
    if nbytes % 32 == 0:
        # as one of four that take turns, and as what is left over
        assert digests_of(5 * content, nbytes, seed) == 5 * [digest]


def test_seeds_are_random_and_of_64_bits() -> None:
    seeds = {pagehash.new_seed() for _ in range(64)}
    assert len(seeds) == 64
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert max(seeds) >= 2**60


# --- against the oracle ---------------------------------------------------------------------------


@given(st.data(), NPAGES, SIZES, SEEDS)
def test_page_digests(data: st.DataObject, npages: int, page_size: int, seed: int) -> None:
    """What is in memory where there is a hole does not count: it is not looked at."""
    content = random_bytes(npages * page_size, data.draw(st.integers(0, 9)))
    there = data.draw(subsets(npages))
    edges = st.integers(0, npages)
    first, cut, last = sorted(data.draw(st.tuples(edges, edges, edges)))
    digests = np.full(npages, 7, np.uint64)
    words = naive.words_of(there, npages)
    for start, stop in ((first, cut), (cut, last)):
        pagehash.page_digests(memory_of(content), page_size, words, seed, digests, start, stop)
    wanted = naive.page_digests(content, page_size, there, seed)
    assert digests.tolist() == [
        digest if first <= page < last else 7 for page, digest in enumerate(wanted)
    ]


@given(st.data(), NPAGES, SIZES, SEEDS)
def test_selected_digests(data: st.DataObject, npages: int, page_size: int, seed: int) -> None:
    content = random_bytes(npages * page_size, data.draw(st.integers(0, 9)))
    there, selected = data.draw(subsets(npages)), data.draw(subsets(npages))
    edges = st.integers(0, (npages + 63) // 64)
    first, last = sorted(data.draw(st.tuples(edges, edges)))
    room = data.draw(st.integers(0, 3))
    wanted = naive.page_digests(content, page_size, there, seed)
    wanted = [wanted[page] for page in sorted(selected) if 64 * first <= page < 64 * last]
    digests = np.full(len(wanted) + room, 7, np.uint64)
    count = pagehash.selected_digests(
        memory_of(content),
        page_size,
        naive.words_of(selected, npages),
        naive.words_of(there, npages),
        seed,
        digests,
        first,
        last,
    )
    assert count == len(wanted)
    assert digests.tolist() == wanted + room * [7]


@given(st.data(), st.integers(0, 70), st.integers(1, 80), SEEDS)
@example(data=None, npages=0, pages_per_chunk=1, seed=0)
def test_chunk_digests(
    data: st.DataObject | None, npages: int, pages_per_chunk: int, seed: int
) -> None:
    content = random_bytes(8 * npages, data.draw(st.integers(0, 9)) if data else 0)
    starts = range(0, 8 * npages, 8 * pages_per_chunk)
    out = np.zeros(len(starts), np.uint64)
    pagehash.chunk_digests(np.frombuffer(content, "<u8"), pages_per_chunk, seed, out)
    assert out.tolist() == [
        naive.xxh64(content[start : start + 8 * pages_per_chunk], seed) for start in starts
    ]


@given(st.data(), NPAGES)
def test_differing(data: st.DataObject, npages: int) -> None:
    changed, before = data.draw(subsets(npages)), data.draw(subsets(npages))
    a = np.frombuffer(random_bytes(8 * npages, 1), np.uint64)
    b = a.copy()
    for page in changed:
        b[page] ^= np.uint64(1 << data.draw(st.sampled_from([0, 31, 63])))
    words = naive.words_of(before, npages)
    assert pagehash.differing(a, b, words) == len(changed)
    assert naive.pages_of(words) == before | changed


# --- what digests tell, and what they do not ------------------------------------------------------


@given(st.integers(0, 8 * PAGE - 1), SEEDS)
def test_one_bit_more_or_less_is_another_digest_and_back_again_is_the_first(
    bit: int, seed: int
) -> None:
    page = bytearray(random_bytes(PAGE, 3))
    found = []
    for _ in range(3):
        found += digests_of(bytes(page), PAGE, seed)
        page[bit // 8] ^= 1 << bit % 8
    assert found[0] == found[2] != found[1]


def test_every_bit_of_a_small_page_counts() -> None:
    pages = np.tile(memory_of(random_bytes(160, 4)), (8 * 160 + 1, 1))
    for bit in range(8 * 160):
        pages[bit, bit // 8] ^= 1 << bit % 8
    assert len(set(digests_of(pages.tobytes(), 160, 5))) == 8 * 160 + 1


def test_two_pages_can_be_made_that_have_one_digest_for_half_of_all_seeds() -> None:
    """The limit that the module names: random seeds are no defence against made collisions."""
    one, two = int(xxh64.PRIME_1), int(xxh64.PRIME_2)
    a = [0] * 512
    b = a.copy()
    b[0] ^= 1 << 63  # after the rotation: 2**30 more or less, as the seed has it
    b[4] = (b[4] - (one << 30) * pow(two, -1, 2**64)) % 2**64  # the next word of that accumulator
    pages = np.array([a, b], np.uint64).tobytes()
    seeds = [naive.xxh64(bytes([i]), 0) for i in range(40)]
    collisions = sum(len(set(digests_of(pages, PAGE, seed))) == 1 for seed in seeds)
    assert 10 < collisions < 30


def test_memory_need_not_be_aligned() -> None:
    content = random_bytes(5 * 64, 6)
    memory = memory_of(b"\0" + content)[1:]
    assert memory.ctypes.data % 8
    digests = np.zeros(5, np.uint64)
    data = naive.words_of(range(5), 5)
    pagehash.page_digests(memory, 64, data, 9, digests, 0, 5)
    assert digests.tolist() == naive.page_digests(content, 64, set(range(5)), 9)


@pytest.mark.parametrize("writable", [False, True])
def test_holes_are_not_filled(writable: bool) -> None:
    """Nor is anything but data read: told it were data, a hole gets filled."""
    kinds = ["data", "hole", "zeros", "hole", "hole", "data", "data", "data", "data"]
    npages = len(kinds)
    with tmpfs_files((kinds, 3)) as (file,):
        memory = file.map(writable)
        digests, some = np.zeros(npages, np.uint64), np.zeros(npages, np.uint64)
        everything = naive.words_of(range(npages), npages)
        before = file.data()
        words = naive.words_of(before, npages)
        blocks = os.fstat(file.fd).st_blocks
        assert blocks * 512 == 6 * PAGE
        pagehash.page_digests(memory, PAGE, words, 1, digests, 0, npages)
        pagehash.selected_digests(memory, PAGE, everything, words, 1, some, 0, 1)
        assert file.data() == before
        assert os.fstat(file.fd).st_blocks == blocks
        wanted = naive.page_digests(file.content(), PAGE, set(range(npages)), 1)
        assert digests.tolist() == some.tolist() == wanted

        pagehash.page_digests(memory, PAGE, everything, 1, digests, 0, npages)
        assert digests.tolist() == wanted
        assert os.fstat(file.fd).st_blocks * 512 == npages * PAGE


# --- refusals -------------------------------------------------------------------------------------


def refusals() -> Iterator[object]:
    one, two = np.ones(1, np.uint64), np.zeros(2, np.uint64)
    none, past = np.zeros(0, np.uint64), np.array([2], np.uint64)
    page, odd = np.zeros(64, np.uint8), np.zeros(72, np.uint8)

    def refusal(name: str, function: Callable[..., object], *arguments: object) -> object:
        return pytest.param(function, arguments, id=name)

    pages, selected = pagehash.page_digests, pagehash.selected_digests
    yield refusal("pages memory", pages, odd, 64, one, 0, one, 0, 1)
    yield refusal("pages size 0", pages, page, 0, one, 0, one, 0, 1)
    yield refusal("pages size 16", pages, page, 16, one * 15, 0, np.zeros(4, np.uint64), 0, 1)
    yield refusal("pages size 72", pages, odd, 72, one, 0, one, 0, 1)
    yield refusal("pages data", pages, page, 64, two, 0, one, 0, 1)
    yield refusal("pages data tail", pages, page, 64, past, 0, one, 0, 1)
    yield refusal("pages few digests", pages, page, 64, one, 0, none, 0, 1)
    yield refusal("pages many digests", pages, page, 64, one, 0, two, 0, 1)
    yield refusal("pages negative slice", pages, page, 64, one, 0, one, -1, 1)
    yield refusal("pages slice", pages, page, 64, one, 0, one, 0, 2)
    yield refusal("selected memory", selected, odd, 64, one, one, 0, one, 0, 1)
    yield refusal("selected size 72", selected, odd, 72, one, one, 0, one, 0, 1)
    yield refusal("selected selected", selected, page, 64, two, one, 0, one, 0, 1)
    yield refusal("selected selected tail", selected, page, 64, past, one, 0, one, 0, 1)
    yield refusal("selected data", selected, page, 64, one, two, 0, one, 0, 1)
    yield refusal("selected data tail", selected, page, 64, one, past, 0, one, 0, 1)
    yield refusal("selected room", selected, page, 64, one, one, 0, none, 0, 1)
    yield refusal("selected negative slice", selected, page, 64, one, one, 0, one, -1, 1)
    yield refusal("selected slice", selected, page, 64, one, one, 0, one, 0, 2)
    yield refusal("chunks of none", pagehash.chunk_digests, two, 0, 0, two)
    yield refusal("chunks few", pagehash.chunk_digests, two, 1, 0, one)
    yield refusal("chunks many", pagehash.chunk_digests, two, 2, 0, two)
    yield refusal("differing digests", pagehash.differing, one, two, one)
    yield refusal("differing words", pagehash.differing, one, one, two)
    yield refusal("differing tail", pagehash.differing, one, one, past)
    for seed in (-1, 2**64):
        yield refusal(f"pages seed {seed}", pages, page, 64, one, seed, one, 0, 1)
        yield refusal(f"selected seed {seed}", selected, page, 64, one, one, seed, one, 0, 1)
        yield refusal(f"chunks seed {seed}", pagehash.chunk_digests, two, 2, seed, one)


@pytest.mark.parametrize(("function", "arguments"), list(refusals()))
def test_what_does_not_fit_is_refused(
    function: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    with pytest.raises(BitmapError):
        function(*arguments)


# --- before a migration ---------------------------------------------------------------------------

USE = """
import mmap, os, sys
import numpy as np
from tracker.bits import words as kernels
from tracker.memory import pagehash, xxh64

def signatures():
    modules = kernels, pagehash, xxh64
    found = {n: k for m in modules for n, k in vars(m).items() if hasattr(k, "signatures")}
    return {n: list(k.signatures) for n, k in found.items()}

if sys.argv[1] == "warm":
    pagehash.warm_up()
before = signatures()
size = 65 * 4096
fd = os.memfd_create("ram")
os.ftruncate(fd, size)
words, digests, out = np.ones(2, np.uint64), np.zeros(65, np.uint64), np.zeros(9, np.uint64)
for protection in (mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE):
    memory = np.frombuffer(mmap.mmap(fd, size, prot=protection), np.uint8)
    for seed in (0, 2**63, np.uint64(5), np.int64(5)):
        pagehash.page_digests(memory, 4096, words, seed, digests, 0, 65)
        pagehash.selected_digests(memory, 4096, words, words, seed, digests, 0, 2)
        pagehash.chunk_digests(digests, 8, seed, out)
pagehash.differing(digests, digests.copy(), words)
print(sorted(n for n, s in signatures().items() if s != before[n]))
"""


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("warm", [True, False])
def test_nothing_is_compiled_after_warm_up(warm: bool) -> None:
    command = [sys.executable, "-c", USE, "warm" if warm else "cold"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    if warm:
        assert child.stdout == "[]\n"
    else:
        for name in ("_hash_range", "_hash_selected", "_hash_chunks", "differing"):
            assert f"'{name}'" in child.stdout
