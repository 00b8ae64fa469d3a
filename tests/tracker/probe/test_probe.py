"""The probes: right on a tracker that works, wrong on every kind of tracker that does not."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import children
from tests.conftest import require
from tests.live.tracked import HUGE, hugetlbfs
from tests.processes import is_running
from tests.tracker.targets import wait_until
from tracker.abi import pagemap, userfaultfd
from tracker.errors import NotTracking, SourceError
from tracker.memory.ram import RamBlock
from tracker.probe import probe, trial
from tracker.probe.probe import PROBES, Outcome, check_tracking, run_probe, try_everything
from tracker.probe.trial import FEATURES, Subject, Tracker, shared_file
from tracker.sources import uffd
from tracker.syscalls import uffd_api

pytestmark = pytest.mark.live

TrackerClass = Callable[[Subject], Tracker]


@pytest.fixture
def subject() -> Iterator[Subject]:
    with Subject(shared_file()) as subject:
        require(None if subject.uffd >= 0 else f"userfaultfd: {os.strerror(subject.uffd_errno)}")
        yield subject


@pytest.fixture
def tracker(subject: Subject) -> Iterator[Tracker]:
    with started(Tracker, subject) as tracker:
        yield tracker


def started(kind: TrackerClass, subject: Subject) -> Tracker:
    tracker = kind(subject)
    tracker.start()
    return tracker


def wrong(kind: TrackerClass, probes: Collection[str] = PROBES) -> set[str]:
    """The probes that go wrong, each on memory of its own."""
    found = set()
    for name in probes:
        with Subject(shared_file()) as subject, kind(subject) as tracker:
            tracker.start()
            outcome = run_probe(name, tracker)
        assert outcome.probe == name
        assert outcome.seen
        if not outcome.right:
            found.add(name)
    return found


# -- trackers that do not work ------------------------------------------------------------------


class Unregistered(Tracker):
    def register(self) -> None:
        pass


class Unchecked(Unregistered):
    """Nothing is registered, and the scan is told not to mind."""

    flags = pagemap.PM_SCAN_WP_MATCHING


class Unarmed(Tracker):
    """What was reported is not protected again."""

    flags = pagemap.PM_SCAN_CHECK_WPASYNC


class Forgetful(Tracker):
    """A page of each report is lost."""

    def collect(self, nregions: int | None = None) -> Collection[int]:
        return set(sorted(super().collect(nregions))[1:])


class Eager(Tracker):
    """Everything is reported, always."""

    def collect(self, nregions: int | None = None) -> Collection[int]:
        return range(self.subject.npages)


class Cut(Tracker):
    """A scan that ended early is taken for one that is done."""

    def scan_once(self, at: int, end: int, regions: NDArray[np.uint64]) -> tuple[int, int]:
        return super().scan_once(at, end, regions)[0], end


class Late(Tracker):
    """Read first, protect then: what is written in between is lost."""

    def collect(self, nregions: int | None = None) -> Collection[int]:
        self.flags = pagemap.PM_SCAN_CHECK_WPASYNC
        pages = super().scan(0, self.subject.npages, nregions)
        time.sleep(1e-4)
        self.flags = Tracker.flags
        super().scan(0, self.subject.npages)
        return pages


class Solid(Tracker):
    """Only pages are protected that exist."""

    _existed: Collection[int] = ()

    def collect(self, nregions: int | None = None) -> Collection[int]:
        reported = set(super().collect(nregions)).intersection(self._existed)
        self._existed = self._data()
        return reported

    def _data(self) -> set[int]:
        fd, size = self.subject.fd, self.subject.page_size
        pages: set[int] = set()
        at = 0
        try:
            while True:
                start = os.lseek(fd, at, os.SEEK_DATA)
                at = os.lseek(fd, start, os.SEEK_HOLE)
                pages.update(range(start // size, at // size))
        except OSError as error:
            if error.errno != errno.ENXIO:  # no more data
                raise
        return pages


class OnceOnly(Tracker):
    """A page is reported the first time only."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self._known: set[int] = set()

    def collect(self, nregions: int | None = None) -> Collection[int]:
        fresh = set(super().collect(nregions)) - self._known
        self._known |= fresh
        return fresh

    def arm(self) -> None:
        super().collect()


class Standing(Tracker):
    """The walk does not get on."""

    def scan_once(self, at: int, end: int, regions: NDArray[np.uint64]) -> tuple[int, int]:
        count, walked = super().scan_once(at, end, regions)
        return count, walked if len(regions) > 3 else at


