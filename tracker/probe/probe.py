"""Does the kernel track writes as it says? Behaviour is tried, versions are not asked.

Each probe is one thing that a migration relies on. It is tried on memory of another process, with
the calls of :mod:`tracker.sources.uffd`: a probe that goes wrong stands for pages that a migration
would lose, or for rounds that would never end.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tracker import child
from tracker.errors import NotTracking, TrackerError
from tracker.probe.trial import SOURCE, Subject, Tracker, huge_file, shared_file

RACE_S = 0.2
_RACE_PAGES = 256

LIMIT_S = 20.0
"""How long one probe may take, with starting its process; a twentieth of a second is usual."""

_HUGE_POOLS = Path("/sys/kernel/mm/hugepages")


@dataclass(frozen=True)
class Outcome:
    """What became of a probe.

    :ivar probe: what should be so
    :ivar right: whether it is
    :ivar seen: what was seen
    """

    probe: str
    right: bool
    seen: str


Seen = tuple[bool, str]
Probe = Callable[[Tracker], Seen]


def unregistered(tracker: Tracker) -> Seen:
    """Memory that was not registered cannot be taken for memory that was not written."""
    last = tracker.subject.npages
    try:
        tracker.scan(last, last + 1)
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
        return True, "EPERM"
    return False, "a scan of memory that is not registered succeeds: its writes would be missed"


def idle(tracker: Tracker) -> Seen:
    """Between two scans without a write, nothing counts as written."""
    subject = tracker.subject
    subject.write(_touched(tracker)[::2])
    tracker.arm()
    pages = {page for _ in range(2) for page in tracker.collect()}
    if pages:
        return False, f"{_list(pages)} reported though nobody wrote"
    return True, f"nothing of {subject.npages} pages, some of them holes"


def holes(tracker: Tracker) -> Seen:
    """Writes to pages that did not exist when they were protected are reported."""
    pages = _sample(tracker)
    tracker.subject.discard(_touched(tracker))
    tracker.arm()
    tracker.subject.write(pages)
    return _none_missing(pages, tracker.collect())


def read_holes(tracker: Tracker) -> Seen:
    """A write is reported also where a read filled the hole before it.

    The read itself may be reported, whether the scan comes before the write or after it.
    """
    pages = _sample(tracker)
    first, second = pages[::2], pages[1::2]
    tracker.subject.discard(_touched(tracker))
    tracker.arm()
    tracker.subject.read(pages)
    tracker.subject.write(first)
    reported = set(tracker.collect()).intersection(first)
    tracker.subject.write(second)
    return _none_missing(pages, reported.union(tracker.collect()))


def populated(tracker: Tracker) -> Seen:
    """Each page that was written is reported, once, and no other."""
    pages = _populated_sample(tracker)
    tracker.subject.write(pages)
    reported = set(tracker.collect())
    right, seen = _none_missing(pages, reported)
    if not right:
        return right, seen
    if extra := reported.difference(pages):
        return False, f"{_list(extra)} reported though only others were written"
    if again := tracker.collect():
        return False, f"{_list(again)} reported a second time"
    return True, f"{len(pages)} of {len(pages)} pages, once"


def rewritten(tracker: Tracker) -> Seen:
    """A page that is written again after it was collected is reported again."""
    pages = _populated_sample(tracker)
    for value in range(3):
        tracker.subject.write(pages, value)
        right, seen = _none_missing(pages, tracker.collect())
        if not right:
            return False, f"{seen}, the time after {value} others"
    return True, f"{len(pages)} of {len(pages)} pages, 3 times"


def by_kernel(tracker: Tracker) -> Seen:
    """What the kernel writes for the process, such as read(2) into its memory, is reported."""
    subject, pages = tracker.subject, _sample(tracker)
    subject.discard(_touched(tracker))
    subject.write(pages[::2])
    tracker.arm()
    subject.receive(pages)
    return _none_missing(pages, tracker.collect())


def small_vectors(tracker: Tracker) -> Seen:
    """A scan whose output vector is full goes on where it ended."""
    pages = _populated_sample(tracker)
    for nregions in (1, 2, 3):
        tracker.subject.write(pages)
        right, seen = _none_missing(pages, tracker.collect(nregions))
        if not right:
            return False, f"{seen}, with a vector of {nregions}"
        if again := tracker.collect(nregions):
            return False, f"{_list(again)} reported a second time, with a vector of {nregions}"
    return True, f"{len(pages)} pages with vectors of 1, 2, 3"


def discarded(tracker: Tracker) -> Seen:
    """A page that was given back, as a balloon does, is reported when it is written again."""
    subject, pages = tracker.subject, _populated_sample(tracker)
    first, second = pages[::2], pages[1::2]
    subject.discard(pages)
    subject.write(first)
    reported = set(tracker.collect()).intersection(first)
    subject.write(second)
    return _none_missing(pages, reported.union(tracker.collect()))


def race(tracker: Tracker) -> Seen:
    """No write is lost that happens while a scan protects its page.

    The subject writes every page once while we collect and copy all the time. Then it stands still,
    we collect and copy once more, and the copy must be what it has. Every other time the pages are
    holes before.
    """
    subject = tracker.subject
    pages = list(range(min(subject.npages, _RACE_PAGES)))
    order = random.Random(0)
    copy = dict.fromkeys(pages, -1)
    collects = value = 0

    def update() -> None:
        copy.update({page: subject.content(page) for page in tracker.collect()})

    deadline = time.monotonic() + RACE_S
    while time.monotonic() < deadline:
        value += 1
        if value % 2:  # filling a hole is a race of its own
            subject.discard(pages)
            update()
        subject.begin("write", order.sample(pages, len(pages)), value)
        while not subject.done():
            update()
            collects += 1
        subject.finish()
        update()
        lost = [page for page in pages if copy[page] != value]
        if lost:
            return False, f"a write lost on {_list(lost)}, after {value * len(pages)} writes"
    return True, f"{value * len(pages)} writes during {collects} scans, none lost"


PROBES: dict[str, Probe] = {
    "EPERM without registration": unregistered,
    "idle memory is clean": idle,
    "writes to holes": holes,
    "writes after reads of holes": read_holes,
    "each written page, once": populated,
    "pages written again": rewritten,
    "writes by the kernel": by_kernel,
    "small vectors": small_vectors,
    "writes after a discard": discarded,
    "no write lost to a scan": race,
}
"""All probes, by what should be so. Where nothing is written yet comes before what writes it."""


def run_probe(name: str, tracker: Tracker) -> Outcome:
    """Run one probe on a tracker that has been started; never raises."""
    try:
        right, seen = PROBES[name](tracker)
    except (TrackerError, OSError) as error:
        right, seen = False, _reason(error)
    return Outcome(name, right, seen)


def check_tracking(directory: str = "/dev/shm") -> None:
    """Check that tracking works on shared memory, with every probe but the race.

    Takes some 30 milliseconds, nearly all of it for starting a process.

    :param directory: where the memory's file is to be, which never has a name
    :raise NotTracking: it does not, or it cannot be tried: no file can be made there, or a process
        of ours may have no userfaultfd
    """
    with contextlib.ExitStack() as stack:
        try:
            subject = stack.enter_context(Subject(shared_file(directory)))
            tracker = stack.enter_context(Tracker(subject))
            tracker.start()
        except OSError as error:
            raise NotTracking(SOURCE, _reason(error)) from error
        for name in PROBES:
            if PROBES[name] is race:
                continue
            outcome = run_probe(name, tracker)
            if not outcome.right:
                raise NotTracking(SOURCE, f"{name}: {outcome.seen}")


def free_huge_pages() -> dict[int, int]:
    """Huge pages that may be had now: how many, by their size in bytes."""
    free = {}
    for pool in _HUGE_POOLS.glob("hugepages-*kB"):
        count = int((pool / "free_hugepages").read_text())
        count -= int((pool / "resv_hugepages").read_text())
        free[int(pool.name[len("hugepages-") : -len("kB")]) * 1024] = count
    return free


# -- all probes, where they can do no harm ------------------------------------------------------


def try_everything(huge_page_size: int = 0, *, limit_s: float = LIMIT_S) -> list[Outcome]:
    """Run every probe, each on new memory, in a process of their own.

    Some kernels deadlock in a scan of hugetlb holes, and no signal ends that: then the process is
    left behind, as it must be, and what it did not come to is not right.

    :param huge_page_size: bytes, of huge pages that are free; 0 for shared memory of usual pages
    :param limit_s: how long each of them may take
    :return: one for each of :data:`PROBES`, in order
    :raise OSError: the process cannot be started
    """
    process = child.start(partial(main, huge_page_size), stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        outcomes = [Outcome(**json.loads(line)) for line in lines(process.stdout.fileno(), limit_s)]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    stuck = "did not come to an end in time"
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        stuck = f"process {process.pid} is stuck in the kernel until the host starts anew"
    else:
        if process.returncode not in (0, -signal.SIGKILL):
            stuck = f"the process that probed ended: {process.returncode}"
    for name in list(PROBES)[len(outcomes) :]:
        outcomes.append(Outcome(name, False, stuck))
        stuck = "not reached"
    return outcomes


def lines(fd: int, limit_s: float) -> Iterator[bytes]:
    """What comes out of a pipe, until it ends or nothing has come for so long."""
    rest = b""
    while select.select([fd], [], [], limit_s)[0]:
        chunk = os.read(fd, 65536)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def main(huge_page_size: int) -> None:
    """Run every probe; print an :class:`Outcome` a line, as soon as it is known."""
    for name in PROBES:
        try:
            if huge_page_size:
                subject = Subject(huge_file(huge_page_size), huge_page_size)
            else:
                subject = Subject(shared_file())
            with subject, Tracker(subject) as tracker:
                tracker.start()
                outcome = run_probe(name, tracker)
        except (TrackerError, OSError) as error:
            outcome = Outcome(name, False, _reason(error))
        print(json.dumps(asdict(outcome)), flush=True)


# -- what was seen ------------------------------------------------------------------------------


def _sample(tracker: Tracker) -> list[int]:
    """Some pages: alone and next to each other, at both ends, and on the way many that are not."""
    last = tracker.subject.npages - 1
    wanted = (0, 2, 3, 5, 63, 64, 66, 511, 512, 514, 900, last)
    return sorted({page for page in wanted if page <= last})


def _touched(tracker: Tracker) -> list[int]:
    """All pages that probes touch (but the race): the sample and its neighbours."""
    npages = tracker.subject.npages
    near = {page + step for page in _sample(tracker) for step in (-1, 0, 1)}
    return sorted(page for page in near if 0 <= page < npages)


def _populated_sample(tracker: Tracker) -> list[int]:
    tracker.subject.write(_touched(tracker), 0)
    tracker.arm()
    return _sample(tracker)


def _none_missing(written: Collection[int], reported: Collection[int]) -> Seen:
    missing = set(written).difference(reported)
    if missing:
        return False, f"{_list(missing)} written and not reported"
    return True, f"{len(written)} of {len(written)} pages"


def _list(pages: Collection[int]) -> str:
    shown = ", ".join(str(page) for page in sorted(pages)[:5])
    more = f" and {len(pages) - 5} more" if len(pages) > 5 else ""
    return f"page {shown}{more}"


def _reason(error: Exception) -> str:
    if isinstance(error, NotTracking):
        return error.reason
    return str(error.strerror if isinstance(error, OSError) and error.strerror else error)
