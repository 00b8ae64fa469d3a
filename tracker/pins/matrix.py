"""All experiments of :mod:`tracker.pins.pins`, each in a process of its own with a time limit.

A tracker that does not answer leaves its writer waiting, and a kernel may have faults of its own:
whatever hangs is killed, and is an error in the table.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

from tracker import child
from tracker.pins.pinned import MEMORIES
from tracker.pins.pins import SCENARIOS, Finding, Findings, findings
from tracker.pins.watchers import WATCHERS
from tracker.probe.probe import lines

LIMIT_S = 20.0
"""How long one experiment may take; some milliseconds are usual."""

_STARTING_S = 120.0  # an interpreter and numpy, on an emulated machine
_ENDING_S = 2.0


@dataclass(frozen=True)
class Experiment:
    """What one tracker, one kind of memory and one pin do with each other.

    :ivar memory: a name in :data:`tracker.pins.pinned.MEMORIES`
    :ivar pin: a name in :data:`tracker.pins.pins.SCENARIOS`
    :ivar tracker: name of a watcher
    :ivar cpu_writes_reported: writes of the CPU to pinned pages
    :ivar coherent: the pin and the process mean the same page after that
    :ivar pin_writes_reported: writes through the pin
    """

    memory: str
    pin: str
    tracker: str
    cpu_writes_reported: Finding
    coherent: Finding
    pin_writes_reported: Finding


def run_matrix(limit_s: float = LIMIT_S) -> Iterator[Experiment]:
    """Do all experiments, one after the other, and tell of each as soon as it is over.

    They are done by a child process, whose children do one each. All of them are ended with the
    iterator, however it ends.

    :param limit_s: how long each may take
    :return: one for each memory, scenario and tracker, in order, also for those that hang
    :raise OSError: the child cannot be started
    """
    process = child.start(partial(main, limit_s), stdout=subprocess.PIPE)
    assert process.stdout is not None
    wanted = _names()
    try:
        with process.stdout:
            for line in lines(process.stdout.fileno(), _STARTING_S + limit_s + _ENDING_S):
                *names, found = json.loads(line)
                assert tuple(names) == wanted.pop(0)
                yield Experiment(*names, *(Finding(**finding) for finding in found))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING_S)
    failed = Finding("error", f"the process that tries ended: {process.returncode}")
    for names in wanted:
        yield Experiment(*names, failed, failed, failed)


def count() -> int:
    """How many experiments there are."""
    return len(_names())


def _names() -> list[tuple[str, str, str]]:
    return [
        (memory, scenario, watcher.name)
        for memory in MEMORIES
        for scenario in SCENARIOS
        for watcher in WATCHERS
    ]


def main(limit_s: float) -> None:
    """Do all experiments, each in a child; print a line of JSON for each."""
    watchers = {watcher.name: watcher for watcher in WATCHERS}
    for memory, name, watcher in _names():
        scenario = SCENARIOS[name]
        found = apart(
            partial(findings, MEMORIES[memory], scenario.pin, watchers[watcher], scenario.fork),
            limit_s,
        )
        print(json.dumps([memory, name, watcher, [asdict(f) for f in found]]), flush=True)


def apart(work: Callable[[], Findings], limit_s: float) -> Findings:
    """Do an experiment in a child, which is killed when it takes too long.

    The calling process should have a single thread, as any that forks.

    :param limit_s: how long it may take
    :raise OSError: there is no child to be had
    """
    theirs, ours = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(theirs)
            os.write(ours, json.dumps([asdict(finding) for finding in work()]).encode())
        finally:
            os._exit(0)
    os.close(ours)
    answer, in_time = b"", False
    with os.fdopen(theirs, "rb", buffering=0) as pipe:
        if select.select([pipe], [], [], limit_s)[0]:
            answer, in_time = pipe.read(1 << 16), True
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    ended = _reap(pid)
    if answer:
        first, second, third = (Finding(**finding) for finding in json.loads(answer))
        return first, second, third
    if ended is None:
        reason = f"process {pid} is stuck in the kernel until the host starts anew"
    elif in_time:
        reason = f"the process that tried it ended: {ended}"
    else:
        reason = "did not come to an end in time"
    failed = Finding("error", reason)
    return failed, failed, failed


def _reap(pid: int) -> int | None:
    """Exit code of a child that was killed; None if it does not end."""
    deadline = time.monotonic() + _ENDING_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None
