"""What a balloon and free page reporting do, on real files that a process has mapped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pagesets import page_set
from tests.profiles import examples
from tests.tracker import naive
from tests.tracker.mapper import PAGE, Ram, disk_directory, shm_directory
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.errors import BitmapError, SourceError
from tracker.sources.holes import Holes
from tracker.syscalls import watch_modifications

NPAGES = 200


@pytest.fixture
def on_tmpfs() -> Iterator[Ram]:
    with shm_directory() as directory:
        ram = Ram(directory / "ram", NPAGES)
        yield ram
        ram.end()


@pytest.fixture(params=["tmpfs", "disk"])
def ram(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ram]:
    where = shm_directory() if request.param == "tmpfs" else disk_directory(tmp_path)
    with where as directory:
        ram = Ram(directory / "ram", NPAGES)
        yield ram
        ram.end()


@pytest.fixture
def started() -> Iterator[Callable[[Ram], Holes]]:
    """Start the source; it is stopped in the end."""
    all_of_them: list[Holes] = []

    def start(ram: Ram) -> Holes:
        all_of_them.append(Holes(ram.pid, [ram.block]))
        all_of_them[-1].start()
        return all_of_them[-1]

    yield start
    for holes in all_of_them:
        holes.stop()


def collected(holes: Holes, written: set[int] | None = None) -> set[int]:
    """Collect; ``written`` as somebody else reports it, or nobody at all."""
    if written is None:
        report = holes.collect()
    else:
        report = holes.collect(page_set({"ram": DirtyBitmap.from_pages(NPAGES, sorted(written))}))
    assert report.keys() == {"ram"}
    assert report["ram"].npages == NPAGES
    return naive.pages_of(report["ram"].words)


def data(holes: Holes) -> set[int]:
    return naive.pages_of(holes.data["ram"].words)


Start = Callable[[Ram], Holes]

either_way = pytest.mark.parametrize("told", [False, True], ids=["alone", "told"])
"""Whether the source is told what was written."""


@either_way
def test_discarded_pages_are_reported_once(ram: Ram, started: Start, told: bool) -> None:
    for page in (0, 1, 2, 63, 64, NPAGES - 1):
        ram.fill(page, 1)
    holes = started(ram)
    assert data(holes) == {0, 1, 2, 63, 64, NPAGES - 1}
    nothing: set[int] | None = set() if told else None
    assert collected(holes, nothing) == set()
    ram.punch(0, 2)
    ram.punch(NPAGES - 1)
    assert collected(holes, nothing) == {0, 1, NPAGES - 1}
    assert data(holes) == {2, 63, 64}
    assert collected(holes, nothing) == set()


@either_way
def test_a_page_that_was_never_filled_is_not_discarded(
    ram: Ram, started: Start, told: bool
) -> None:
    holes = started(ram)
    ram.punch(0, NPAGES)
    assert collected(holes, set() if told else None) == set()


@either_way
def test_a_page_that_was_filled_later_and_then_discarded(
    ram: Ram, started: Start, told: bool
) -> None:
    holes = started(ram)
    ram.fill(7, 1)
    assert collected(holes, {7} if told else None) == set()
    assert data(holes) == {7}
    ram.punch(7)
    assert collected(holes, set() if told else None) == {7}


def test_discarded_and_written_again_is_for_others_to_report(ram: Ram, started: Start) -> None:
    ram.fill(7, 1)
    holes = started(ram)
    ram.punch(7)
    ram.fill(7, 2)
    assert collected(holes, {7}) == set()
    assert data(holes) == {7}


def test_as_many_written_as_discarded(ram: Ram, started: Start) -> None:
    ram.fill(7, 1)
    holes = started(ram)
    ram.punch(7)
    ram.fill(8, 1)
    assert collected(holes, {8}) == {7}


def test_as_many_filled_by_reading_as_discarded(on_tmpfs: Ram, started: Start) -> None:
    """The number of pages stays the same, and reading is not writing."""
    ram = on_tmpfs
    ram.fill(7, 1)
    holes = started(ram)
    ram.punch(7)
    ram.mapper(f"read({ram.hva + 8 * PAGE})")
    assert ram.allocated() == 1
    assert collected(holes, set()) == {7}


def test_as_many_reserved_as_discarded(on_tmpfs: Ram, started: Start) -> None:
    """fallocate(2) makes pages that count as the file's and are still holes."""
    ram = on_tmpfs
    ram.fill(7, 1)
    holes = started(ram)
    ram.punch(7)
    with ram.path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 8 * PAGE, PAGE)
    assert ram.allocated() == 1
    assert collected(holes, set()) == {7}


