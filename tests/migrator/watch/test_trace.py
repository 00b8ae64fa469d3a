"""Recordings: what was written is what is read, and what is no recording is said to be none."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from migrator.errors import TraceError
from migrator.watch.trace import (
    MAGIC,
    Block,
    Header,
    Trace,
    Writer,
    numbers,
    read,
    united,
)
from tests.pagesets import page_set
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet

BLOCKS = (Block("low", 300 * 4096, 4096), Block("huge", 5 << 21, 2 << 20))
HEADER = Header(BLOCKS, 0.05, "uffd", "10.0.2", ("not seen: ä",))
Sets = dict[str, set[int]]

some = st.fixed_dictionaries(
    {
        block.name: st.sets(st.integers(0, block.npages - 1))
        | st.just(set(range(3, block.npages - 1)))
        for block in BLOCKS
    }
)
looks = st.lists(st.tuples(st.floats(1e-6, 10), some), max_size=6)


def bitmaps(sets: Sets) -> PageSet:
    return PageSet(
        BLOCKS, {b.name: DirtyBitmap.from_pages(b.npages, sorted(sets[b.name])) for b in BLOCKS}
    )


def write(path: Path, data: Sets, zeros: Sets, records: list[tuple[float, Sets]]) -> None:
    with path.open("wb") as file:
        writer = Writer(file, HEADER, bitmaps(data), bitmaps(zeros))
        for until_s, written in records:
            writer.append(until_s, bitmaps(written))


def in_order(intervals: list[tuple[float, Sets]]) -> list[tuple[float, Sets]]:
    ends = np.cumsum([seconds for seconds, _ in intervals]).tolist()
    return [(end, written) for end, (_, written) in zip(ends, intervals, strict=True)]


def check(trace: Trace, records: list[tuple[float, Sets]]) -> None:
    assert [r.until_s for r in trace.records] == [until_s for until_s, _ in records]
    for record, (_, written) in zip(trace.records, records, strict=True):
        assert {name: set(pages) for name, pages in record.written.items()} == written


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@settings(deadline=None)
@given(some, some, looks)
def test_round_trip(directory: Path, data: Sets, zeros: Sets, intervals: list) -> None:  # type: ignore[type-arg]
    path = directory / "round.trace"
    records = in_order(intervals)
    write(path, data, zeros, records)
    trace = read(path)
    assert trace.header == HEADER
    assert trace.whole
    assert trace.data == bitmaps(data)
    assert trace.zeros == bitmaps(zeros)
    assert trace.seconds == (records[-1][0] if records else 0.0)
    check(trace, records)


RECORDS: list[tuple[float, Sets]] = [
    (0.5, {"low": {0, 63, 64, 299}, "huge": set()}),
    (1.25, {"low": set(range(100, 200)), "huge": {4}}),
    (2.0, {"low": {7}, "huge": {0, 1}}),
]
NONE: Sets = {"low": set(), "huge": set()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.trace"
    write(path, NONE, NONE, RECORDS)
    return path


def frame_ends(content: bytes) -> list[int]:
    ends = [len(MAGIC)]
    while ends[-1] < len(content):
        ends.append(ends[-1] + 8 + struct.unpack_from("<I", content, ends[-1])[0])
    assert ends[-1] == len(content)
    return ends


def test_wherever_it_is_cut_what_came_before_is_good(path: Path) -> None:
    """A recorder may be killed at any byte; a recording without its beginning is none."""
    content = path.read_bytes()
    ends = frame_ends(content)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        if length < ends[2]:
            with pytest.raises(TraceError):
                read(path)
            continue
        trace = read(path)
        whole = max(i for i, end in enumerate(ends) if end <= length)
        check(trace, RECORDS[: whole - 2])
        assert trace.whole == (length in ends)


def test_a_changed_byte_is_noticed(path: Path) -> None:
    """Wherever it is. In a length, it may look like a file that was cut off, but less is read."""
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        try:
            trace = read(path)
        except TraceError:
            continue
        assert not trace.whole
        check(trace, RECORDS[: len(trace.records)])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a trace"),
        (b"GIF89a and more", "not a trace"),
        (MAGIC[:-1] + b"2" + bytes(100), "another version"),
        (MAGIC, "ends before"),
        (MAGIC + bytes(8), "unlikely|size|frame|Zstd|zstd"),
    ],
)
def test_what_is_no_trace(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=said):
        read(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file") as caught:
        read(tmp_path / "none")
    assert caught.value.exit_code == 2
    assert caught.value.path == tmp_path / "none"


def test_pages_outside_their_block(tmp_path: Path) -> None:
    path = tmp_path / "outside.trace"
    larger = page_set({"low": DirtyBitmap.full(301), "huge": DirtyBitmap.empty(5)})
    with path.open("wb") as file:
        Writer(file, HEADER, larger, bitmaps(NONE))
    with pytest.raises(TraceError, match="outside the 300"):
        read(path)


def test_records_out_of_order(tmp_path: Path) -> None:
    path = tmp_path / "order.trace"
    write(path, NONE, NONE, [RECORDS[1], RECORDS[0]])
    with pytest.raises(TraceError, match=r"0\.5 s is not after"):
        read(path)


@given(st.lists(st.sets(st.integers(0, 999)), max_size=4))
def test_numbers_and_unions(sets: list[set[int]]) -> None:
    for pages in sets:
        bitmap = DirtyBitmap.from_pages(1000, sorted(pages))
        assert bitmap.pages().tolist() == sorted(pages)
        assert numbers(BitMap(pages)).tolist() == sorted(pages)
    before = [BitMap(pages) for pages in sets]
    assert set(united(before)) == set[int]().union(*sets)
    assert [set(pages) for pages in before] == sets
