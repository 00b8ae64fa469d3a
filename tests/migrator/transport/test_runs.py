"""The loops between a RAM block and the wire against the naive oracle, on real files and sockets.

This module runs twice: compiled, and as plain Python (see :mod:`tests.tracker.bits.test_words`).
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numba.core.registry import CPUDispatcher
from numpy.typing import NDArray

from migrator.transport import runs as run_loops
from migrator.transport.runs import RUNS_PER_FRAME, UNIT, UNITS_PER_FRAME
from tests.live.conftest import hugetlbfs  # noqa: F401 (a fixture)
from tests.tracker import naive
from tests.tracker.bits.test_words import INTERPRETED, ROOT, subsets
from tests.tracker.mapper import small_tmpfs
from tests.tracker.memory.test_pages import KINDS, TmpfsFile, tmpfs_files
from tests.tracker.naive import Run, units_of
from tracker.errors import BitmapError

Runs = NDArray[np.uint64]
NUNITS = st.sampled_from([1, 63, 64, 65, 128, 129]) | st.integers(1, 140)
LAST = 2**64 - 1


def array_of(runs: Sequence[Run]) -> Runs:
    found = np.zeros((len(runs), 2), np.uint64)
    for i, (start, length, zeros) in enumerate(runs):
        found[i] = start, length * 2 + zeros
    return found


def listed(runs: Runs) -> list[Run]:
    return [(int(start), int(both) >> 1, bool(int(both) & 1)) for start, both in runs]


@st.composite
def some_runs(draw: st.DrawFn, nunits: int) -> list[Run]:
    """Any runs that are right: neighbours may touch, with and without zeros."""
    edges = sorted(draw(st.sets(st.integers(0, nunits), max_size=12)))
    pairs = [(a, b) for a, b in itertools.pairwise(edges) if draw(st.booleans())]
    return [(a, b - a, draw(st.booleans())) for a, b in pairs]


def content_of(runs: Iterable[Run], memory: bytes) -> bytes:
    return b"".join(
        memory[start * UNIT : (start + length) * UNIT] for start, length, zeros in runs if not zeros
    )


def random_bytes(seed: int, nbytes: int) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def as_memory(content: bytes) -> NDArray[np.uint8]:
    return np.array(bytearray(content), np.uint8)


def test_it_is_the_compiled_kernels_that_are_tested_or_not() -> None:
    assert isinstance(run_loops.plan, CPUDispatcher) is not INTERPRETED


# --- plan -----------------------------------------------------------------------------------------


@given(st.data())
def test_plan(choose: st.DataObject) -> None:
    """One frame, from anywhere to anywhere, of any number of runs."""
    nunits = choose.draw(NUNITS)
    zeros = choose.draw(subsets(nunits))
    memory = b"".join(bytes(UNIT) if u in zeros else bytes(UNIT - 1) + b"\1" for u in range(nunits))
    dirty, data = choose.draw(subsets(nunits)), choose.draw(subsets(nunits))
    first, last = sorted(choose.draw(st.tuples(*[st.integers(0, nunits)] * 2)))
    room = choose.draw(st.sampled_from([1, 2, 5, 1000]))
    runs = np.full((room, 2), LAST, np.uint64)

    words = naive.words_of(dirty, nunits), naive.words_of(data, nunits)
    n, content, nzeros, at = run_loops.plan(as_memory(memory), *words, first, last, runs)

    limits = {"most_runs": room, "most_units": UNITS_PER_FRAME}
    wanted, go_on = naive.plan(memory, dirty, data, first, last, **limits)
    assert (listed(runs[:n]), at) == (wanted, go_on)
    assert content == len([u for u in units_of(wanted) if u in data - zeros])
    assert content + nzeros == len(units_of(wanted))
    assert (runs[n:] == LAST).all()
    assert int(run_loops.check(runs[:n], nunits)) == content


@given(st.data(), st.sampled_from([1, 3, 1000]))
def test_frame_by_frame_it_is_all_that_is_dirty_and_nothing_twice(
    choose: st.DataObject, room: int
) -> None:
    nunits = choose.draw(NUNITS)
    memory = as_memory(b"\1" * (nunits * UNIT))
    dirty, data = choose.draw(subsets(nunits)), choose.draw(subsets(nunits))
    words = naive.words_of(dirty, nunits), naive.words_of(data, nunits)
    found: list[Run] = []
    at = 0
    while at < nunits:
        runs = np.zeros((room, 2), np.uint64)
        n, *_, at = run_loops.plan(memory, *words, at, nunits, runs)
        assert n or at == nunits, "a frame without anything in it"
        found += listed(runs[:n])
    assert units_of(found) == sorted(dirty)
    assert set(units_of([run for run in found if not run[2]])) == dirty & data


@pytest.mark.parametrize("gap", [0, 1])
def test_a_frame_is_full_at_so_many_units_or_runs(gap: int) -> None:
    """Zeros are not counted among the units; every other unit is a run of its own."""
    nunits = 4 * RUNS_PER_FRAME
    memory = as_memory(b"\1" * (nunits * UNIT))
    dirty = naive.words_of(range(0, nunits, 1 + gap), nunits)
    nothing = naive.words_of((), nunits)
    runs = np.zeros((RUNS_PER_FRAME, 2), np.uint64)

    n, content, zeros, at = run_loops.plan(memory, dirty, dirty, 0, nunits, runs)
    assert (content, zeros, at) == (UNITS_PER_FRAME, 0, UNITS_PER_FRAME * (1 + gap))
    assert n == (UNITS_PER_FRAME if gap else 1)

    n, content, zeros, at = run_loops.plan(memory, dirty, nothing, 0, nunits, runs)
    if gap:
        assert (n, content, zeros, at) == (RUNS_PER_FRAME, 0, RUNS_PER_FRAME, 2 * RUNS_PER_FRAME)
    else:
        assert (n, content, zeros, at) == (1, 0, nunits, nunits)


@pytest.mark.parametrize("told", [True, False])
def test_a_hole_is_not_read(told: bool) -> None:
    """To read it would fill it, as it does if it is said to be data."""
    kinds = ["data", "hole", "zeros", "hole"] * 20
    with tmpfs_files((kinds, 1)) as (file,):
        there = file.data()
        data = there if told else set(range(80))
        words = naive.words_of(range(80), 80), naive.words_of(data, 80)
        runs = np.zeros((100, 2), np.uint64)
        n, content, zeros, at = run_loops.plan(file.map(False), *words, 0, 80, runs)
        assert (n, content, zeros, at) == (40, 20, 60, 80)
        assert (file.data() == there) is told


@pytest.mark.parametrize("change", [{"first": -1}, {"last": 66}, {"dirty": 1}, {"data": 3}])
def test_plan_refuses_what_does_not_fit(change: dict[str, int]) -> None:
    of = {"first": 0, "last": 65, "dirty": 2, "data": 2, **change}
    memory, runs = np.zeros(65 * UNIT, np.uint8), np.zeros((1, 2), np.uint64)
    words = np.zeros(of["dirty"], np.uint64), np.zeros(of["data"], np.uint64)
    with pytest.raises(BitmapError):
        run_loops.plan(memory, *words, of["first"], of["last"], runs)


# --- check ----------------------------------------------------------------------------------------


EDGES = [0, 1, 2, 63, 64, 65, 2**32, 2**63 - 1, 2**63, 2**63 + 1, LAST - 1, LAST]
NUMBERS = st.sampled_from(EDGES) | st.integers(0, 80) | st.integers(0, LAST)
PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=6)


def rightly(pairs: list[tuple[int, int]], nunits: int) -> int:
    end = content = 0
    for start, both in pairs:
        length = both >> 1
        if not length or start < end or start + length > nunits:
            return -1
        end = start + length
        content += 0 if both & 1 else length
    return content


@given(PAIRS, st.sampled_from([0, 1, 64, 65, 2**40, 2**62]))
@example([(0, LAST)], 65)
@example([(LAST, 2)], 65)
@example([(LAST - 1, 4)], 65)  # ends at 2**64, which is 0
@example([(0, 2), (LAST, 4)], 65)  # goes around, and ends behind where it began
@example([(0, 130)], 65)
@example([(1, 130)], 65)
@example([(0, 4), (1, 4)], 65)
@example([(0, 4), (2, 4)], 65)
@example([(4, 4), (2, 4)], 65)
@example([(0, 1)], 65)
def test_check(pairs: list[tuple[int, int]], nunits: int) -> None:
    runs = np.array(pairs, np.uint64).reshape(-1, 2)
    assert int(run_loops.check(runs, nunits)) == rightly(pairs, nunits)


@given(st.data())
def test_check_accepts_whatever_is_right(choose: st.DataObject) -> None:
    nunits = choose.draw(NUNITS)
    runs = choose.draw(some_runs(nunits))
    content = sum(length for _, length, zeros in runs if not zeros)
    assert int(run_loops.check(array_of(runs), nunits)) == content
    if runs:
        last = runs[-1][0] + runs[-1][1]
        assert int(run_loops.check(array_of(runs), last - 1)) == -1


# --- mark, gather ---------------------------------------------------------------------------------


@given(st.data())
def test_mark(choose: st.DataObject) -> None:
    nunits = choose.draw(NUNITS)
    runs, before = choose.draw(some_runs(nunits)), choose.draw(subsets(nunits))
    words = naive.words_of(before, nunits)
    run_loops.mark(array_of(runs), words)
    assert naive.pages_of(words) == before | set(units_of(runs))


@given(st.data(), st.booleans())
def test_gather(choose: st.DataObject, writable: bool) -> None:
    nunits = choose.draw(NUNITS)
    runs = choose.draw(some_runs(nunits))
    content = random_bytes(nunits, nunits * UNIT)
    memory = as_memory(content) if writable else np.frombuffer(content, np.uint8)
    wanted = content_of(runs, content)
    into = np.full(len(wanted) + 1, 7, np.uint8)
    assert run_loops.gather(memory, array_of(runs), into) == len(wanted)
    assert into.tobytes() == wanted + b"\7"


@pytest.mark.parametrize(("runs", "room"), [([(1, 2, False)], 9), ([(0, 2, False)], 1)])
def test_gather_stays_in_its_memory(runs: list[Run], room: int) -> None:
    memory, into = np.ones(2 * UNIT, np.uint8), np.zeros(room * UNIT, np.uint8)
    with pytest.raises(BitmapError):
        run_loops.gather(memory, array_of(runs), into)
    assert not into.any()


# --- send -----------------------------------------------------------------------------------------


@contextmanager
def connected(buffer: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection with buffers as small as the kernel lets them be."""
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as near:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        near.connect(listening.getsockname())
        far, _ = listening.accept()
        with far:
            yield near, far


