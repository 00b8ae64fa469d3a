"""What comes over the wire is right, within every limit, or a WireError: whatever it is.

The examples are the same in every run.
"""

from __future__ import annotations

import json
import random
import struct
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from migrator.errors import WireError
from migrator.link import envelope
from migrator.link.envelope import MESSAGE_LIMIT
from migrator.transport import frames
from migrator.transport.frames import (
    CHUNK_UNITS,
    CONTENT_LIMIT,
    DIGESTS_LIMIT,
    Frame,
    Kind,
    Packing,
)
from migrator.transport.runs import RUNS_PER_FRAME, UNIT, UNITS_PER_FRAME
from tests.profiles import examples

settings.register_profile("wire", deadline=None, derandomize=True, max_examples=examples(1500))
SETTINGS = settings.get_profile("wire")
SEED = 20_000
MUTATIONS = examples(25_000)

NBLOCKS, NUNITS = 3, 200_000
PEER = "somebody"

Pairs = list[tuple[int, int]]


# -- the whole of a frame, as it is taken apart ---------------------------------------------------


def take(data: bytes, nblocks: int = NBLOCKS, nunits: int = NUNITS) -> tuple[Frame, Pairs, int]:
    """What a receiver does with the first bytes of a frame, and with its runs.

    :return: the frame, its runs, and bytes that follow or digests that are wanted
    :raise WireError: it is refused
    """
    head = data[: frames.FRAME_SIZE].ljust(frames.FRAME_SIZE, b"\0")
    frame = frames.parse_frame(head, nblocks, PEER)
    if frame.kind is Kind.ROUND:
        return frame, [], 0
    table = data[frames.FRAME_SIZE :][: frame.count * frames.RUN_SIZE]
    runs, units = frames.parse_runs(table.ljust(frame.count * frames.RUN_SIZE, b"\0"), nunits, PEER)
    pairs = [(int(start), int(both)) for start, both in runs]
    if frame.kind is Kind.PAGES:
        frames.check_content(frame, units, PEER)
        return frame, pairs, frame.size
    return frame, pairs, frames.digests_wanted(frame, runs, PEER)


