"""Pages from file to file, between processes that map them as QEMUs do."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrator.transport import Comparison, Sent, local
from migrator.transport.local import LocalCopy
from tests.pagesets import page_set
from tests.profiles import examples
from tests.tracker import naive
from tests.tracker.mapper import PAGE, Ram, disk_directory, shm_directory, small_tmpfs
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.errors import RamError

NPAGES = 200

Pages = dict[int, bytes]
"""Content by page number; what is not there is a hole."""


class Sides:
    """A source and a destination."""

    def __init__(self, source: Path, destination: Path, npages: int = NPAGES) -> None:
        self.source, self.destination = Ram(source, npages), Ram(destination, npages)
        self.npages = npages

    def transport(self) -> LocalCopy:
        return LocalCopy(
            *(self.source.pid, [self.source.block]),
            *(self.destination.pid, [self.destination.block]),
        )

    def end(self) -> None:
        self.source.end()
        self.destination.end()

    def differing(self) -> set[int]:
        return naive.differing(self.source.content(), self.destination.content(), PAGE)


def everything(npages: int = NPAGES) -> PageSet:
    return page_set({"ram": DirtyBitmap.full(npages)})


def pages(*numbers: int, npages: int = NPAGES) -> PageSet:
    return page_set({"ram": DirtyBitmap.from_pages(npages, list(numbers))})


def data_of(ram: Ram) -> PageSet:
    with ram.path.open("rb") as file:
        return pages(*naive.data(file.fileno(), ram.npages, PAGE), npages=ram.npages)


def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(PAGE)


def put(ram: Ram, content: Pages) -> None:
    for page, data in content.items():
        ram.write(page, data)


async def opened(sides: Sides) -> LocalCopy:
    transport = sides.transport()
    await transport.open()
    return transport


def send(
    sides: Sides,
    dirty: PageSet | None = None,
    *,
    once_open: Callable[[], None] = lambda: None,
) -> Sent:
    """Open, send once, close."""

    async def body() -> Sent:
        transport = await opened(sides)
        try:
            once_open()
            return await transport.send(dirty or everything(sides.npages), data_of(sides.source))
        finally:
            await transport.close()

    return asyncio.run(body())


def compare(sides: Sides) -> Comparison:
    async def body() -> Comparison:
        transport = await opened(sides)
        try:
            return await transport.compare()
        finally:
            await transport.close()

    return asyncio.run(body())


@pytest.fixture(params=["tmpfs", "disk"])
def sides(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sides]:
    where = shm_directory() if request.param == "tmpfs" else disk_directory(tmp_path)
    with where as directory:
        both = Sides(directory / "source", directory / "destination")
        yield both
        both.end()


@pytest.fixture
def on_tmpfs() -> Iterator[Sides]:
    with shm_directory() as directory:
        both = Sides(directory / "source", directory / "destination")
        yield both
        both.end()


SOME: Pages = {
    0: noise(0),
    1: noise(1),
    5: bytes(PAGE),
    63: noise(63),
    64: noise(64),
    199: noise(2),
}


# -- sending everything -------------------------------------------------------------------------


def test_nothing_stays_open_if_one_of_the_blocks_cannot_be_opened(sides: Sides) -> None:
    """Nor is half of it looked at: the space is watched while the transport opens."""
    ours, theirs = sides.source.block, sides.destination.block
    gone = replace(ours, name="gone", inode=1)
    copy = LocalCopy(sides.source.pid, [ours, gone], sides.destination.pid, [theirs, theirs])

    async def body() -> None:
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(RamError):
            await copy.open()
        assert copy.shortage() is None
        assert set(os.listdir("/proc/self/fd")) == before
        await copy.close()

    asyncio.run(body())


def test_everything_to_an_empty_destination(sides: Sides) -> None:
    put(sides.source, SOME)
    sent = send(sides)
    assert sides.differing() == set()
    assert (sent.pages, sent.zero_pages, sent.bytes) == (NPAGES, NPAGES - 5, 5 * PAGE)
    assert (sent.undelivered, sent.error) == (None, None)


def test_holes_take_no_memory_at_the_destination(on_tmpfs: Sides) -> None:
    """Pages of zeros that the source holds stay reserved there, and hold no data."""
    put(on_tmpfs.source, SOME)
    before = on_tmpfs.source.allocated()
    send(on_tmpfs)
    assert on_tmpfs.destination.allocated() == len(SOME)
    assert data_of(on_tmpfs.destination)["ram"].count() == 5
    assert on_tmpfs.source.allocated() == before == len(SOME)


def test_what_the_destination_had_is_cleared_where_the_source_has_holes(sides: Sides) -> None:
    put(sides.source, SOME)
    put(sides.destination, {page: noise(1000 + page) for page in range(NPAGES)})
    send(sides)
    assert sides.differing() == set()
    # a page of zeros is copied there, and what is a hole at the source is one now
    assert data_of(sides.destination) == data_of(sides.source)


def test_a_preallocated_destination_stays_so(on_tmpfs: Sides) -> None:
    put(on_tmpfs.source, SOME)
    put(on_tmpfs.destination, dict.fromkeys(range(NPAGES), bytes(PAGE)))
    assert send(on_tmpfs).bytes == len(SOME) * PAGE
    assert on_tmpfs.differing() == set()
    assert on_tmpfs.destination.allocated() == NPAGES


def test_nothing_to_send(sides: Sides) -> None:
    put(sides.source, SOME)
    assert send(sides, pages()) == Sent()
    assert sides.destination.content() == bytes(NPAGES * PAGE)


def test_only_what_is_dirty_is_sent(sides: Sides) -> None:
    put(sides.source, {page: noise(page) for page in range(NPAGES)})
    sent = send(sides, pages(3, 64, 65, 199))
    assert sides.differing() == set(range(NPAGES)) - {3, 64, 65, 199}
    assert (sent.pages, sent.bytes) == (4, 4 * PAGE)


page_kinds = st.sampled_from(["hole", "zeros", "one", "two"])
CONTENT = {"zeros": bytes(PAGE), "one": noise(1), "two": noise(2)}
rounds = st.lists(st.dictionaries(st.integers(0, 70), page_kinds, max_size=8), min_size=1)


def test_round_after_round_against_a_model() -> None:
    """Whatever each side held: what was sent is the same afterwards, all else is untouched."""
    with shm_directory() as directory:
        both = Sides(directory / "source", directory / "destination", npages=71)
        try:

            @settings(deadline=None, max_examples=examples(60))
            @given(rounds, rounds, st.randoms(use_true_random=False))
            def check(
                source: list[dict[int, str]], destination: list[dict[int, str]], choose: Any
            ) -> None:
                for ram in (both.source, both.destination):
                    os.truncate(ram.path, 0)
                    os.truncate(ram.path, ram.size)
                become(both.destination, destination[0])
                asyncio.run(_rounds(both, source, choose))

            check()
        finally:
            both.end()


def become(ram: Ram, kinds: dict[int, str]) -> None:
    for page, kind in kinds.items():
        if kind == "hole":
            ram.punch(page)
        else:
            ram.write(page, CONTENT[kind])


async def _rounds(both: Sides, rounds: list[dict[int, str]], choose: Any) -> None:
    transport = await opened(both)
    try:
        owed = set(range(both.npages))
        for kinds in rounds:
            become(both.source, kinds)
            owed |= set(kinds)
            now = {page for page in owed if choose.random() < 0.8}
            before, theirs = both.source.content(), both.destination.content()
            sent = await transport.send(pages(*now, npages=both.npages), data_of(both.source))
            assert (sent.pages, sent.error) == (len(now), None)
            assert both.source.content() == before
            wanted = bytearray(theirs)
            for page in now:
                wanted[page * PAGE : (page + 1) * PAGE] = before[page * PAGE : (page + 1) * PAGE]
            assert both.destination.content() == bytes(wanted)
            owed -= now
        await transport.send(pages(*owed, npages=both.npages), data_of(both.source))
        assert both.differing() == set()
        found = await transport.compare()
        assert (found.pages, found.mismatched) == (both.npages, 0)
    finally:
        await transport.close()


def test_several_blocks(on_tmpfs: Sides) -> None:
    with shm_directory() as directory:
        more = [
            Ram(directory / name, npages, name="more")
            for name, npages in (("source", 3), ("destination", 3))
        ]
        put(on_tmpfs.source, SOME)
        put(more[0], {0: noise(7), 2: noise(8)})
        transport = LocalCopy(
            *(on_tmpfs.source.pid, [on_tmpfs.source.block]),
            *(on_tmpfs.destination.pid, [on_tmpfs.destination.block]),
        )
        both = _of_two(on_tmpfs, more)

        async def body() -> tuple[Sent, Comparison]:
            await both.open()
            dirty = page_set({**everything(), "more": DirtyBitmap.full(3)})
            data = page_set({**data_of(on_tmpfs.source), "more": DirtyBitmap.from_pages(3, [0, 2])})
            try:
                sent = await both.send(dirty, data)
                more[1].write(1, b"x")
                return sent, await both.compare()
            finally:
                await both.close()

        sent, found = asyncio.run(body())
        asyncio.run(transport.close())  # never opened
        assert sent.pages == NPAGES + 3
        assert (found.pages, found.mismatched) == (NPAGES + 3, 1)
        for ram in more:
            ram.end()


def _of_two(sides: Sides, more: Sequence[Ram]) -> LocalCopy:
    """Two blocks, each in processes of its own: only one of them is asked for descriptors."""
    fds = [
        (ram.mapper, ram.path, ram.size, pid.mapper)
        for ram, pid in ((more[0], sides.source), (more[1], sides.destination))
    ]
    for _, path, size, mapper in fds:
        mapper.map(path, size)
    return LocalCopy(
        *(sides.source.pid, [sides.source.block, more[0].block]),
        *(sides.destination.pid, [sides.destination.block, more[1].block]),
    )


# -- a page that goes while it is sent ----------------------------------------------------------


def test_a_page_that_became_a_hole_after_the_look(on_tmpfs: Sides) -> None:
    """As it is then: whoever looks for holes reports it once more."""
    put(on_tmpfs.source, SOME)
    put(on_tmpfs.destination, {1: noise(9)})

    async def body() -> Sent:
        transport = await opened(on_tmpfs)
        data = data_of(on_tmpfs.source)
        on_tmpfs.source.punch(1)
        try:
            return await transport.send(everything(), data)
        finally:
            await transport.close()

    assert asyncio.run(body()).error is None
    assert on_tmpfs.differing() == set()


# -- running out of memory ----------------------------------------------------------------------


def test_a_destination_that_is_full(tmp_path: Path) -> None:
    """An error, and everything is owed; through a mapping it would be SIGBUS, and our end."""
    with (
        small_tmpfs(tmp_path / "small", f"{NPAGES // 4 * PAGE}") as small,
        shm_directory() as directory,
    ):
        both = Sides(directory / "source", small / "destination")
        try:
            touched = {page: noise(page) for page in range(NPAGES)}
            sent = send(both, once_open=lambda: put(both.source, touched))
            assert isinstance(sent.error, OSError)
            assert sent.error.errno == errno.ENOSPC
            assert "ram" in str(sent.error)
            assert sent.undelivered == everything()

            # with room for it again, what is owed is all that is needed
            again = pages(*range(NPAGES // 8, NPAGES))
            for page in range(NPAGES // 8):
                if page % 2:
                    both.source.punch(page)
            both.source.punch(NPAGES // 8, NPAGES - NPAGES // 8)
            both.destination.punch(0, NPAGES)
            sent = send(both, sent.undelivered | again)
            assert sent.error is None
            assert both.differing() == set()
        finally:
            both.end()


def send_again_after_an_error(source: str, destination: str) -> None:
    both = Sides(Path(source), Path(destination))

    async def body() -> None:
        transport = await opened(both)
        try:
            put(both.source, {page: noise(page) for page in range(NPAGES)})
            failed = await transport.send(everything(), data_of(both.source))
            assert failed.error is not None
            assert failed.undelivered is not None
            both.source.punch(2, NPAGES - 2)
            sent = await transport.send(failed.undelivered, data_of(both.source))
            assert sent.error is None
            assert both.differing() == set()
        finally:
            await transport.close()

    try:
        asyncio.run(body())
    finally:
        both.end()


def test_what_is_owed_can_be_sent_by_the_same_transport(tmp_path: Path) -> None:
    """In a process of its own: if it remembers pages that are not there, SIGBUS is its end."""
    with (
        small_tmpfs(tmp_path / "small", f"{NPAGES // 4 * PAGE}") as small,
        shm_directory() as directory,
    ):
        done = subprocess.run(
            [
                *[sys.executable, "-c"],
                f"from {__name__} import send_again_after_an_error as f; "
                f"f({str(directory / 'source')!r}, {str(small / 'destination')!r})",
            ],
            cwd=Path(__file__).parents[3],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{done.returncode}: {done.stderr}"


# -- cancelling ---------------------------------------------------------------------------------


def slowly(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[threading.Event, list[int]]:
    """Let a kernel say when it has begun; the rest of its parts take a moment each."""
    begun, calls = threading.Event(), list[int]()
    kernel: Callable[..., Any] = getattr(local, name)

    def slow(*arguments: Any) -> Any:
        calls.append(1)
        begun.set()
        threading.Event().wait(0.02)
        return kernel(*arguments)

    monkeypatch.setattr(local, "_PART_WORDS", 1)
    monkeypatch.setattr(local, name, slow)
    return begun, calls


@pytest.mark.parametrize("name", ["copy_pages", "compare_pages"])
def test_cancelled_in_the_middle(
    on_tmpfs: Sides, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It ends soon, only after its thread has, and can be begun anew."""
    put(on_tmpfs.source, {page: noise(page) for page in range(NPAGES)})
    begun, calls = slowly(monkeypatch, name)

    async def body() -> None:
        transport = await opened(on_tmpfs)
        try:
            work: Any = (
                transport.send(everything(), data_of(on_tmpfs.source))
                if name == "copy_pages"
                else transport.compare()
            )
            task = asyncio.ensure_future(work)
            await asyncio.to_thread(begun.wait)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()  # impatient
            with pytest.raises(asyncio.CancelledError):
                await task
            then = len(calls)
            assert then < NPAGES // 64
            await asyncio.sleep(0.1)
            assert len(calls) == then
            sent = await transport.send(everything(), data_of(on_tmpfs.source))
            assert sent.pages == NPAGES
            assert (await transport.compare()).mismatched == 0
        finally:
            await transport.close()

    asyncio.run(body())