def send_and_receive(
    memory: NDArray[np.uint8], runs: list[Run], head: bytes, buffer: int = 1 << 20
) -> tuple[int, bytes]:
    """What it returned, and what arrived."""
    received = bytearray()

    def receive(far: socket.socket) -> None:
        while piece := far.recv(3000):
            received.extend(piece)

    with connected(buffer) as (near, far):
        thread = threading.Thread(target=receive, args=(far,))
        thread.start()
        vectors = np.zeros((len(runs) + 1, 2), np.uint64)
        arguments = as_memory(head), memory.ctypes.data, len(memory) // UNIT
        result = run_loops.send(near.fileno(), *arguments, array_of(runs), vectors)
        near.shutdown(socket.SHUT_WR)
        thread.join()
    return int(result), bytes(received)


@given(st.data())
def test_send(choose: st.DataObject) -> None:
    nunits = choose.draw(NUNITS)
    runs = choose.draw(some_runs(nunits))
    content = random_bytes(nunits, nunits * UNIT)
    sent = send_and_receive(as_memory(content), runs, b"a head", choose.draw(st.just(1 << 20)))
    assert sent == (0, b"a head" + content_of(runs, content))


def test_a_buffer_that_takes_little_at_once() -> None:
    """Each writev(2) is cut somewhere else, in the head too; and runs are many."""
    nunits = 2 * RUNS_PER_FRAME
    content = random_bytes(1, nunits * UNIT)
    runs = [(unit, 1, False) for unit in range(0, nunits, 2)]
    assert len(runs) == RUNS_PER_FRAME
    head = random_bytes(2, 50_000)
    sent = send_and_receive(as_memory(content), runs, head, buffer=1)
    assert sent == (0, head + content_of(runs, content))


