"""The pin matrix on this kernel, and experiments broken on purpose, which must not say yes.

What is asserted of the kernel is what migrations rely on; the rest is recorded, not asserted.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.conftest import require
from tests.live.tracked import hugetlbfs
from tests.tracker.mapper import disk_directory
from tracker.pins.matrix import Experiment, apart, count, run_matrix
from tracker.pins.pinned import (
    MEMORIES,
    PART,
    Memory,
    NoPin,
    ReadInFlight,
    RegisteredBuffers,
    Spliced,
    WriteInFlight,
    private_anonymous,
    shared_hugetlb,
    shared_tmpfs,
)
from tracker.pins.pins import (
    CPU_PAGES,
    NPAGES,
    PINNED_PAGES,
    QUIET_PAGE,
    SCENARIOS,
    WRITTEN_PAGE,
    Findings,
    findings,
)
from tracker.pins.watchers import WATCHERS, UffdAsyncWatcher, UffdSyncWatcher, Watcher
from tracker.sources.pagemap import soft_dirty_missing

pytestmark = pytest.mark.live

UFFD = ("uffd async", "uffd sync")
SHARED = ("shared memfd", "shared file")

Matrix = dict[tuple[str, str, str], Experiment]


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    return {(e.memory, e.pin, e.tracker): e for e in run_matrix()}


def answers(experiment: Experiment) -> tuple[str, str, str]:
    """Of the CPU's writes, coherence, and writes through the pin; all tried, or the test is not."""
    found = (
        experiment.cpu_writes_reported,
        experiment.coherent,
        experiment.pin_writes_reported,
    )
    require("; ".join(finding.seen for finding in found if finding.answer == "not tried"))
    cpu, coherent, pin = (finding.answer for finding in found)
    return cpu, coherent, pin


# -- this kernel ----------------------------------------------------------------------------------


def test_everything_is_tried_and_nothing_goes_wrong(matrix: Matrix) -> None:
    assert list(matrix) == [(m, s, w.name) for m in MEMORIES for s in SCENARIOS for w in WATCHERS]
    assert len(matrix) == count()
    for experiment in matrix.values():
        found = [
            experiment.cpu_writes_reported,
            experiment.coherent,
            experiment.pin_writes_reported,
        ]
        assert [finding for finding in found if finding.answer == "error"] == []
        assert all(finding.seen for finding in found)


@pytest.mark.parametrize("pin", SCENARIOS)
@pytest.mark.parametrize("memory", SHARED)
@pytest.mark.parametrize("tracker", UFFD)
def test_pins_and_write_protection_agree_on_shared_memory(
    matrix: Matrix, memory: str, pin: str, tracker: str
) -> None:
    cpu, coherent, _ = answers(matrix[memory, pin, tracker])
    assert (cpu, coherent) == ("yes", "not applicable" if pin == "no pin" else "yes")


@pytest.mark.parametrize("pin", ["no pin", "write pin", "write pin, then fork"])
@pytest.mark.parametrize("tracker", UFFD)
def test_write_pins_and_write_protection_agree_on_private_memory(
    matrix: Matrix, pin: str, tracker: str
) -> None:
    cpu, coherent, _ = answers(matrix["private anonymous", pin, tracker])
    assert (cpu, coherent) == ("yes", "not applicable" if pin == "no pin" else "yes")


@pytest.mark.parametrize("tracker", UFFD)
def test_a_reference_and_private_memory_part_after_a_fork(matrix: Matrix, tracker: str) -> None:
    """Copy-on-write, which shared memory does not do: the same experiment there says yes."""
    experiment = matrix["private anonymous", "fork, then reference", tracker]
    assert answers(experiment)[:2] == ("yes", "no")
    assert experiment.coherent.seen == "the pin sees older bytes, on 2 of 2 pages"
    assert answers(matrix["shared file", "fork, then reference", tracker])[:2] == ("yes", "yes")


@pytest.mark.parametrize("memory", ["private anonymous", *SHARED])
@pytest.mark.parametrize("tracker", UFFD)
def test_writes_through_pins_are_looked_for_where_there_are_any(
    matrix: Matrix, memory: str, tracker: str
) -> None:
    for pin, scenario in SCENARIOS.items():
        answer = answers(matrix[memory, pin, tracker])[2]
        # whether they are reported is this kernel's affair
        assert (answer in ("yes", "no", "always")) == scenario.pin.writes


