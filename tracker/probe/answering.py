"""Does tracking by answered faults work here? It is tried, on a process of our own."""

from __future__ import annotations

import os

from tracker.answered.uffdsync import CHUNK, UffdSync
from tracker.errors import NotTracking, TrackerError
from tracker.memory.ram import RamBlock
from tracker.probe.trial import Subject, shared_file


def check_answering(directory: str = "/dev/shm") -> None:
    """Check that :class:`tracker.answered.uffdsync.UffdSync` reports writes of every kind.

    :param directory: on tmpfs
    :raise NotTracking: it misses some, or cannot be had
    """
    try:
        with Subject(shared_file(directory)) as subject:
            _try_it(subject)
    except (TrackerError, OSError) as error:
        reason = error.reason if isinstance(error, NotTracking) else str(error)
        raise NotTracking(UffdSync.name, reason) from error


def _try_it(subject: Subject) -> None:
    per_chunk = CHUNK // subject.page_size
    pages = range(0, subject.npages, 2 * per_chunk)  # every other chunk
    written, received, discarded = list(pages[::3]), list(pages[1::3]), list(pages[2::3])
    status = os.fstat(subject.fd)
    size = subject.npages * subject.page_size
    block = RamBlock("probe", size, subject.page_size, subject.hva, status.st_dev, status.st_ino)
    source = UffdSync(subject.pid, [block])
    subject.write(discarded)
    source.start()
    try:
        for look in ("the first", "the second"):
            subject.write(written)
            subject.receive(received)
            subject.discard(discarded)
            subject.write(discarded)
            found = source.collect()["probe"]
            missing = [
                page
                for page in (*written, *received, *discarded)
                if not int(found.words[page // 64]) >> page % 64 & 1
            ]
            if missing:
                raise NotTracking(source.name, f"{look} collection misses page {missing[0]}")
        if found.count() == subject.npages:
            raise NotTracking(source.name, "everything is reported, whatever was written")
        if source.collect()["probe"].any():
            raise NotTracking(source.name, "what nobody wrote is reported")
    finally:
        source.stop()
