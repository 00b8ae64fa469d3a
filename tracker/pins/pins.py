"""Pinned pages and write-protection: what holds in this kernel, found by trying.

In December 2021 the kernel developers asked what a pinned page and a write-protected mapping owe
each other (the thread "mm: support GUP-triggered unsharing of anonymous pages"). A migration needs
three answers about memory that somebody has pinned:

- are writes of the CPU still reported;
- do the pin and the process still mean the same page after such a write, or did it copy the page;
- is what the kernel or a device writes *through the pin* reported.

An experiment puts together one kind of memory (:data:`tracker.pins.pinned.MEMORIES`), a pin and a
fork (:data:`SCENARIOS`), and a tracker (:data:`tracker.pins.watchers.WATCHERS`). Answers come from
bytes and bits that are compared. Beside the pinned pages, pages that nobody pinned are written and
left alone: a tracker that is wrong about those answers nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tracker.errors import NotTracking, TrackerError
from tracker.pins.pinned import (
    Memory,
    NoPin,
    Pin,
    ReadInFlight,
    RegisteredBuffers,
    Spliced,
    WriteInFlight,
)
from tracker.pins.watchers import Watcher

CPU_PAGES = (0, 1)
"""Pinned, and written by the CPU."""
PINNED_PAGES = (0, 1, 2, 3)
"""Pinned, and written through the pin where it can be."""
WRITTEN_PAGE = 4
"""Not pinned, and written by the CPU each time: must be reported."""
QUIET_PAGE = 5
"""Not pinned, and never written: must not be."""
NPAGES = 6

_QUIET_REPORTED = "a page that is not pinned is reported, though nobody wrote to it"

_OLD, _BY_CPU, _BY_PIN = 0x10, 0xC0, 0xD0

Answer = Literal["yes", "no", "always", "not applicable", "not tried", "error"]


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    :ivar answer: ``always`` where pages are reported whether they are written or not, which is safe
        and says nothing; ``not tried`` where this machine cannot, ``error`` where the experiment
        itself went wrong: then nothing is known
    :ivar seen: what was seen, or why there is no answer
    """

    answer: Answer
    seen: str


@dataclass(frozen=True)
class Scenario:
    """A pin, and when the process forks.

    :ivar pin: what holds on to :data:`PINNED_PAGES`
    :ivar fork: a child is made before the pin is taken, or after the tracker has begun, and lives
        until the end; it touches nothing
    """

    pin: type[NoPin | RegisteredBuffers | WriteInFlight | ReadInFlight | Spliced]
    fork: Literal["never", "before the pin", "after the pin"] = "never"


SCENARIOS: dict[str, Scenario] = {
    "no pin": Scenario(NoPin),
    "write pin": Scenario(RegisteredBuffers),
    "read-only pin": Scenario(WriteInFlight),
    "O_DIRECT read in flight": Scenario(ReadInFlight),
    "write pin, then fork": Scenario(RegisteredBuffers, "after the pin"),
    "fork, then read-only pin": Scenario(WriteInFlight, "before the pin"),
    "fork, then reference": Scenario(Spliced, "before the pin"),
}
"""All of them, by name. A *reference* is what a pin was before the kernel had pins: vmsplice(2)."""


class _NotTried(Exception):
    """This machine cannot do the experiment."""


class _Failed(Exception):
    """The experiment went wrong, and says nothing."""


Findings = tuple[Finding, Finding, Finding]


def findings(
    make_memory: Callable[[int], Memory],
    make_pin: Callable[[Memory, Sequence[int]], Pin],
    make_watcher: Callable[[Memory], Watcher],
    fork: str = "never",
) -> Findings:
    """Do one experiment, in this process, which may hang.

    :return: about the CPU's writes, coherence, and writes through the pin
    """
    try:
        return _experiment(make_memory, make_pin, make_watcher, fork)
    except _NotTried as error:
        finding = Finding("not tried", str(error))
    except _Failed as error:
        finding = Finding("error", str(error))
    except (TrackerError, OSError) as error:
        finding = Finding("error", _reason(error))
    return finding, finding, finding


def _experiment(
    make_memory: Callable[[int], Memory],
    make_pin: Callable[[Memory, Sequence[int]], Pin],
    make_watcher: Callable[[Memory], Watcher],
    fork: str,
) -> Findings:
    with contextlib.ExitStack() as stack:
        try:
            memory = make_memory(NPAGES)
        except OSError as error:
            raise _NotTried(_reason(error)) from error
        for page in range(NPAGES):
            memory.fill(page, _OLD)
        _calibrate(memory, make_watcher(memory))
        if fork == "before the pin":
            stack.enter_context(_child())
        pin = make_pin(memory, PINNED_PAGES)
        stack.callback(pin.release)
        try:
            pin.take()
        except OSError as error:
            raise _NotTried(f"the pages cannot be pinned: {_reason(error)}") from error
        watcher = make_watcher(memory)
        stack.callback(watcher.stop)
        watcher.start()
        if fork == "after the pin":
            stack.enter_context(_child())
        return _observe(memory, pin, watcher)


