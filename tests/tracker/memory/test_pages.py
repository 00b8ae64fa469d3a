"""The kernels that touch memory and files, on real ones; compiled and as plain Python."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.conftest import require
from tests.tracker import naive
from tests.tracker.bits.test_words import NPAGES, PAGE, subsets
from tests.tracker.mapper import small_tmpfs
from tracker.errors import BitmapError
from tracker.memory import pages

SHM = Path("/dev/shm")
Words = NDArray[np.uint64]


def refusals() -> Iterator[object]:
    one, two = np.zeros(1, np.uint64), np.zeros(2, np.uint64)
    past = np.array([2], np.uint64)
    page, twice = np.zeros(PAGE, np.uint8), np.zeros(2 * PAGE, np.uint8)
    odd = np.zeros(PAGE + 8, np.uint8)

    def refusal(name: str, kernel: Callable[..., object], *arguments: object) -> object:
        return pytest.param(kernel, arguments, id=name)

    yield refusal("zero_pages words", pages.zero_pages, page, PAGE, two, two)
    yield refusal("zero_pages tail", pages.zero_pages, page, PAGE, past, one)
    yield refusal("zero_pages memory", pages.zero_pages, odd, PAGE, one, one)
    yield refusal("zero_pages page size", pages.zero_pages, page, 0, one, one)
    yield refusal("seek_data words", pages.seek_data, -1, 1, PAGE, two)
    for i in range(4):
        for name, bad in (("length", two), ("tail", past)):
            w = [bad if j == i else one for j in range(4)]
            yield refusal(f"copy {name} {i}", pages.copy_pages, page, page, -1, PAGE, *w, 0, 1)
            if i < 3:
                yield refusal(
                    f"compare {name} {i}", pages.compare_pages, page, page, PAGE, *w[:3], 0, 1
                )
    w = [one] * 4
    yield refusal("copy memory", pages.copy_pages, page, twice, -1, PAGE, *w, 0, 1)
    yield refusal("copy without memory", pages.copy_pages, page, page[:0], -1, PAGE, *w, 0, 1)
    yield refusal("copy slice", pages.copy_pages, page, page, -1, PAGE, *w, 0, 2)
    yield refusal("copy negative slice", pages.copy_pages, page, page, -1, PAGE, *w, -1, 1)
    yield refusal("compare memory", pages.compare_pages, page, twice, PAGE, *w[:3], 0, 1)
    yield refusal("reserve slice", pages.reserve_pages, -1, PAGE, w[0], 0, 2)
    yield refusal("compare slice", pages.compare_pages, page, page, PAGE, *w[:3], 0, 2)


@pytest.mark.parametrize(("kernel", "arguments"), list(refusals()))
def test_what_does_not_fit_is_refused(
    kernel: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    with pytest.raises(BitmapError):
        kernel(*arguments)


@given(st.data(), st.sampled_from([64, 4096]))
def test_zero_pages(data: st.DataObject, page_size: int) -> None:
    npages = data.draw(NPAGES)
    memory = np.zeros(npages * page_size, np.uint8)
    for page in data.draw(subsets(npages)):
        offset = data.draw(st.sampled_from([0, 1, 7, 8, 63, page_size - 1]))
        memory[page * page_size + offset] = data.draw(st.sampled_from([1, 128]))
    asked = data.draw(subsets(npages))
    found = naive.words_of(data.draw(subsets(npages)), npages)  # stale: to be overwritten
    pages.zero_pages(memory, page_size, naive.words_of(asked, npages), found)
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
            result = pages.copy_pages(
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
        assert pages.punch_pages(dst.fd, PAGE, cleared) == 0  # the caller's part
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
    return pages.copy_pages(source, memory, fd, PAGE, *args), present


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
            pages.compare_pages(a.map(False), b.map(True), PAGE, *words, found, first, last)
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
        assert pages.seek_data(file.fd, npages, page_size, found) == 0
        assert naive.pages_of(found) == naive.data(file.fd, npages, page_size)
        assert naive.pages_of(found) == {
            p for p in range(npages) if set(sides[0][p * scale : (p + 1) * scale]) != {"hole"}
        }


@pytest.mark.parametrize("kind", ["hole", "data"])
def test_a_file_that_shrank_is_no_file_of_holes(kind: str) -> None:
    with tmpfs_files(([kind] * 100, 1)) as (file,):
        words = naive.words_of(set(), 100)
        assert pages.seek_data(file.fd, 100, PAGE, words) == 0
        os.ftruncate(file.fd, 100 * PAGE - 1)
        assert pages.seek_data(file.fd, 100, PAGE, words) == errno.ENXIO


@given(st.lists(KINDS, max_size=200), st.data())
def test_reserved_pages_keep_their_content_and_stay_holes(
    kinds: list[str], data: st.DataObject
) -> None:
    npages = len(kinds)
    wanted = data.draw(subsets(npages))
    first, last = sorted(data.draw(st.integers(0, (npages + 63) // 64)) for _ in range(2))
    with tmpfs_files((kinds, 1)) as (file,):
        content, held = file.content(), file.data()
        words = naive.words_of(wanted, npages)
        assert pages.reserve_pages(file.fd, PAGE, words, first, last) == 0
        reserved = {page for page in wanted if 64 * first <= page < 64 * last}
        assert os.fstat(file.fd).st_blocks * 512 == len(held | reserved) * PAGE
        assert naive.data(file.fd, npages, PAGE) == held
        assert file.content() == content


def test_what_cannot_be_reserved_is_an_errno(tmp_path: Path) -> None:
    words = naive.words_of({0, 2}, 3)
    assert pages.reserve_pages(-1, PAGE, words, 0, 1) == errno.EBADF
    with small_tmpfs(tmp_path / "small", f"{PAGE}") as small, (small / "file").open("wb") as file:
        assert pages.reserve_pages(file.fileno(), PAGE, words, 0, 1) == errno.ENOSPC
        assert pages.reserve_pages(file.fileno(), PAGE, words, 1, 1) == 0


def test_space_comes_back_while_pages_are_still_punched(tmp_path: Path) -> None:
    """A guest that needs some of it does not wait for all of it."""
    npages = 16 * pages.LONGEST_PUNCH // PAGE + 1
    words = naive.words_of(set(range(npages)), npages)
    seen: set[int] = set()
    with (
        small_tmpfs(tmp_path / "small", f"{npages * PAGE}") as small,
        (small / "file").open("wb") as file,
    ):
        fd = file.fileno()
        os.truncate(fd, npages * PAGE)
        for _ in range(20):  # a busy machine may not let us look in time
            assert pages.reserve_pages(fd, PAGE, words, 0, len(words)) == 0
            punching = threading.Thread(target=pages.punch_pages, args=(fd, PAGE, words))
            punching.start()
            while punching.is_alive():
                seen.add(os.fstatvfs(fd).f_bfree)
            punching.join()
            seen -= {0, os.fstatvfs(fd).f_bfree}
            assert os.fstat(fd).st_blocks == 0
            if len(seen) > 2:
                break
            seen.clear()
    assert len(seen) > 2  # one may come from elsewhere: to look at a file may update it


def test_what_cannot_be_punched_is_an_errno() -> None:
    with tmpfs_files((["data"] * 3, 1)) as (file,):
        fd = os.open(file.path, os.O_RDONLY)
        try:
            words = naive.words_of({1}, 3)
            assert pages.punch_pages(fd, PAGE, words) == errno.EBADF
            assert pages.punch_pages(fd, PAGE, naive.words_of(set(), 3)) == 0
            assert file.data() == {0, 1, 2}
        finally:
            os.close(fd)


def test_what_cannot_seek_is_an_errno() -> None:
    words = naive.words_of(set(), 1)
    assert pages.seek_data(-1, 1, PAGE, words) == errno.EBADF
    reading, writing = os.pipe()
    try:
        assert pages.seek_data(reading, 1, PAGE, words) == errno.ESPIPE
    finally:
        os.close(reading)
        os.close(writing)