class OtherMapping(Tracker):
    """What the kernel writes, it writes to the file: past the page tables."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        subject.receive = self._receive  # type: ignore[method-assign, assignment]

    def _receive(self, pages: Collection[int]) -> None:
        for page in pages:
            os.pwrite(self.subject.fd, b"x", page * self.subject.page_size)


class Fragile(Tracker):
    """A page that was given back is never reported again."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self._gone: set[int] = set()
        self._discard = subject.discard
        subject.discard = self._note  # type: ignore[method-assign, assignment]

    def _note(self, pages: Collection[int]) -> None:
        self._gone.update(pages)
        self._discard(pages)

    def arm(self) -> None:
        self._gone.clear()
        super().arm()

    def collect(self, nregions: int | None = None) -> Collection[int]:
        return set(super().collect(nregions)) - self._gone


EVERYTHING = set(PROBES)
OF_HOLES = {"writes to holes", "writes after reads of holes", "writes by the kernel"}
DISCARD = "writes after a discard"
RACE = "no write lost to a scan"
ONCE, AGAIN = "each written page, once", "pages written again"
VECTORS, IDLE = "small vectors", "idle memory is clean"
WRONG: dict[type[Tracker], set[str]] = {
    Unchecked: EVERYTHING - {IDLE},
    Unarmed: {IDLE, ONCE, VECTORS},
    Forgetful: EVERYTHING - {"EPERM without registration", IDLE},
    Eager: {IDLE, ONCE, VECTORS},
    Cut: {VECTORS},
    Standing: {VECTORS},
    Late: {RACE},
    Solid: {*OF_HOLES, DISCARD, RACE},
    OnceOnly: {AGAIN, RACE, VECTORS},
    OtherMapping: {"writes by the kernel"},
    Fragile: {DISCARD, RACE},
}


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_is_right_where_tracking_works(name: str, tracker: Tracker) -> None:
    outcome = run_probe(name, tracker)
    assert outcome == Outcome(name, True, outcome.seen)


@pytest.mark.parametrize("kind", WRONG)
def test_a_broken_tracker_is_found(subject: Subject, kind: type[Tracker]) -> None:
    assert wrong(kind) == WRONG[kind]


def test_every_probe_goes_wrong_somewhere() -> None:
    assert set().union(*WRONG.values()) == EVERYTHING


def test_memory_that_is_not_registered_does_not_even_start(subject: Subject) -> None:
    with pytest.raises(PermissionError, match="PAGEMAP_SCAN"):
        started(Unregistered, subject)