def test_soft_dirty_is_tried_where_the_kernel_has_it(matrix: Matrix) -> None:
    missing = soft_dirty_missing()
    for (memory, pin, tracker), experiment in matrix.items():
        if tracker == "soft-dirty" and memory in SHARED:
            cpu = experiment.cpu_writes_reported
            assert (cpu.answer, cpu.seen) == (
                ("not tried", missing) if missing else ("yes", "2 of 2 pages")
            ), (memory, pin)


@pytest.mark.parametrize("pin", SCENARIOS)
@pytest.mark.parametrize("watcher", [UffdAsyncWatcher, UffdSyncWatcher], ids=lambda w: w.name)
def test_huge_pages(pin: str, watcher: type[UffdAsyncWatcher | UffdSyncWatcher]) -> None:
    scenario = SCENARIOS[pin]
    with hugetlbfs(NPAGES + 2):
        found = apart(lambda: findings(shared_hugetlb, scenario.pin, watcher, scenario.fork), 60)
    assert [finding.answer for finding in found[:2]] == [
        "yes",
        "not applicable" if pin == "no pin" else "yes",
    ]


# -- the kinds of memory and pins are what they say ------------------------------------------------


def mapping_of(memory: Memory) -> dict[str, str]:
    """Its lines in /proc/self/smaps, by name; the first as ``mapping``."""
    found: dict[str, str] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            if found:
                break
            if name.startswith(f"{memory.address:x}-"):
                found["mapping"] = rest
        elif found:
            found[name] = rest.strip()
    return found


@pytest.mark.parametrize(
    ("name", "permissions", "path"),
    [
        ("private anonymous", "rw-p", ""),
        ("shared memfd", "rw-s", "/memfd:pins (deleted)"),
        ("shared file", "rw-s", "/dev/shm/"),
    ],
)
def test_kinds_of_memory(name: str, permissions: str, path: str) -> None:
    memory = MEMORIES[name](NPAGES)
    mapping = mapping_of(memory)["mapping"].split(maxsplit=4)
    assert mapping[0] == permissions
    assert (mapping[4] if len(mapping) > 4 else "").startswith(path)
    assert (len(mapping) > 4) == bool(path)
    assert (memory.npages, memory.size) == (NPAGES, NPAGES * mmap.PAGESIZE)


def test_huge_memory() -> None:
    with hugetlbfs(NPAGES + 2):
        memory = shared_hugetlb(2)
        assert mapping_of(memory)["KernelPageSize:"] == f"{memory.page_size >> 10} kB"
        del memory


def test_huge_pages_that_cannot_be_had() -> None:
    (finding, *_) = findings(lambda _: shared_hugetlb(1 << 24), NoPin, UffdAsyncWatcher)
    assert finding.answer == "not tried"
    assert "huge pages of" in finding.seen
    assert "cannot be reserved" in finding.seen


@pytest.mark.parametrize("kind", [RegisteredBuffers, WriteInFlight, Spliced])
def test_what_pins_read(kind: type[RegisteredBuffers | WriteInFlight | Spliced]) -> None:
    memory = shared_tmpfs(NPAGES)
    for page in range(NPAGES):
        memory.fill(page, 1 + page)
    pin = kind(memory, (3, 1))
    try:
        pin.take()
        memory.fill(1, 99)
        assert pin.read() == [bytes([4]) * PART, bytes([99]) * PART]
    finally:
        pin.release()


@pytest.mark.parametrize("kind", [RegisteredBuffers, ReadInFlight])
def test_what_pins_write(kind: type[RegisteredBuffers | ReadInFlight]) -> None:
    memory = shared_tmpfs(NPAGES)
    pin = kind(memory, (3, 1))
    try:
        pin.take()
        assert [memory.holds(page, 0) for page in range(NPAGES)] == [True] * NPAGES
        pin.write(7)
    finally:
        pin.release()
    assert [memory.holds(page, 7) for page in range(NPAGES)] == [
        page in (1, 3) for page in range(NPAGES)
    ]


# -- experiments that are broken on purpose --------------------------------------------------------


