"""Every kernel against the naive oracle, on real files where it touches files.

This module runs twice: compiled, and as plain Python in a child with ``NUMBA_DISABLE_JIT=1``
(:func:`test_the_same_as_plain_python`).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numba.core.registry import CPUDispatcher
from numpy.typing import NDArray

from tests.conftest import require
from tests.tracker import naive
from tracker import kernels
from tracker.errors import BitmapError

PAGE = mmap.PAGESIZE
SHM = Path("/dev/shm")
INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT") == "1"
ROOT = Path(__file__).parents[2]

# a word less, a word, a word more; and the empty block
NPAGES = st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129]) | st.integers(0, 260)
Words = NDArray[np.uint64]


@st.composite
def subsets(draw: st.DrawFn, npages: int) -> set[int]:
    """Some of the pages: as patterns of whole words, where the shortcuts of the kernels are."""
    patterns = [0, 2**64 - 1, 1, 1 << 63, 0x5555_5555_5555_5555, 2**63 - 1, 2**64 - 2]
    word = st.sampled_from(patterns) | st.integers(0, 2**64 - 1)
    nwords = (npages + 63) // 64
    words = draw(st.lists(word, min_size=nwords, max_size=nwords))
    return {p for p in range(npages) if words[p // 64] >> (p % 64) & 1}


def test_it_is_the_compiled_kernels_that_are_tested_or_not() -> None:
    assert isinstance(kernels.popcount, CPUDispatcher) is not INTERPRETED


# --- bits -----------------------------------------------------------------------------------------


@given(st.data())
def test_set_algebra(data: st.DataObject) -> None:
    npages = data.draw(NPAGES)
    a, b = data.draw(subsets(npages)), data.draw(subsets(npages))
    words, other = naive.words_of(a, npages), naive.words_of(b, npages)

    assert kernels.popcount(words) == len(a)
    union, counted, rest = words.copy(), words.copy(), words.copy()
    kernels.or_into(union, other)
    assert naive.pages_of(union) == a | b
    assert kernels.or_count(counted, other) == len(b - a)
    assert naive.pages_of(counted) == a | b
    kernels.minus_into(rest, other)
    assert naive.pages_of(rest) == a - b
    assert naive.pages_of(other) == b


@given(st.data())
def test_runs(data: st.DataObject) -> None:
    npages = data.draw(NPAGES)
    pages = data.draw(subsets(npages))
    starts, lengths = kernels.runs(naive.words_of(pages, npages))
    assert starts.dtype == lengths.dtype == np.int64
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == naive.runs(pages)


@pytest.mark.parametrize("npages", [1, 63, 64, 65, 128])
def test_a_run_may_reach_the_last_page(npages: int) -> None:
    for start in range(npages):
        starts, lengths = kernels.runs(naive.words_of(range(start, npages), npages))
        assert (starts.tolist(), lengths.tolist()) == ([start], [npages - start])


@given(st.data())
def test_set_ranges(data: st.DataObject) -> None:
    npages = data.draw(NPAGES)
    before = data.draw(subsets(npages))
    edge = st.integers(0, npages)
    ranges = [sorted(data.draw(st.tuples(edge, edge))) for _ in range(data.draw(st.integers(0, 5)))]
    n = data.draw(st.integers(0, len(ranges)))
    words = naive.words_of(before, npages)
    starts = np.array([start for start, _ in ranges], np.int64)
    stops = np.array([stop for _, stop in ranges], np.int64)
    kernels.set_ranges(words, starts, stops, n)
    wanted = before.union(*(range(start, stop) for start, stop in ranges[:n]))
    assert naive.pages_of(words) == wanted


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
    kernels.spread(
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
        kernels.spread(bits, first, nbits, bit_size, words, page_size, offset)

    spread(**fitting)
    with pytest.raises(BitmapError):
        spread(**fitting | change)


@given(st.data(), st.sampled_from([4096, 1 << 21]), st.sampled_from([0, 0x7F12_3456_7000]))
def test_set_regions_never_under_reports(data: st.DataObject, page_size: int, base: int) -> None:
    npages = data.draw(NPAGES)
    # bytes, and not aligned: what a scan in 4 KiB steps says about 2 MiB pages, and worse
    edge = st.integers(0, npages * page_size) | st.integers(0, npages).map(lambda p: p * page_size)
    regions = [
        sorted(data.draw(st.tuples(edge, edge))) for _ in range(data.draw(st.integers(0, 4)))
    ]
    vector = np.zeros((5, 3), np.uint64)
    for row, (start, end) in zip(vector, regions, strict=False):
        row[:] = base + start, base + end, 1
    words = naive.words_of(set(), npages)
    kernels.set_regions(words, vector, len(regions), base, page_size)
    wanted = set[int]().union(*(naive.touched(s, e, page_size) for s, e in regions))
    assert naive.pages_of(words) == wanted


@pytest.mark.parametrize(
    ("start", "end", "pages"),
    [
        (0, 0, set()),
        (4095, 4096, {0}),
        (4096, 4097, {1}),
        (4095, 4097, {0, 1}),
        (1, 63 * 4096 + 1, set(range(64))),
        (63 * 4096, 65 * 4096, {63, 64}),
    ],
)
def test_a_region_counts_for_every_page_it_touches(start: int, end: int, pages: set[int]) -> None:
    words = naive.words_of(set(), 70)
    kernels.set_regions(words, np.array([[start, end, 1]], np.uint64), 1, 0, 4096)
    assert naive.pages_of(words) == pages


@pytest.mark.parametrize(
    ("start", "end"),
    [(-1, 1), (0, 64 * 4096 + 1), (4096, 0), (-8192, -4096), (2**63, 2**63 + 4096)],
    ids=["before", "after", "backwards", "elsewhere", "kernel"],
)
def test_regions_outside_the_words_are_refused(start: int, end: int) -> None:
    words, base = np.zeros(1, np.uint64), 1 << 30
    vector = np.array([[base + start, base + end, 1]], np.uint64)
    with pytest.raises(BitmapError):
        kernels.set_regions(words, vector, 1, base, 4096)
    assert not words.any()


@pytest.mark.parametrize("page_size", [0, -4096, 3000])
def test_page_sizes_of_regions_are_powers_of_two(page_size: int) -> None:
    with pytest.raises(BitmapError):
        kernels.set_regions(np.zeros(1, np.uint64), np.zeros((1, 3), np.uint64), 1, 0, page_size)


def refusals() -> Iterator[object]:
    one, two = np.zeros(1, np.uint64), np.zeros(2, np.uint64)
    past = np.array([2], np.uint64)
    row, rows = np.zeros(1, np.int64), np.zeros((1, 3), np.uint64)
    page, pages = np.zeros(PAGE, np.uint8), np.zeros(2 * PAGE, np.uint8)
    odd = np.zeros(PAGE + 8, np.uint8)

    def refusal(name: str, kernel: Callable[..., object], *arguments: object) -> object:
        return pytest.param(kernel, arguments, id=name)

    yield refusal("or_into", kernels.or_into, one, two)
    yield refusal("or_count", kernels.or_count, two, one)
    yield refusal("minus_into", kernels.minus_into, one, two)
    yield refusal("too few ranges", kernels.set_ranges, one, row, row, 2)
    yield refusal("range beyond", kernels.set_ranges, one, row, row + 65, 1)
    yield refusal("range before", kernels.set_ranges, one, row - 1, row, 1)
    yield refusal("too few regions", kernels.set_regions, one, rows, 2, 0, PAGE)
    yield refusal("no regions", kernels.set_regions, one, rows[:, :2].copy(), 1, 0, PAGE)
    yield refusal("zero_pages words", kernels.zero_pages, page, PAGE, two, two)
    yield refusal("zero_pages tail", kernels.zero_pages, page, PAGE, past, one)
    yield refusal("zero_pages memory", kernels.zero_pages, odd, PAGE, one, one)
    yield refusal("zero_pages page size", kernels.zero_pages, page, 0, one, one)
    yield refusal("seek_data words", kernels.seek_data, -1, 1, PAGE, two)
    for i in range(4):
        for name, bad in (("length", two), ("tail", past)):
            w = [bad if j == i else one for j in range(4)]
            yield refusal(f"copy {name} {i}", kernels.copy_pages, page, page, -1, PAGE, *w, 0, 1)
            if i < 3:
                yield refusal(
                    f"compare {name} {i}", kernels.compare_pages, page, page, PAGE, *w[:3], 0, 1
                )
    w = [one] * 4
    yield refusal("copy memory", kernels.copy_pages, page, pages, -1, PAGE, *w, 0, 1)
    yield refusal("copy without memory", kernels.copy_pages, page, page[:0], -1, PAGE, *w, 0, 1)
    yield refusal("copy slice", kernels.copy_pages, page, page, -1, PAGE, *w, 0, 2)
    yield refusal("copy negative slice", kernels.copy_pages, page, page, -1, PAGE, *w, -1, 1)
    yield refusal("compare memory", kernels.compare_pages, page, pages, PAGE, *w[:3], 0, 1)
    yield refusal("compare slice", kernels.compare_pages, page, page, PAGE, *w[:3], 0, 2)


@pytest.mark.parametrize(("kernel", "arguments"), list(refusals()))
def test_what_does_not_fit_is_refused(
    kernel: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    with pytest.raises(BitmapError):
        kernel(*arguments)


# --- pages ----------------------------------------------------------------------------------------


@given(st.data(), st.sampled_from([64, 4096]))
def test_zero_pages(data: st.DataObject, page_size: int) -> None:
    npages = data.draw(NPAGES)
    memory = np.zeros(npages * page_size, np.uint8)
    for page in data.draw(subsets(npages)):
        offset = data.draw(st.sampled_from([0, 1, 7, 8, 63, page_size - 1]))
        memory[page * page_size + offset] = data.draw(st.sampled_from([1, 128]))
    asked = data.draw(subsets(npages))
    found = naive.words_of(data.draw(subsets(npages)), npages)  # stale: to be overwritten
    kernels.zero_pages(memory, page_size, naive.words_of(asked, npages), found)
    assert naive.pages_of(found) == asked & naive.zeros(memory.tobytes(), page_size)


class TmpfsFile:
    """A file of ``npages`` pages in /dev/shm: ``kinds`` says of each whether it is there."""

    def __init__(self, path: Path, kinds: list[str], fill: int) -> None:
        self.npages = len(kinds)
        self.nbytes = self.npages * PAGE
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(self.fd, self.nbytes)
        for page, kind in enumerate(kinds):
            if kind != "hole":
                content = bytes(PAGE) if kind == "zeros" else bytes([fill]) + bytes(PAGE - 1)
                os.pwrite(self.fd, content, page * PAGE)

    def map(self, writable: bool) -> NDArray[np.uint8]:
        if not self.nbytes:
            return np.zeros(0, np.uint8)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return np.frombuffer(mmap.mmap(self.fd, self.nbytes, prot=protection), np.uint8)

    def data(self) -> set[int]:
        """Pages that are there, of which the file system says as many."""
        pages = naive.data(self.fd, self.npages, PAGE)
        assert os.fstat(self.fd).st_blocks * 512 == len(pages) * PAGE
        return pages

    def content(self) -> bytes:
        """All bytes, read without allocating anything."""
        return os.pread(self.fd, self.nbytes, 0)


@contextmanager
def tmpfs_files(*contents: tuple[list[str], int]) -> Iterator[list[TmpfsFile]]:
    require(None if os.access(SHM, os.W_OK) else "/dev/shm is not writable")
    with TemporaryDirectory(dir=SHM) as directory:
        files = [TmpfsFile(Path(directory, str(i)), *c) for i, c in enumerate(contents)]
        try:
            yield files
        finally:
            for file in files:
                os.close(file.fd)


KINDS = st.sampled_from(["hole", "zeros", "data"])


@st.composite
def two_sides(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    npages = draw(st.sampled_from([0, 1, 63, 64, 65, 129]) | st.integers(0, 70))
    side = st.lists(KINDS, min_size=npages, max_size=npages)
    # long runs of a kind, or none
    return draw(side | KINDS.map(lambda k: [k] * npages)), draw(
        side | KINDS.map(lambda k: [k] * npages)
    )


def test_reading_a_hole_through_a_mapping_fills_it() -> None:
    """What the tests below find absent can be found."""
    with tmpfs_files((["hole", "data", "hole"], 1)) as (file,):
        memory = file.map(writable=False)
        assert file.data() == {1}
        assert memory[0] == 0
        assert file.data() == {0, 1}


@pytest.mark.parametrize("by", ["pwrite", "mapping"])
@given(sides=two_sides(), data=st.data())
@example(sides=(["data"] * 600, ["hole"] * 600), data=None)  # more than one longest copy
def test_copy_pages(
    by: str, sides: tuple[list[str], list[str]], data: st.DataObject | None
) -> None:
    npages = len(sides[0])
    asked = data.draw(subsets(npages)) if data else set(range(npages))
    with tmpfs_files((sides[0], 1), (sides[1], 2)) as (src, dst):
        src_data, dst_data = src.data(), dst.data()
        before = dst.content()
        zeros = naive.zeros(src.content(), PAGE)
        dirty, held = naive.words_of(asked, npages), naive.words_of(src_data, npages)
        present = naive.words_of(dst_data, npages)
        # stale bits would punch out pages that are data again
        cleared = naive.words_of(range(npages), npages)
        target = dst.map(writable=True) if by == "mapping" else np.zeros(0, np.uint8)
        cut = data.draw(st.integers(0, len(dirty))) if data else len(dirty) // 2
        copied = left_out = 0
        for part in ((0, cut), (cut, len(dirty))):
            result = kernels.copy_pages(
                src.map(writable=False),
                target,
                dst.fd if by == "pwrite" else -1,
                PAGE,
                dirty,
                held,
                present,
                cleared,
                *part,
            )
            assert result[2] == 0
            copied, left_out = copied + result[0], left_out + result[1]

        skipped = asked & src_data & zeros - dst_data
        assert left_out == len(skipped)
        assert copied == len(asked & src_data - skipped)
        assert naive.pages_of(cleared) == asked & dst_data - src_data
        assert src.data() == src_data, "a hole of the source was read"
        assert dst.data() == dst_data | (asked & src_data - skipped)
        assert naive.pages_of(present) == dst.data()

        to_clear = asked & dst_data - src_data
        assert not to_clear & naive.differing(before, dst.content(), PAGE)
        assert kernels.punch_pages(dst.fd, PAGE, cleared) == 0  # the caller's part
        assert dst.data() == naive.pages_of(present) - to_clear
        assert not asked & naive.differing(src.content(), dst.content(), PAGE)
        assert not naive.differing(before, dst.content(), PAGE) - asked


def copy_all(
    src: TmpfsFile, memory: NDArray[np.uint8], fd: int
) -> tuple[tuple[int, int, int], Words]:
    full = naive.words_of(range(src.npages), src.npages)
    present, cleared = np.zeros_like(full), np.zeros_like(full)
    source = src.map(writable=False)
    args = (full, full, present, cleared, 0, len(full))
    return kernels.copy_pages(source, memory, fd, PAGE, *args), present


def test_a_short_write_goes_on_and_the_failing_one_is_told() -> None:
    """A file that may not grow takes a half of the one long copy, and then says EPERM."""
    with tmpfs_files((["data"] * 100, 1)) as (src,):
        fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, 50 * PAGE)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
            (_, _, error), present = copy_all(src, np.zeros(0, np.uint8), fd)
            assert error == errno.EPERM
            assert os.pread(fd, 100 * PAGE, 0) == src.content()[: 50 * PAGE]
            # what was written, and what was not, counts as present: none is missing
            assert naive.pages_of(present) == set(range(100))
        finally:
            os.close(fd)


def test_a_descriptor_that_cannot_be_written_is_an_errno() -> None:
    with tmpfs_files((["data"], 1), (["hole"], 2)) as (src, dst):
        fd = os.open(dst.path, os.O_RDONLY)
        try:
            (_, _, error), _ = copy_all(src, np.zeros(0, np.uint8), fd)
        finally:
            os.close(fd)
        assert error == errno.EBADF
        assert dst.data() == set()


def test_a_mapping_past_the_end_of_its_file_is_an_errno_and_no_sigbus() -> None:
    with tmpfs_files((["data"] * 4, 1), (["hole"] * 4, 2)) as (src, dst):
        memory = dst.map(writable=True)
        os.ftruncate(dst.fd, 2 * PAGE)
        (_, _, error), _ = copy_all(src, memory, -1)
        assert error == errno.EFAULT


def test_a_plain_store_past_the_end_of_the_file_is_a_sigbus() -> None:
    """What the test above would end in, did the kernel not ask for the memory first."""
    store = (
        "import mmap, os; fd = os.memfd_create('x'); os.ftruncate(fd, 2 * mmap.PAGESIZE); "
        "m = mmap.mmap(fd, 0); os.ftruncate(fd, 0); m[0] = 1"
    )
    child = subprocess.run([sys.executable, "-c", store], capture_output=True, check=False)
    assert child.returncode == -signal.SIGBUS


@pytest.mark.parametrize("by", ["pwrite", "mapping"])
def test_a_full_tmpfs_is_an_errno_and_no_sigbus(by: str, tmp_path: Path) -> None:
    require("mounting a tmpfs needs root" if os.geteuid() else None)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={8 * PAGE}", "small", str(tmp_path)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    require(mounted.stderr if mounted.returncode else None)
    try:
        with tmpfs_files((["data"] * 16, 1)) as (src,):
            dst = TmpfsFile(tmp_path / "ram", ["hole"] * 16, 0)
            memory = dst.map(writable=True)
            by_fd = by == "pwrite"
            try:
                (_, _, error), present = copy_all(src, memory, dst.fd if by_fd else -1)
                assert error == (errno.ENOSPC if by_fd else errno.EFAULT)
                assert dst.data() <= naive.pages_of(present)
            finally:
                del memory
                os.close(dst.fd)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@given(sides=two_sides(), data=st.data())
def test_compare_pages(sides: tuple[list[str], list[str]], data: st.DataObject) -> None:
    npages = len(sides[0])
    with tmpfs_files((sides[0], 1), (sides[1], data.draw(st.sampled_from([1, 2])))) as (a, b):
        for page in data.draw(st.sets(st.integers(0, max(0, npages - 1)), max_size=3)):
            if page in b.data():
                os.pwrite(b.fd, b"\x07", (page + 1) * PAGE - 1)
        a_data, b_data = a.data(), b.data()
        wanted = naive.differing(a.content(), b.content(), PAGE)
        words = naive.words_of(a_data, npages), naive.words_of(b_data, npages)
        found = naive.words_of(range(npages), npages)
        cut = data.draw(st.integers(0, len(found)))
        count = sum(
            kernels.compare_pages(a.map(False), b.map(True), PAGE, *words, found, first, last)
            for first, last in ((0, cut), (cut, len(found)))
        )
        assert naive.pages_of(found) == wanted
        assert count == len(wanted)
        assert (a.data(), b.data()) == (a_data, b_data), "a hole was read"


@given(sides=two_sides(), scale=st.sampled_from([1, 4]))
def test_seek_data(sides: tuple[list[str], list[str]], scale: int) -> None:
    with tmpfs_files((sides[0], 1)) as (file,):
        npages, page_size = file.npages // scale, PAGE * scale
        found = naive.words_of(range(npages), npages)
        assert kernels.seek_data(file.fd, npages, page_size, found) == 0
        assert naive.pages_of(found) == naive.data(file.fd, npages, page_size)
        assert naive.pages_of(found) == {
            p for p in range(npages) if set(sides[0][p * scale : (p + 1) * scale]) != {"hole"}
        }


@pytest.mark.parametrize("kind", ["hole", "data"])
def test_a_file_that_shrank_is_no_file_of_holes(kind: str) -> None:
    with tmpfs_files(([kind] * 100, 1)) as (file,):
        words = naive.words_of(set(), 100)
        assert kernels.seek_data(file.fd, 100, PAGE, words) == 0
        os.ftruncate(file.fd, 100 * PAGE - 1)
        assert kernels.seek_data(file.fd, 100, PAGE, words) == errno.ENXIO


def test_what_cannot_be_punched_is_an_errno() -> None:
    with tmpfs_files((["data"] * 3, 1)) as (file,):
        fd = os.open(file.path, os.O_RDONLY)
        try:
            words = naive.words_of({1}, 3)
            assert kernels.punch_pages(fd, PAGE, words) == errno.EBADF
            assert kernels.punch_pages(fd, PAGE, naive.words_of(set(), 3)) == 0
            assert file.data() == {0, 1, 2}
        finally:
            os.close(fd)


def test_what_cannot_seek_is_an_errno() -> None:
    words = naive.words_of(set(), 1)
    assert kernels.seek_data(-1, 1, PAGE, words) == errno.EBADF
    reading, writing = os.pipe()
    try:
        assert kernels.seek_data(reading, 1, PAGE, words) == errno.ESPIPE
    finally:
        os.close(reading)
        os.close(writing)


# --- the other mode, and before a migration -------------------------------------------------------

MIGRATION = """
import mmap, os, sys
import numpy as np
from tracker import kernels
from tracker.bitmap import DirtyBitmap
from tracker.merge import merge