def test_probes_do_not_hang_on_writers_that_wait(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protection that is not asynchronous: the writer waits for somebody who never comes."""

    class Sync(Tracker):
        def start(self) -> None:
            self.subject.write(range(self.subject.npages))
            uffd_api(self.subject.uffd, sum(FEATURES.values()) - FEATURES["WP_ASYNC"])
            self.register()
            area = userfaultfd.uffdio_range(
                start=self.subject.hva, len=self.subject.npages * self.subject.page_size
            )
            argument = userfaultfd.uffdio_writeprotect(
                range=area, mode=userfaultfd.UFFDIO_WRITEPROTECT_MODE_WP
            )
            fcntl.ioctl(self.subject.uffd, userfaultfd.UFFDIO_WRITEPROTECT, argument)

    monkeypatch.setattr(trial, "ANSWER_S", 0.3)
    with started(Sync, subject) as tracker:
        outcome = run_probe(ONCE, tracker)
    assert not outcome.right
    assert outcome.seen == "a process that tracks itself hangs: write does not return"


def test_a_subject_that_ends_is_told_from_one_that_tracks(tracker: Tracker) -> None:
    os.kill(tracker.subject.pid, signal.SIGKILL)
    outcome = run_probe(ONCE, tracker)
    assert not outcome.right
    assert outcome.seen == "the process whose memory was probed ended: SIGKILL"


def test_a_subject_ends_with_its_owner(subject: Subject) -> None:
    pid = subject.pid
    subject.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# -- what a migration uses ----------------------------------------------------------------------


def test_the_features_are_those_that_the_source_asks_for() -> None:
    assert sum(FEATURES.values()) == uffd.FEATURES


class Real(Tracker):
    """The dirty source of migrations, in the shape of a tracker."""

    def start(self) -> None:
        self._source = uffd.UffdAsync(self.subject.pid, [self._block(0, self.subject.npages)])
        self._source.start()
        self._all_regions = self._source._regions

    def _block(self, first: int, last: int) -> RamBlock:
        size = self.subject.page_size
        start = self.subject.hva + first * size
        return RamBlock("ram", (last - first) * size, size, start, device=0, inode=0)

    def collect(self, nregions: int | None = None) -> Collection[int]:
        self._source._regions = self._all_regions[:nregions]
        starts, lengths = self._source.collect()["ram"].runs()
        pairs = zip(starts.tolist(), lengths.tolist(), strict=True)
        return {page for start, length in pairs for page in range(start, start + length)}

    def scan(self, first: int, last: int, nregions: int | None = None) -> set[int]:
        try:
            self._source._scan(self._block(first, last))
        except SourceError as error:
            raise error.__cause__ or error from None
        return set()

    def stop(self) -> None:
        self._source.stop()


def test_the_source_of_migrations_passes_every_probe(subject: Subject) -> None:
    assert wrong(Real) == set()


# -- the check before a migration ---------------------------------------------------------------


def test_tracking_works_here(subject: Subject) -> None:
    before = os.listdir("/proc/self/fd")
    check_tracking()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("kind", [kind for kind in WRONG if kind is not Late])
def test_a_migration_is_refused_on_broken_tracking(
    subject: Subject, kind: type[Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "Tracker", kind)
    with pytest.raises(NotTracking) as caught:
        check_tracking()
    assert caught.value.source == "uffd"
    # the first that goes wrong, in memory that all of them share
    assert caught.value.reason.partition(": ")[0] in EVERYTHING


def test_a_migration_is_refused_without_the_features(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FEATURES, "NONE", 1 << 63)
    with pytest.raises(NotTracking, match="UFFDIO_API: Invalid argument"):
        check_tracking()


def test_a_migration_is_refused_where_it_cannot_be_tried() -> None:
    with pytest.raises(NotTracking, match="No such file or directory"):
        check_tracking("/no/such/directory")


# -- all probes, apart --------------------------------------------------------------------------


def test_everything_is_tried_apart(subject: Subject) -> None:
    outcomes = try_everything()
    assert [outcome.probe for outcome in outcomes] == list(PROBES)
    assert [outcome for outcome in outcomes if not outcome.right] == []


HANG = "import time; time.sleep(1000)"
THREE = "import json\nfrom itertools import islice\n" + (
    "import sys; sys.path.append(sys.argv[1])\n"
    "from tracker.probe.probe import PROBES\n"
    "for name in islice(PROBES, 3):\n"
    "    print(json.dumps({'probe': name, 'right': True, 'seen': 'x'}), flush=True)\n"
)


def test_a_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    children.replace(monkeypatch, "tracker.probe.probe", THREE + HANG)
    outcomes = try_everything(limit_s=8.0)
    assert [outcome.right for outcome in outcomes] == [True] * 3 + [False] * (len(PROBES) - 3)
    assert outcomes[3].seen == "did not come to an end in time"
    assert {outcome.seen for outcome in outcomes[4:]} == {"not reached"}


def test_what_a_probe_that_hangs_had_started_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    start = (
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '99'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
    )
    children.replace(monkeypatch, "tracker.probe.probe", start + HANG)
    try_everything(limit_s=8.0)
    wait_until(lambda: not is_running(int(pid.read_text())))


def test_a_probe_that_cannot_be_ended_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stuck in the kernel: here, one that nobody kills."""
    kill = os.killpg
    left: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, _: left.append(group))
    children.replace(monkeypatch, "tracker.probe.probe", HANG)
    try:
        outcomes = try_everything(limit_s=0.1)
    finally:
        kill(left[0], signal.SIGKILL)
        os.waitpid(left[0], 0)
    assert not any(outcome.right for outcome in outcomes)
    assert outcomes[0].seen == (
        f"process {left[0]} is stuck in the kernel until the host starts anew"
    )


def test_a_prober_that_fails_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    children.replace(monkeypatch, "tracker.probe.probe", THREE + "sys.exit(3)")
    outcomes = try_everything()
    assert [outcome.right for outcome in outcomes] == [True] * 3 + [False] * (len(PROBES) - 3)
    assert outcomes[3].seen == "the process that probed ended: 3"


def test_huge_pages_that_cannot_be_had_are_not_right() -> None:
    size = 1 << 50  # no machine has such pages
    outcomes = try_everything(size)
    assert {outcome.right for outcome in outcomes} == {False}


def test_huge_pages() -> None:
    with hugetlbfs():
        assert [outcome for outcome in try_everything(HUGE) if not outcome.right] == []


def test_free_huge_pages_are_those_that_are_not_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, free, reserved in (("2048", "7", "3"), ("1048576", "1", "0")):
        pool = tmp_path / f"hugepages-{name}kB"
        pool.mkdir()
        (pool / "free_hugepages").write_text(f"{free}\n")
        (pool / "resv_hugepages").write_text(f"{reserved}\n")
    monkeypatch.setattr(probe, "_HUGE_POOLS", tmp_path)
    assert probe.free_huge_pages() == {2 << 20: 4, 1 << 30: 1}