def attempt(
    memory: Callable[[int], Memory] = shared_tmpfs,
    pin: Callable[[Memory, Sequence[int]], object] = RegisteredBuffers,
    watcher: Callable[[Memory], Watcher] = UffdAsyncWatcher,
    fork: str = "never",
) -> list[tuple[str, str]]:
    found: Findings = findings(memory, pin, watcher, fork)  # type: ignore[arg-type]
    return [(finding.answer, finding.seen) for finding in found]


class Late(UffdAsyncWatcher):
    """Right while it is calibrated, and then as a subclass says."""

    started: dict[int, int]

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self.started[memory.address] = self.started.get(memory.address, 0) + 1
        self.real = self.started[memory.address] > 1

    def __init_subclass__(cls) -> None:
        cls.started = {}

    def collect(self) -> set[int]:
        reported = super().collect()
        return self.changed(reported) if self.real else reported

    def changed(self, reported: set[int]) -> set[int]:
        raise NotImplementedError


def test_the_experiment_is_right_where_nothing_is_broken() -> None:
    cpu, coherent, pin = attempt()
    assert (cpu, coherent[0]) == (("yes", "2 of 2 pages"), "yes")
    assert pin[0] in ("yes", "no")


class Unarmed(UffdAsyncWatcher):
    """Nothing is ever protected again."""

    def collect(self) -> set[int]:
        return set()


class Eager(UffdAsyncWatcher):
    """Everything is reported, always."""

    def collect(self) -> set[int]:
        super().collect()
        return set(range(NPAGES))


@pytest.mark.parametrize(
    ("kind", "reported"), [(Unarmed, "nothing"), (Eager, "page 0, 1, 2, 3, 4, 5")]
)
def test_a_tracker_that_is_wrong_about_unpinned_pages_is_not_tried(
    kind: type[UffdAsyncWatcher], reported: str
) -> None:
    assert (
        attempt(watcher=kind)
        == [
            (
                "not tried",
                f"not on this memory: page {WRITTEN_PAGE} was written, {reported} reported, though "
                "nothing is pinned",
            )
        ]
        * 3
    )


class Silenced(Late):
    def changed(self, reported: set[int]) -> set[int]:
        return set()


class Excited(Late):
    def changed(self, reported: set[int]) -> set[int]:
        return set(range(NPAGES))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Silenced, "a write to a page that is not pinned is not reported"),
        (Excited, "a page that is not pinned is reported, though nobody wrote to it"),
    ],
)
def test_a_tracker_that_goes_wrong_says_nothing(kind: type[Late], reason: str) -> None:
    assert attempt(watcher=kind) == [("error", reason)] * 3


class SkipsPinned(UffdSyncWatcher):
    """Pinned pages are not protected, as was thought of once."""

    def collect(self) -> set[int]:
        written = super().collect()
        self._protect(PINNED_PAGES[0], len(PINNED_PAGES), 0)
        return written


class SkipsOne(UffdSyncWatcher):
    def collect(self) -> set[int]:
        written = super().collect()
        self._protect(CPU_PAGES[0], 1, 0)
        return written


@pytest.mark.parametrize(("kind", "seen"), [(SkipsPinned, "0 of 2 pages"), (SkipsOne, "1 of 2")])
def test_pages_that_are_not_protected_are_not_reported(
    kind: type[UffdSyncWatcher], seen: str
) -> None:
    cpu, coherent, _ = attempt(watcher=kind)
    assert cpu[0] == "no"
    assert cpu[1].startswith(seen)
    assert coherent[0] == "yes"


class Sticky(UffdAsyncWatcher):
    """What is pinned is reported for ever, as soft-dirty does with private memory."""

    def collect(self) -> set[int]:
        return super().collect() | set(PINNED_PAGES[1:])


def test_pages_that_are_always_reported_are_not_a_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracker.pins.pins._calibrate", lambda memory, watcher: None)
    cpu, coherent, through = attempt(watcher=Sticky)
    assert cpu == ("always", "2 of 2 pages, and 1 of them also when nobody writes")
    assert coherent[0] == "yes"
    # its first page is reported by nobody
    assert through == ("no", "3 of 4 pages, and 3 of them also when nobody writes")