def test_a_disk_file_system_counts_blocks_of_its_own(tmp_path: Path, started: Start) -> None:
    """Of a file in many pieces; just as many pages are discarded here."""
    with disk_directory(tmp_path) as directory:
        ram = Ram(directory / "ram", NPAGES * 64)
        try:
            with ram.path.open("r+b") as file:
                for page in range(0, ram.npages, 2):
                    os.pwrite(file.fileno(), b"x" * PAGE, page * PAGE)
                os.fsync(file.fileno())
            holes = started(ram)
            kept = holes.data["ram"].count()
            assert kept == ram.npages // 2
            surplus = ram.allocated() - kept
            if not surplus:
                pytest.skip("this file system counts no blocks of its own")
            for n in range(surplus):
                ram.punch(2 * n)
            report = holes.collect(page_set({"ram": DirtyBitmap.empty(ram.npages)}))
            assert report["ram"].count() == surplus
        finally:
            ram.end()


@either_way
def test_discarded_by_the_process_itself(ram: Ram, started: Start, told: bool) -> None:
    """With madvise(MADV_REMOVE), as QEMU does it."""
    ram.fill(7, 1)
    holes = started(ram)
    ram.mapper(f"advise({ram.hva + 7 * PAGE}, {PAGE}, 9)")
    assert collected(holes, set() if told else None) == {7}


def test_a_store_through_the_mapping_makes_no_look_necessary(
    ram: Ram, started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    holes = started(ram)
    ram.mapper(f"write({ram.hva + 7 * PAGE}, 1)")
    with monkeypatch.context() as patched:
        patched.delattr("tracker.sources.holes.data_pages")  # whoever looks fails
        assert collected(holes, {7}) == set()
    assert data(holes) == {7}


def test_it_rests_on_the_news_of_modifications(
    ram: Ram, started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side of all tests here that tell what was written."""
    monkeypatch.setattr(
        "tracker.sources.holes.watch_modifications", lambda _: watch_modifications([])
    )
    ram.fill(7, 1)
    holes = started(ram)
    ram.punch(7)
    assert collected(holes, set()) == set()
    assert collected(holes) == {7}


def test_looking_fills_no_hole(ram: Ram, started: Start) -> None:
    ram.fill(7, 1)
    before = ram.allocated()
    holes = started(ram)
    holes.collect()
    collected(holes, {8})  # wrongly
    assert ram.allocated() == before


Step = tuple[str, int]
steps = st.lists(
    st.tuples(st.sampled_from(["write", "discard"]), st.integers(0, NPAGES - 1)), max_size=12
)


def test_at_random_against_a_model() -> None:
    """Told or not, what is reported is what held data at one look and is a hole at the next."""
    with shm_directory() as directory:
        ram = Ram(directory / "ram", NPAGES)
        try:

            @settings(deadline=None, max_examples=examples(40))
            @given(st.booleans(), st.lists(steps, min_size=1, max_size=4))
            def check(told: bool, rounds: list[list[Step]]) -> None:
                os.truncate(ram.path, 0)
                os.truncate(ram.path, ram.size)
                holes = Holes(ram.pid, [ram.block])
                holes.start()
                model: set[int] = set()
                try:
                    for round_ in rounds:
                        before, written = set(model), set()
                        for what, page in round_:
                            if what == "write":
                                ram.fill(page, 1)
                                written.add(page)
                                model.add(page)
                            else:
                                ram.punch(page)
                                model.discard(page)
                        assert collected(holes, written if told else None) == before - model
                        assert data(holes) == model
                finally:
                    holes.stop()

            check()
        finally:
            ram.end()


# -- errors, and the end ------------------------------------------------------------------------


def test_a_file_that_becomes_shorter(on_tmpfs: Ram, started: Start) -> None:
    on_tmpfs.fill(7, 1)
    holes = started(on_tmpfs)
    os.truncate(on_tmpfs.path, on_tmpfs.size - PAGE)
    with pytest.raises(SourceError, match="shorter") as caught:
        holes.collect()
    assert caught.value.source == "holes"


def test_a_process_without_the_file(on_tmpfs: Ram) -> None:
    holes = Holes(os.getpid(), [on_tmpfs.block])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SourceError, match="holds no descriptor"):
        holes.start()
    assert len(os.listdir("/proc/self/fd")) == before


def test_when_the_second_block_fails_the_first_is_let_go(on_tmpfs: Ram) -> None:
    with shm_directory() as directory:
        other = Ram(directory / "other", NPAGES, name="other")
        other.end()
        holes = Holes(on_tmpfs.pid, [on_tmpfs.block, other.block])
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(SourceError):
            holes.start()
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_block_that_the_others_say_nothing_about_is_an_error(
    on_tmpfs: Ram, started: Start
) -> None:
    holes = started(on_tmpfs)
    with pytest.raises(BitmapError):
        holes.collect(PageSet.empty([]))


def test_stopping_before_the_start_and_twice(on_tmpfs: Ram) -> None:
    before = len(os.listdir("/proc/self/fd"))
    holes = Holes(on_tmpfs.pid, [on_tmpfs.block])
    holes.stop()
    holes.start()
    holes.stop()
    holes.stop()
    assert len(os.listdir("/proc/self/fd")) == before