def signatures():
    found = {n: k.signatures for n, k in vars(kernels).items() if hasattr(k, "signatures")}
    assert len(found) > 10
    return {n: list(s) for n, s in found.items()}

if sys.argv[1] == "warm":
    kernels.warm_up()
before = signatures()
size = 65 * 4096
fd = os.memfd_create("ram")
os.ftruncate(fd, size)
ro = np.frombuffer(mmap.mmap(fd, size, prot=mmap.PROT_READ), np.uint8)
rw = np.frombuffer(mmap.mmap(fd, size), np.uint8)
a, b, c = DirtyBitmap.empty(65), DirtyBitmap.full(65), DirtyBitmap.from_pages(65, [1, 64])
regions = np.zeros((2, 3), np.uint64)
regions[0] = 0x7f00_0000_0000, 0x7f00_0000_2000, 1
a.set_regions(regions, 1, 0x7f00_0000_0000, 4096)
kernels.spread(c.words, 1, 64, 4096, a.words, 4096, 0)
kernels.set_regions(a.words, regions, 1, 0x7f00_0000_0000, 4096)
assert kernels.seek_data(fd, 65, 4096, c.words) == 0
a |= b | c
a.add(c), a.minus(b).any(), a.count(), a.runs(), a == b, repr(a), a.clear(), a.set_range(1, 3)
merge({"ram": 65}, {"x": {"ram": a}, "y": {"ram": b}})
w = a.words, b.words, c.words
for src in (ro, rw):
    kernels.zero_pages(src, 4096, *w[:2])
    for dst, dst_fd in ((rw, -1), (rw, fd), (rw[:0], fd)):
        kernels.copy_pages(src, dst, dst_fd, 4096, *w, DirtyBitmap(65).words, 0, 2)
    kernels.punch_pages(fd, 4096, a.words)
    for other in (ro, rw):
        kernels.compare_pages(src, other, 4096, *w, 0, 2)
compiled = {n: s for n, s in signatures().items() if s != before[n]}
print(sorted(compiled))
"""


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("warm", [True, False])
def test_nothing_is_compiled_after_warm_up(warm: bool) -> None:
    command = [sys.executable, "-c", MIGRATION, "warm" if warm else "cold"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    if warm:
        assert child.stdout == "[]\n"
    else:
        for name in ("fill", "copy_pages", "compare_pages", "seek_data", "find_runs", "or_into"):
            assert f"'{name}'" in child.stdout


@pytest.mark.skipif(INTERPRETED, reason="this is the child")
def test_the_same_as_plain_python() -> None:
    modules = [
        str(Path(__file__).with_name(f"test_{m}.py"))
        for m in ("kernels", "bitmap", "iova", "merge")
    ]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *modules],
        cwd=ROOT,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