class Comparing:
    """Compares all memory with what it was: sees every change, whoever made it."""

    name = "comparing"

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def start(self) -> None:
        self._before = self._now()

    def _now(self) -> list[bytes]:
        return [bytes(self._memory.part(page)) for page in range(NPAGES)]

    def collect(self) -> set[int]:
        before, self._before = self._before, self._now()
        return {page for page in range(NPAGES) if before[page] != self._before[page]}

    def stop(self) -> None:
        pass


@pytest.mark.parametrize("pin", [RegisteredBuffers, ReadInFlight])
def test_a_tracker_that_sees_writes_through_pins_is_told_from_one_that_does_not(
    pin: type[RegisteredBuffers | ReadInFlight],
) -> None:
    assert attempt(pin=pin, watcher=Comparing)[2] == ("yes", "4 of 4 pages")


def test_a_pin_of_other_pages_is_not_coherent() -> None:
    def other(memory: Memory, pages: Sequence[int]) -> RegisteredBuffers:
        return RegisteredBuffers(memory, [QUIET_PAGE] * len(pages))

    cpu, coherent, through = attempt(pin=other)
    assert cpu[0] == "yes"
    assert coherent == ("no", "the pin sees older bytes, on 2 of 2 pages")
    assert through == ("not applicable", "what is written through the pin is lost")


class Parted(RegisteredBuffers):
    """The process gets other pages once the pin has been taken, as by a surprising copy."""

    def __init__(self, memory: Memory, pages: Sequence[int]) -> None:
        super().__init__(memory, pages)
        self._memory = memory

    def take(self) -> None:
        super().take()
        self._memory._map.madvise(mmap.MADV_DONTNEED)
        for page in range(NPAGES):
            self._memory.fill(page, 1)


class PartedRead(ReadInFlight):
    def __init__(self, memory: Memory, pages: Sequence[int]) -> None:
        super().__init__(memory, pages)
        self._memory = memory

    take = Parted.take


@pytest.mark.parametrize("watcher", [UffdAsyncWatcher, UffdSyncWatcher], ids=lambda w: w.name)
def test_a_pin_that_lost_its_pages_is_not_coherent(
    watcher: type[UffdAsyncWatcher | UffdSyncWatcher],
) -> None:
    cpu, coherent, through = attempt(private_anonymous, Parted, watcher)
    assert cpu[0] == "yes"
    assert coherent == ("no", "the pin sees older bytes, on 2 of 2 pages")
    assert through == ("not applicable", "what is written through the pin is lost")
    # shared pages are still the file's
    assert attempt(shared_tmpfs, Parted, watcher)[1][0] == "yes"


def test_a_pin_that_cannot_be_taken(tmp_path: Path) -> None:
    """A long-term pin of a file on a disk: it would defeat the file system's own tracking."""

    def on_disk(npages: int) -> Memory:
        with (tmp_path / "ram").open("w+b") as file:
            file.truncate(npages * PART)
            return Memory(mmap.mmap(file.fileno(), npages * PART), PART)

    with disk_directory(tmp_path):
        (first, *others) = attempt(on_disk)
    assert first[0] == "not tried"
    assert first[1].startswith("the pages cannot be pinned: io_uring_register: ")
    assert others == [first, first]
    assert attempt(on_disk, NoPin)[0][0] == "yes"


class Failing(RegisteredBuffers):
    def read(self) -> list[bytes]:
        assert self._ring is not None
        self._ring.write(0, -1)
        return []


def test_a_pin_that_fails_is_an_error() -> None:
    assert attempt(pin=Failing) == [("error", "IORING_OP_WRITE_FIXED: Bad file descriptor")] * 3


def test_nothing_is_left_of_an_experiment() -> None:
    def open_files() -> set[str]:
        return {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.exists()}

    before = open_files()
    for scenario in SCENARIOS.values():
        for watcher in WATCHERS:
            findings(shared_tmpfs, scenario.pin, watcher, scenario.fork)
    kinds = {file for file in open_files() - before if "anon_inode" in file or "fuse" in file}
    assert kinds == set()


@pytest.fixture(autouse=True)
def fuse_is_there(request: pytest.FixtureRequest) -> None:
    if "InFlight" in request.node.name:
        (finding, *_) = findings(shared_tmpfs, WriteInFlight, UffdAsyncWatcher)
        require(finding.seen if finding.answer == "not tried" else None)