def check_limits(frame: Frame, pairs: Pairs, follows: int) -> None:
    """Whatever was taken is within what is promised to whoever takes memory for it."""
    if frame.kind is Kind.ROUND:
        assert (frame.packing, frame.block, frame.count) == (Packing.NONE, 0, 0)
        return
    assert frame.block < NBLOCKS
    assert 0 < frame.count == len(pairs) <= RUNS_PER_FRAME
    end = units = content = 0
    for start, both in pairs:
        length = both >> 1
        assert length > 0
        assert start >= end
        end = start + length
        units += length
        content += 0 if both & 1 else length * UNIT
    assert end <= NUNITS
    if frame.kind is Kind.PAGES:
        assert content <= CONTENT_LIMIT
        if frame.packing is Packing.NONE:
            assert frame.size == follows == content
        else:
            assert 0 < frame.size == follows < content
        return
    assert frame.packing is Packing.NONE
    assert frame.size == frames.SEED_SIZE
    assert units <= DIGESTS_LIMIT
    if frame.kind is Kind.DIGESTS:
        assert follows == units
    else:
        assert len(pairs) == 1
        assert pairs[0][0] % CHUNK_UNITS == 0
        assert follows == -(-units // CHUNK_UNITS)


def right(choose: random.Random) -> bytes:
    """A frame as a migrator sends it."""
    kind = choose.choice(list(Kind))
    if kind is Kind.ROUND:
        return Frame(kind, Packing.NONE, 0, 0, choose.randrange(2**64)).pack()
    block = choose.randrange(NBLOCKS)
    if kind is Kind.CHUNKS:
        start = choose.randrange(NUNITS // CHUNK_UNITS) * CHUNK_UNITS
        length = choose.randint(1, min(NUNITS - start, DIGESTS_LIMIT))
        runs = [(start, length * 2 + choose.randrange(2))]
    else:
        runs, at = [], 0
        for _ in range(choose.choice([1, 1, 2, 5, 40])):
            at += choose.randrange(100)
            length = choose.randint(1, 6)
            runs.append((at, length * 2 + choose.randrange(2)))
            at += length
    content = sum(UNIT * (both >> 1) for _, both in runs if not both & 1)
    packing, size = Packing.NONE, content
    if kind is not Kind.PAGES:
        size = frames.SEED_SIZE
    elif content and choose.randrange(2):
        packing, size = Packing.ZSTD, choose.randint(1, content - 1)
    head = Frame(kind, packing, block, len(runs), size).pack()
    return head + np.array(runs, "<u8").tobytes()


NUMBERS = [0, 1, 2, 3, 255, 256, RUNS_PER_FRAME, RUNS_PER_FRAME + 1, 2 * UNITS_PER_FRAME + 2]
NUMBERS += [
    NUNITS,
    2 * NUNITS,
    CONTENT_LIMIT,
    CONTENT_LIMIT + 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
]


def put_number(data: bytearray, choose: random.Random) -> None:
    """A number where one is, or beside it."""
    size = choose.choice([1, 2, 4, 8])
    at = choose.randrange(0, max(1, len(data) - size + 1), size)
    data[at : at + size] = (choose.choice(NUMBERS) % 256**size).to_bytes(size, "little")


def flip(data: bytearray, choose: random.Random) -> None:
    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)


def move_run(data: bytearray, choose: random.Random) -> None:
    """A run is there twice, or runs change places."""
    count = (len(data) - frames.FRAME_SIZE) // frames.RUN_SIZE
    if count > 1:
        a, b = (frames.FRAME_SIZE + frames.RUN_SIZE * choose.randrange(count) for _ in range(2))
        data[a : a + frames.RUN_SIZE] = data[b : b + frames.RUN_SIZE]


def cut(data: bytearray, choose: random.Random) -> None:
    del data[choose.randrange(len(data)) :]
    data.extend(choose.randbytes(choose.choice([0, 1, 16])))


MUTATE: list[Callable[[bytearray, random.Random], None]] = [put_number, flip, move_run, cut]


def test_every_right_frame_is_taken() -> None:
    choose = random.Random(SEED)
    for _ in range(1000):
        data = right(choose)
        frame, pairs, follows = take(data)
        check_limits(frame, pairs, follows)
        assert frame.pack() + np.array(pairs, "<u8").tobytes() == data


def test_mutations_of_right_frames() -> None:
    print(f"seed {SEED}")
    choose = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    for _ in range(MUTATIONS):
        data = bytearray(right(choose))
        for _ in range(choose.choice([1, 1, 1, 2, 4])):
            if data:
                choose.choice(MUTATE)(data, choose)
        try:
            taken = take(bytes(data))
        except WireError as error:
            outcomes[error.reason.split()[0] + " " + error.reason.split()[-1]] += 1
        else:
            outcomes["taken"] += 1
            check_limits(*taken)
    # neither all of them right nor all wrong, and wrong in many ways
    assert outcomes["taken"] > MUTATIONS // 10
    assert outcomes.total() - outcomes["taken"] > MUTATIONS // 4
    assert len(outcomes) > 20


@SETTINGS
@given(st.binary(max_size=80))
def test_any_bytes_as_a_frame(data: bytes) -> None:
    try:
        taken = take(data)
    except WireError:
        return
    check_limits(*taken)


WORDS = st.sampled_from(NUMBERS) | st.integers(0, 2**64 - 1)


@SETTINGS
@given(
    st.integers(0, 5),
    st.integers(0, 2),
    st.integers(0, 4),
    st.lists(st.tuples(WORDS, WORDS), max_size=4),
    WORDS,
)
@example(1, 1, 0, [(0, 2)], UNIT)  # packed, and no smaller
@example(1, 1, 0, [(0, 2)], 0)
@example(1, 1, 0, [(0, 3)], 0)  # zeros, packed
@example(1, 0, 0, [(0, 2 * UNITS_PER_FRAME + 2)], CONTENT_LIMIT + UNIT)
@example(1, 1, 0, [(0, 2 * UNITS_PER_FRAME + 2)], 10)  # unpacks to more than a frame has
@example(1, 0, 0, [(0, 2 * UNITS_PER_FRAME)], CONTENT_LIMIT)
@example(1, 1, 0, [(0, 2**63)], 10)
@example(3, 0, 0, [(0, 2 * DIGESTS_LIMIT + 2)], 8)
@example(4, 0, 0, [(0, 2 * DIGESTS_LIMIT + 2)], 8)
@example(4, 0, 0, [(CHUNK_UNITS - 1, 2)], 8)
@example(4, 0, 0, [(0, 2), (CHUNK_UNITS, 2)], 8)
@example(2, 0, 0, [(0, 2)], 1)
@example(2, 1, 0, [], 1)
def test_any_numbers_in_a_frame(
    kind: int, packing: int, block: int, runs: Pairs, size: int
) -> None:
    head = struct.pack("<BBHIQ", kind, packing, block, len(runs), size)
    data = head + b"".join(struct.pack("<QQ", *run) for run in runs)
    try:
        taken = take(data)
    except WireError:
        return
    check_limits(*taken)


@pytest.mark.parametrize("count", [0, RUNS_PER_FRAME + 1, 2**32 - 1])
def test_no_memory_is_taken_for_runs_that_are_too_many(count: int) -> None:
    for kind in (Kind.PAGES, Kind.DIGESTS):
        size = frames.SEED_SIZE if kind is Kind.DIGESTS else UNIT
        head = Frame(kind, Packing.NONE, 0, count, size).pack()
        with pytest.raises(WireError, match=f"{count} runs"):
            frames.parse_frame(head, NBLOCKS, PEER)


def test_a_frame_for_no_block_at_all() -> None:
    with pytest.raises(WireError, match="block 0 of 0"):
        frames.parse_frame(Frame(Kind.PAGES, Packing.NONE, 0, 1, UNIT).pack(), 0, PEER)


# -- messages, and before them --------------------------------------------------------------------


@SETTINGS
@given(st.binary(max_size=200))
@example(b"")
@example(b"\xff\xfe{\x00}\x00")  # UTF-16
@example(b"[" * 10_000)
@example(b'{"a":' * 10_000)
@example(b"1" * 10_000)  # more digits than int() takes
@example(b'{"a":' + b"1" * 10_000 + b"}")
@example(b'{"a": NaN}')
@example(b'{"a": -Infinity}')
@example(b'{"a": 1e999}')
@example(b'{"\\ud800": "\\udfff"}')
@example(b"{}" * 2)
@example(b"\0" * 100)
def test_any_bytes_as_a_message(text: bytes) -> None:
    try:
        said = envelope.parse_message(text, PEER)
    except WireError:
        return
    assert isinstance(said, dict)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@SETTINGS
@given(json_values)
def test_any_json_as_a_message(said: object) -> None:
    text = json.dumps(said)
    constants = ("NaN", "Infinity")
    if isinstance(said, dict) and not any(word in text for word in constants):
        assert envelope.parse_message(text.encode(), PEER) == said
    elif not isinstance(said, dict):
        with pytest.raises(WireError):
            envelope.parse_message(text.encode(), PEER)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_what_only_python_takes_for_json_is_none(constant: str) -> None:
    """A timer that is to go off at NaN lets none go off any more."""
    assert json.loads(f'{{"reconnect_s": {constant}}}')
    with pytest.raises(WireError, match="no JSON"):
        envelope.parse_message(f'{{"reconnect_s": {constant}}}'.encode(), PEER)


@SETTINGS
@given(st.binary(min_size=8, max_size=8), st.integers(0, 2**32), st.integers(0, 2**32))
def test_sizes_of_a_message(data: bytes, limit: int, blob: int) -> None:
    sizes = struct.unpack("<II", data)
    if sizes[0] <= limit and sizes[1] <= blob:
        assert envelope.message_sizes(data, PEER, limit=limit, blob=blob) == sizes
    else:
        with pytest.raises(WireError, match="announces"):
            envelope.message_sizes(data, PEER, limit=limit, blob=blob)


@given(st.dictionaries(st.text(), st.integers()), st.integers(0, 2**32 - 1))
def test_a_message_and_back(said: dict[str, int], blob_size: int) -> None:
    data = envelope.message(said, blob_size)
    head, text = data[: envelope.MESSAGE_SIZE], data[envelope.MESSAGE_SIZE :]
    sizes = envelope.message_sizes(head, PEER, limit=MESSAGE_LIMIT, blob=2**32 - 1)
    assert sizes == (len(text), blob_size)
    assert envelope.parse_message(text, PEER) == said


@SETTINGS
@given(st.binary(min_size=envelope.OPENING_SIZE, max_size=envelope.OPENING_SIZE))
def test_any_bytes_as_an_opening(data: bytes) -> None:
    with pytest.raises(WireError, match="no migrator"):
        envelope.check_opening(data, PEER)


def test_openings() -> None:
    envelope.check_opening(envelope.opening(), PEER)
    for version in (0, 2, 2**16 - 1):
        with pytest.raises(WireError, match=f"speaks version {version} of the protocol, this is 1"):
            envelope.check_opening(struct.pack("<8sHH", b"qemu-mig", version, 0), PEER)
    with pytest.raises(WireError, match="no migrator"):
        envelope.check_opening(b"GET / HTTP/1", PEER)