def test_signals_in_between_lose_nothing() -> None:
    content = random_bytes(1, 500 * UNIT)
    caught: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: caught.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        sent = send_and_receive(as_memory(content), [(0, 500, False)], b"head", buffer=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert sent == (0, b"head" + content)
    assert caught


@pytest.mark.parametrize("hung_up", ["before", "meanwhile"])
def test_whoever_hung_up_is_an_errno(hung_up: str) -> None:
    memory = np.ones(2000 * UNIT, np.uint8)
    runs, vectors = array_of([(0, 2000, False)]), np.zeros((2, 2), np.uint64)
    with connected(1) as (near, far):
        if hung_up == "before":
            near.shutdown(socket.SHUT_RDWR)

        def hang_up() -> None:
            far.recv(100)
            far.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        arguments = as_memory(b"head"), memory.ctypes.data, 2000
        result = run_loops.send(near.fileno(), *arguments, runs, vectors)
        thread.join()
    assert result in (errno.EPIPE, errno.ECONNRESET)


def test_what_is_no_descriptor_is_an_errno() -> None:
    vectors = np.zeros((1, 2), np.uint64)
    assert run_loops.send(-1, as_memory(b"x"), 0, 0, array_of([]), vectors) == errno.EBADF


@pytest.mark.parametrize(
    ("runs", "room"), [([(1, 2, False)], 9), ([(2**60, 1, False)], 9), ([(0, 1, False)], 1)]
)
def test_send_stays_in_its_memory(runs: list[Run], room: int) -> None:
    memory, vectors = np.ones(2 * UNIT, np.uint8), np.zeros((room, 2), np.uint64)
    with connected(1 << 20) as (near, far):
        with pytest.raises(BitmapError):
            run_loops.send(
                near.fileno(), as_memory(b"x"), memory.ctypes.data, 2, array_of(runs), vectors
            )
        near.shutdown(socket.SHUT_WR)
        assert far.recv(1) == b""


# --- put, clear -----------------------------------------------------------------------------------


NOWHERE = np.zeros(0, np.uint8)
BY = pytest.mark.parametrize("by", ["pwrite", "mapping"])


def way(file: TmpfsFile, by: str) -> tuple[NDArray[np.uint8], int]:
    """``memory`` and ``fd``, as both kernels want them."""
    return (NOWHERE, file.fd) if by == "pwrite" else (file.map(True), -1)


def overwritten(before: bytes, runs: Iterable[Run], content: bytes) -> bytes:
    after = bytearray(before)
    for start, length, zeros in runs:
        if not zeros:
            taken, content = content[: length * UNIT], content[length * UNIT :]
            after[start * UNIT : (start + length) * UNIT] = taken
    return bytes(after)


@BY
@given(st.data())
def test_put(by: str, choose: st.DataObject) -> None:
    kinds = choose.draw(st.lists(KINDS, min_size=1, max_size=70))
    with tmpfs_files((kinds, 1)) as (file,):
        runs = choose.draw(some_runs(len(kinds)))
        content = random_bytes(1, len(content_of(runs, bytes(len(kinds) * UNIT))))
        before, there = file.content(), file.data()
        present = naive.words_of(there, len(kinds))
        assert not run_loops.put(as_memory(content), array_of(runs), *way(file, by), UNIT, present)
        assert file.content() == overwritten(before, runs, content)
        written = set(units_of(run for run in runs if not run[2]))
        assert file.data() == there | written == naive.pages_of(present)


@BY
def test_put_wants_as_much_content_as_the_runs_have(by: str) -> None:
    with tmpfs_files((["hole"] * 3, 1)) as (file,):
        present = naive.words_of((), 3)
        content = np.ones(2 * UNIT, np.uint8)
        with pytest.raises(BitmapError):
            run_loops.put(content, array_of([(0, 3, False)]), *way(file, by), UNIT, present)
        assert not any(file.content())


@BY
def test_a_file_system_that_is_full_is_an_errno_and_no_sigbus(by: str, tmp_path: Path) -> None:
    with small_tmpfs(tmp_path / "small", f"{8 * UNIT}") as small:
        file = TmpfsFile(small / "ram", ["hole"] * 16, 0)
        memory, fd = way(file, by)
        try:
            present = naive.words_of((), 16)
            content = np.ones(16 * UNIT, np.uint8)
            error = run_loops.put(content, array_of([(0, 16, False)]), memory, fd, UNIT, present)
            assert error == (errno.ENOSPC if by == "pwrite" else errno.EFAULT)
            counted = naive.pages_of(present)
            assert counted <= file.data(), "a hole that is read is a SIGBUS here"

            # with what the guest has to spare given back, there is room
            runs = array_of([(0, 16, True)])
            assert not run_loops.clear(runs, file.map(False), NOWHERE, file.fd, UNIT, present)
            assert not file.data() & counted
            assert not any(file.content())
            if by == "pwrite":
                few = content[: 8 * UNIT]
                assert not run_loops.put(few, array_of([(8, 8, False)]), memory, fd, UNIT, present)
                assert file.content() == bytes(8 * UNIT) + few.tobytes()
        finally:
            del memory
            os.close(file.fd)


@BY
@given(st.data())
def test_clear(by: str, choose: st.DataObject) -> None:
    """Only what is there, and is no zeros already, is touched."""
    kinds = choose.draw(st.lists(KINDS, min_size=1, max_size=140))
    with tmpfs_files((kinds, 1)) as (file,):
        runs = choose.draw(some_runs(len(kinds)))
        before, there = file.content(), file.data()
        present = naive.words_of(there, len(kinds))
        assert not run_loops.clear(array_of(runs), file.map(False), *way(file, by), UNIT, present)
        asked = set(units_of(run for run in runs if run[2]))
        data = {unit for unit, kind in enumerate(kinds) if kind == "data"}
        kept = [bytes(UNIT) if u in asked else before[u * UNIT :][:UNIT] for u in range(len(kinds))]
        assert file.content() == b"".join(kept)
        punched = asked & data if by == "pwrite" else set()
        assert file.data() == there - punched == naive.pages_of(present)


def test_a_page_that_is_not_said_to_be_there_is_not_even_looked_at() -> None:
    with tmpfs_files((["hole"] * 70, 1)) as (file,):
        runs = array_of([(0, 70, True)])
        for present, filled in (((), 0), (range(70), 70)):
            words = naive.words_of(present, 70)
            assert not run_loops.clear(runs, file.map(False), NOWHERE, file.fd, UNIT, words)
            assert len(file.data()) == filled


def test_a_file_that_may_not_be_punched_is_an_errno() -> None:
    with tmpfs_files((["data"] * 3, 1)) as (file,):
        fd = os.open(file.path, os.O_RDONLY)
        try:
            for runs in ([(0, 3, True)], [(0, 1, True), (2, 1, True)]):
                present = naive.words_of(range(3), 3)
                arguments = file.map(False), NOWHERE, fd, UNIT, present
                assert run_loops.clear(array_of(runs), *arguments) == errno.EBADF
            present = naive.words_of(range(3), 3)
            assert (
                run_loops.put(np.ones(UNIT, np.uint8), array_of([(0, 1, False)]), *arguments[1:])
                == errno.EBADF
            )
        finally:
            os.close(fd)


# --- huge pages -----------------------------------------------------------------------------------


HUGE = 2 << 20
MAP_NORESERVE = 0x4000  # include/uapi/asm-generic/mman-common.h
PER_HUGE = HUGE // UNIT


@pytest.mark.live
def test_units_of_huge_pages(hugetlbfs: Path) -> None:  # noqa: F811
    """A unit of a page that is not there brings all of the page; zeros are written, none goes."""
    nhuge = 4
    path = hugetlbfs / "ram"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, nhuge * HUGE)
        mapped = mmap.mmap(fd, nhuge * HUGE)
        memory = np.frombuffer(mapped, np.uint8)
        memory[3 * HUGE :] = 9
        assert os.fstat(fd).st_blocks * 512 == HUGE  # which SEEK_DATA does not tell there
        present = naive.words_of({3}, nhuge)
        model = bytearray(nhuge * HUGE)
        model[3 * HUGE :] = b"\t" * HUGE

        def there(all_of_it: NDArray[np.uint8] | bytearray) -> bytes:
            """Pages 0, 1 and 3: to read page 2 would make it."""
            return bytes(all_of_it[: 2 * HUGE]) + bytes(all_of_it[3 * HUGE :])

        # from the last unit of page 0 to the first of page 1, and one in the middle of page 3
        runs: list[Run] = [(PER_HUGE - 1, 2, False), (3 * PER_HUGE + 100, 1, False)]
        content = random_bytes(1, 3 * UNIT)
        assert not run_loops.put(as_memory(content), array_of(runs), memory, -1, HUGE, present)
        model = bytearray(overwritten(bytes(model), runs, content))
        assert there(memory) == there(model)
        assert naive.pages_of(present) == {0, 1, 3}
        assert os.fstat(fd).st_blocks * 512 == 3 * HUGE

        # page 2 is not there, and stays so; page 3 keeps its last unit
        cleared = [(PER_HUGE - 1, 1, True), (2 * PER_HUGE, 2 * PER_HUGE - 1, True)]
        assert not run_loops.clear(array_of(cleared), memory, memory, -1, HUGE, present)
        model[(PER_HUGE - 1) * UNIT : PER_HUGE * UNIT] = bytes(UNIT)
        model[2 * HUGE : -UNIT] = bytes(2 * HUGE - UNIT)
        assert naive.pages_of(present) == {0, 1, 3}
        assert os.fstat(fd).st_blocks * 512 == 3 * HUGE
        assert there(memory) == there(model)
        del memory
        mapped.close()
    finally:
        os.close(fd)
        path.unlink()