def test_progress_of_a_sending(on_tmpfs: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    put(on_tmpfs.source, {page: noise(page) for page in range(NPAGES)})
    slowly(monkeypatch, "copy_pages")

    async def body() -> None:
        transport = await opened(on_tmpfs)
        seen = set()
        try:
            task = asyncio.ensure_future(transport.send(everything(), data_of(on_tmpfs.source)))
            while not task.done():
                seen.add(transport.sent_pages)
                await asyncio.sleep(0.005)
        finally:
            await transport.close()
        assert sorted(seen)[:4] == [0, 64, 128, 192]
        assert transport.sent_pages == NPAGES

    asyncio.run(body())


# -- comparing ----------------------------------------------------------------------------------


def test_both_are_equal(sides: Sides) -> None:
    put(sides.source, SOME)
    send(sides)
    sides.destination.fill(100, 0)  # zeros where the source has a hole
    before = sides.source.allocated(), sides.destination.allocated()
    assert compare(sides) == Comparison(NPAGES, 0)
    assert (sides.source.allocated(), sides.destination.allocated()) == before


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_single_byte(on_tmpfs: Sides, side: str) -> None:
    """In data, in a page of zeros, and in a hole; wherever in the page."""
    put(on_tmpfs.source, SOME)
    send(on_tmpfs)
    ram: Ram = getattr(on_tmpfs, side)

    async def body() -> None:
        transport = await opened(on_tmpfs)
        try:
            for page in (0, 1, 5, 62, 63, 64, 100, NPAGES - 1):
                for offset in (0, 1, PAGE // 2, PAGE - 1):
                    before = ram.content()[page * PAGE + offset]
                    ram.write(page, bytes([before ^ 0x80]), offset)
                    assert await transport.compare() == Comparison(NPAGES, 1), (page, offset)
                    ram.write(page, bytes([before]), offset)
            assert await transport.compare() == Comparison(NPAGES, 0)
        finally:
            await transport.close()

    asyncio.run(body())


def changed(sides: Sides, asked: PageSet) -> set[int]:
    """What differs of the pages that are asked about, after everything was sent."""

    async def body() -> set[int]:
        transport = await opened(sides)
        try:
            await transport.send(everything(), data_of(sides.source))
            put(sides.source, {3: noise(33), 5: noise(5), 8: bytes(PAGE), 199: noise(9)})
            sides.source.punch(6)
            found = await transport.changed(asked, data_of(sides.source))
            return naive.pages_of(found["ram"].words)
        finally:
            await transport.close()

    put(sides.source, {page: noise(page) for page in (1, 3, 5, 6, 8)})
    return asyncio.run(body())


def test_which_pages_changed_since_they_were_sent(sides: Sides) -> None:
    """5 was written, with what it had; 6 was discarded, 8 zeroed, 199 was a hole."""
    assert changed(sides, everything()) == {3, 6, 8, 199}


def test_only_what_is_asked_about_is_compared(on_tmpfs: Sides) -> None:
    assert changed(on_tmpfs, pages(1, 2, 3, 4, 5)) == {3}


def test_every_page_differs(on_tmpfs: Sides) -> None:
    put(on_tmpfs.source, {page: noise(page) for page in range(NPAGES)})
    assert compare(on_tmpfs) == Comparison(NPAGES, NPAGES)


def test_comparing_does_not_trust_what_was_remembered_while_sending(on_tmpfs: Sides) -> None:
    put(on_tmpfs.source, SOME)

    async def body() -> Comparison:
        transport = await opened(on_tmpfs)
        try:
            await transport.send(everything(), data_of(on_tmpfs.source))
            on_tmpfs.destination.punch(0, 2)
            on_tmpfs.destination.write(100, b"x")
            return await transport.compare()
        finally:
            await transport.close()

    assert asyncio.run(body()) == Comparison(NPAGES, 3)


# -- opening and closing ------------------------------------------------------------------------


def traces() -> tuple[int, int]:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return len(os.listdir("/proc/self/fd")), sum("test-tracker-" in line for line in maps)


def test_nothing_is_left(on_tmpfs: Sides) -> None:
    before = traces()
    put(on_tmpfs.source, SOME)

    async def body() -> None:
        transport = await opened(on_tmpfs)
        await transport.send(everything(), data_of(on_tmpfs.source))
        await transport.close()
        inside = traces()
        await transport.close()
        assert inside[1] == 0

    asyncio.run(body())
    assert traces() == before


def test_a_side_that_is_gone(on_tmpfs: Sides) -> None:
    on_tmpfs.destination.end()
    before = traces()

    async def body() -> None:
        transport = on_tmpfs.transport()
        with pytest.raises(OSError, match="No such"):
            await transport.open()
        await transport.close()

    asyncio.run(body())
    assert traces() == before


def test_a_file_that_became_shorter(on_tmpfs: Sides) -> None:
    os.truncate(on_tmpfs.destination.path, PAGE)

    async def body() -> None:
        transport = on_tmpfs.transport()
        with pytest.raises(RamError, match="shorter"):
            await transport.open()
        await transport.close()

    asyncio.run(body())


@given(st.sets(st.integers(0, 5000)), st.integers(1, 70))
def test_parts(numbers: set[int], words: int) -> None:
    """Slices in order that hold every page and no word in which none is ever."""
    npages = 5001
    bitmap = DirtyBitmap.from_pages(npages, sorted(numbers))
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(local, "_PART_WORDS", words)
        parts = list(local._parts(bitmap))
    assert parts == sorted(
        {
            (n // 64 // words * words, min(n // 64 // words * words + words, len(bitmap.words)))
            for n in numbers
        }
    )