def _calibrate(memory: Memory, watcher: Watcher) -> None:
    """Check that the tracker is right about memory that nobody has pinned."""
    try:
        watcher.start()
        for step in (1, 2):
            memory.fill(WRITTEN_PAGE, _OLD + step)
            reported = watcher.collect()
            if reported != {WRITTEN_PAGE}:
                raise _NotTried(
                    f"not on this memory: page {WRITTEN_PAGE} was written, {_list(reported)} "
                    "reported, though nothing is pinned"
                )
    except NotTracking as error:
        raise _NotTried(error.reason) from error
    except OSError as error:
        raise _NotTried(_reason(error)) from error
    finally:
        watcher.stop()


def _observe(memory: Memory, pin: Pin, watcher: Watcher) -> Findings:
    idle = _idle(watcher)
    for page in (*CPU_PAGES, WRITTEN_PAGE):
        memory.fill(page, _BY_CPU + page)
    reported = _checked(watcher)
    idle |= _idle(watcher)
    cpu = _reported(CPU_PAGES, reported, idle)
    coherent = pin_writes = Finding("not applicable", "there is no pin")
    if pin.reads:
        seen = pin.read()
        right = [seen[page] == bytes([_BY_CPU + page]) * len(seen[page]) for page in CPU_PAGES]
        coherent = _agreed(right, "the pin sees what the CPU wrote", "the pin sees older bytes")
        pin_writes = Finding("not applicable", "nobody writes through this pin")
    if pin.writes and coherent.answer != "no":
        idle = _idle(watcher)
        pin.write(_BY_PIN)
        memory.fill(WRITTEN_PAGE, _BY_PIN + 1)
        reported = _checked(watcher)
        idle |= _idle(watcher)
        right = [memory.holds(page, _BY_PIN) for page in PINNED_PAGES]
        agreed = _agreed(right, "the CPU sees what the pin wrote", "the CPU sees older bytes")
        both = f"{coherent.seen}; {agreed.seen}" if pin.reads else agreed.seen
        coherent = Finding(agreed.answer, both)
        pin_writes = _reported(PINNED_PAGES, reported, idle)
        if agreed.answer == "no":
            pin_writes = Finding("not applicable", "what is written through the pin is lost")
    elif pin.writes:
        pin_writes = Finding("not applicable", "what is written through the pin is lost")
    return cpu, coherent, pin_writes


def _checked(watcher: Watcher) -> set[int]:
    """What is reported, if it is right about the pages that nobody has pinned."""
    reported = watcher.collect()
    if WRITTEN_PAGE not in reported:
        raise _Failed("a write to a page that is not pinned is not reported")
    if QUIET_PAGE in reported:
        raise _Failed(_QUIET_REPORTED)
    return reported


def _idle(watcher: Watcher) -> set[int]:
    """What is reported when nobody has written; none of that may be a page that is not pinned."""
    reported = watcher.collect()
    if reported.difference(PINNED_PAGES):
        raise _Failed(_QUIET_REPORTED)
    return reported


def _reported(written: Sequence[int], reported: set[int], idle: set[int]) -> Finding:
    count = len(reported.intersection(written))
    seen = f"{count} of {len(written)} pages"
    always = len(idle.intersection(written))
    if always:
        seen += f", and {always} of them also when nobody writes"
    if count < len(written):
        return Finding("no", seen)
    return Finding("always" if always else "yes", seen)


def _agreed(right: Sequence[bool], yes: str, no: str) -> Finding:
    if all(right):
        return Finding("yes", f"{yes}, on {len(right)} pages")
    return Finding("no", f"{no}, on {right.count(False)} of {len(right)} pages")


@contextlib.contextmanager
def _child() -> Iterator[None]:
    """Fork; the child has our memory and does nothing."""
    theirs, ours = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(ours)
            os.read(theirs, 1)
        finally:
            os._exit(0)
    os.close(theirs)
    try:
        yield
    finally:
        os.close(ours)
        os.waitpid(pid, 0)


def _list(pages: set[int]) -> str:
    return f"page {', '.join(map(str, sorted(pages)))}" if pages else "nothing"


def _reason(error: Exception) -> str:
    if isinstance(error, TrackerError):
        return str(getattr(error, "reason", error))
    return str(error.strerror if isinstance(error, OSError) and error.strerror else error)