@pytest.mark.live
def test_no_huge_page_left_is_an_errno_and_no_sigbus(hugetlbfs: Path) -> None:  # noqa: F811
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    path = hugetlbfs / "ram"
    nhuge = int(free.read_text())
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, (nhuge + 1) * HUGE)
        # without a reservation, as memory that is mapped with MAP_NORESERVE
        mapped = mmap.mmap(fd, (nhuge + 1) * HUGE, mmap.MAP_SHARED | MAP_NORESERVE)
        memory = np.frombuffer(mapped, np.uint8)
        runs = array_of([(page * PER_HUGE, 1, False) for page in range(nhuge + 1)])
        present = naive.words_of((), nhuge + 1)
        error = run_loops.put(
            np.ones((nhuge + 1) * UNIT, np.uint8), runs, memory, -1, HUGE, present
        )
        assert error == errno.EFAULT
        del memory
        mapped.close()
    finally:
        os.close(fd)
        path.unlink()


# --- before a migration ---------------------------------------------------------------------------


STREAM = """
import mmap, os, socket, sys
import numpy as np
from migrator.transport import runs as run_loops

def signatures():
    found = {n: k.signatures for n, k in vars(run_loops).items() if hasattr(k, "signatures")}
    return {n: list(s) for n, s in found.items()}

if sys.argv[1] == "warm":
    run_loops.warm_up()
before = signatures()
fd = os.memfd_create("ram")
os.ftruncate(fd, 65 * 4096)
os.pwrite(fd, b"x" * 4096, 4096)
ro = np.frombuffer(mmap.mmap(fd, 0, prot=mmap.PROT_READ), np.uint8)
rw = np.frombuffer(mmap.mmap(fd, 0), np.uint8)
words = np.full(2, 1, np.uint64)
head = np.zeros(16 + 16 * 4, np.uint8)
runs = head[16:].view("<u8").reshape(-1, 2)
n, content, zeros, at = run_loops.plan(ro, words, words, 0, 65, runs)
into = np.zeros(1 << 20, np.uint8)
run_loops.gather(ro, runs[:n], into)
ours, theirs = socket.socketpair()
vectors = np.zeros((5, 2), np.uint64)
assert not run_loops.send(ours.fileno(), head[:48], ro.ctypes.data, 65, runs[:n], vectors)
came = np.frombuffer(memoryview(bytearray(head[16:].tobytes()))[: n * 16], "<u8").reshape(-1, 2)
run_loops.check(came, 65)
run_loops.mark(came, words)
run_loops.put(into[:4096], came, np.empty(0, np.uint8), fd, 4096, words)
run_loops.put(into[:4096], came, rw, -1, 4096, words)
run_loops.clear(came, ro, np.empty(0, np.uint8), fd, 4096, words)
run_loops.clear(came, rw, rw, -1, 4096, words)
print(sorted(n for n, s in signatures().items() if s != before[n]))
"""


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("warm", [True, False])
def test_nothing_is_compiled_after_warm_up(warm: bool) -> None:
    command = [sys.executable, "-c", STREAM, "warm" if warm else "cold"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    names = ["check", "clear", "gather", "mark", "plan", "put", "send"]
    wanted = [] if warm else names
    assert [name for name in eval(child.stdout) if name in names] == wanted
