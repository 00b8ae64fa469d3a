"""The conditions that must hold after every migration, however it was disturbed.

Each is a pure function of an observation, and gives the violations that it finds, in words.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from tests.faults.kinds import (
    CONTINUES_SOURCE,
    DECIDABLE,
    ENDS_DESTINATION,
    ENDS_SOURCE,
    KILLS_COMMAND,
    RESETS,
    Fault,
)
from tests.faults.observations import Seen

_BEFORE_IT_BEGAN = ("start", "preflight")
_AFTER_THE_DECISION = ("finish", "rollback")
_LEFT_STANDING = ("paused", "postmigrate", "finish-migrate")


def _is(seen: Seen, *faults: Fault) -> bool:
    return seen.disturbed and seen.plan.fault in faults


def _ended_at_the_destination(seen: Seen) -> bool:
    """Whether the fault itself ended a destination that ran.

    Of a file system that fills up: only after the last look at its space. The guest dies of it when
    it touches a page for the first time, as every other VM on that file system does.
    """
    struck, looked_s = seen.struck, seen.looked_s
    if not seen.destination.ran or struck is None:
        return False
    late = looked_s is not None and struck.at_s > looked_s
    return _is(seen, *ENDS_DESTINATION) or (_is(seen, Fault.DESTINATION_FULL) and late)


def by_the_operator(seen: Seen) -> bool:
    """Whether it was the operator that let the source run, too late for the command to notice.

    From *go* on the destination may run: a ``cont`` of the source after that moment is not seen in
    time by any program outside QEMU.
    """
    return (
        _is(seen, *CONTINUES_SOURCE)
        and seen.go_s is not None
        and any(began > seen.go_s for began, _ in seen.source.intervals)
    )


def _stopped_by_the_operator(seen: Seen) -> bool:
    """Whether the operator's last accepted word about the source was ``stop``."""
    refused = seen.struck is not None and seen.struck.half_accepted
    return _is(seen, Fault.SOURCE_STOP) or (_is(seen, Fault.SOURCE_STOP_CONT) and refused)


def command_ends(seen: Seen) -> list[str]:
    """The command ends by itself, and not by an exception that it does not expect."""
    found = [f"a traceback: {complaint}" for complaint in seen.complaints]
    if seen.exit_code is None:
        found.append("the command does not end")
    return found


def never_two(seen: Seen) -> list[str]:
    """From the moment that the destination runs, the source never does again."""
    if not seen.destination.ran:
        return []
    first_s = seen.destination.intervals[0][0]
    found = []
    for began, ended in seen.source.intervals:
        if ended > first_s and not _resumed_in_vain(seen, began, ended):
            until = "and runs still" if ended == float("inf") else f"until {ended - first_s:+.4f} s"
            found.append(
                f"the source ran, from {began - first_s:+.4f} s {until}, counted from when the "
                "destination did"
            )
    return found


def _resumed_in_vain(seen: Seen, began_s: float, ended_s: float) -> bool:
    """Whether it was the operator that resumed the source, and nothing was lost by that.

    From the decision on, the command may hold the source's vCPUs: a source that is resumed then
    says so, but stands until it is stopped again. The heartbeats tell: they are judged as ever,
    unless the operator let it run once more afterwards.
    """
    if not _is(seen, *CONTINUES_SOURCE) or seen.decision_s is None or seen.go_s is None:
        return False
    if began_s > seen.go_s:
        return True
    return began_s >= seen.decision_s and ended_s < float("inf")


def one_runs(seen: Seen) -> list[str]:
    """One side runs in the end, unless the fault itself ended or stopped it."""
    source, destination = seen.source, seen.destination
    if seen.plan.paused:
        return _none_runs(seen)
    if source.runs or destination.runs:
        return []
    excused = (
        (_is(seen, *ENDS_SOURCE) and source.state == "gone")
        or _ended_at_the_destination(seen)
        or (_stopped_by_the_operator(seen) and "paused" in (source.state, destination.state))
        or (_is(seen, Fault.DESTINATION_STOP) and destination.state == "paused")
        or _is(seen, Fault.COMMAND_AND_GUARD_KILL)
        or seen.exit_code in (4, 5, 6)  # whether that is the truth is judged elsewhere
    )
    if excused:
        return []
    return [f"neither side runs: source {source.state!r}, destination {destination.state!r}"]


def _none_runs(seen: Seen) -> list[str]:
    """A guest that was paused stands still, on the one side or on the other."""
    found = []
    if len(seen.source.intervals) > 1 or seen.source.runs:
        found.append("the source ran, though its guest had been paused")
    if seen.destination.ran:
        found.append("the destination ran, though the guest had been paused")
    moved = seen.destination.loaded
    if not moved and not (seen.source.state in _LEFT_STANDING or seen.source.state == "gone"):
        found.append(f"the paused source is {seen.source.state!r}")
    if seen.exit_code is not None and seen.exit_code in (0, 1):
        expected = seen.exit_code == 0 and not seen.plan.memory_only
        if moved != expected:
            found.append(
                f"exit code {seen.exit_code}, but the destination is {seen.destination.state!r}"
            )
    return found


def heart_beats_on(seen: Seen) -> list[str]:
    """The guest goes on where it was: its heartbeats are numbered."""
    if by_the_operator(seen) or _is(seen, *RESETS, Fault.GUEST_ENDS) or not seen.beats_problem:
        return []
    return [seen.beats_problem]


def memory_is_whole(seen: Seen) -> list[str]:
    """No page was lost: by the guest's own writes, and by the comparison of both sides."""
    found = [f"RAM: {seen.walk_problem}"] if seen.walk_problem else []
    said = seen.said or {}
    mismatched = said.get("mismatched_pages")
    disturbing = (*CONTINUES_SOURCE, *RESETS, Fault.SOURCE_STOP, Fault.DESTINATION_CONT)
    if mismatched and (said.get("status") == "completed" or not _is(seen, *disturbing)):
        found.append(f"{mismatched} pages differ ({said.get('status')})")
    if seen.plan.verify and said.get("status") == "completed" and not said.get("verified_pages"):
        found.append("nothing was compared, though that was asked for")
    return found


def settings_as_before(seen: Seen) -> list[str]:
    """Capabilities and parameters of each QEMU that lives are as they were."""
    if _is(seen, Fault.COMMAND_AND_GUARD_KILL):  # no process is left to put them back
        return []
    found = []
    for name, side in (("source", seen.source), ("destination", seen.destination)):
        if side.changed:
            found.append(f"{name}: {'; '.join(side.changed)}")
    return found


def exit_code_is_true(seen: Seen) -> list[str]:
    """The exit code is the truth."""
    code = seen.exit_code
    if code is None:
        return []
    if code < 0:
        return _ended_by_signal(seen, -code)
    judge = {0: _done, 1: _source_runs, 3: _nothing_changed, 4: _undecided}.get(code)
    if judge is not None:
        return judge(seen) + _as_expected(seen)
    if code == 5 and _is(seen, *ENDS_SOURCE, *ENDS_DESTINATION, *RESETS):
        return []
    if code == 6 and seen.source.state == "gone":
        return []
    return [f"exit code {code}; source {seen.source.state!r}"]


def _ended_by_signal(seen: Seen, number: int) -> list[str]:
    if _is(seen, *KILLS_COMMAND):
        return []
    early = seen.struck is not None and seen.struck.phase in _BEFORE_IT_BEGAN
    if early and _is(seen, Fault.COMMAND_INT, Fault.COMMAND_TERM):
        return []
    return [f"the command was ended by signal {number}"]


def _done(seen: Seen) -> list[str]:
    if seen.plan.memory_only:
        return _source_runs(seen)
    found = []
    if seen.source.runs and not by_the_operator(seen):
        found.append("exit code 0, but the source runs")
    may_stand = seen.plan.paused or _stopped_by_the_operator(seen)
    arrived = seen.destination.ran or (seen.destination.loaded and may_stand)
    if not arrived:
        found.append("exit code 0, but the destination never ran")
    stands = may_stand or _ended_at_the_destination(seen) or _is(seen, Fault.DESTINATION_STOP)
    if arrived and not (seen.destination.runs or stands):
        found.append(f"exit code 0, but the destination is {seen.destination.state!r}")
    return found


def _source_runs(seen: Seen) -> list[str]:
    code, source = seen.exit_code, seen.source
    found = []
    if seen.destination.ran:
        found.append(f"exit code {code}, but the destination ran")
    # a rehearsal lets the source go on in the phase "resume", and has no decision
    after = (*_AFTER_THE_DECISION, *(["resume"] if seen.plan.memory_only else []))
    late = seen.struck is not None and seen.struck.phase in after
    excused = (
        seen.plan.paused
        or (_stopped_by_the_operator(seen) and source.state == "paused")
        or (_is(seen, *ENDS_SOURCE) and source.state == "gone" and late)
    )
    if not source.runs and not excused:
        found.append(f"exit code {code}, but the source is {source.state!r}")
    return found


def _nothing_changed(seen: Seen) -> list[str]:
    found = _source_runs(seen)
    early = seen.struck is not None and seen.struck.phase in _BEFORE_IT_BEGAN
    if not early:
        found.append("exit code 3, though nothing had changed before the migration began")
    return found


def _undecided(seen: Seen) -> list[str]:
    plan = seen.plan
    decidable = not seen.disturbed or plan.fault in DECIDABLE
    if plan.fault is Fault.LINK_BLINK and plan.lasting_s > plan.reconnect_s / 2:
        decidable = False
    if decidable and seen.source.runs != seen.destination.runs and not by_the_operator(seen):
        side = "source" if seen.source.runs else "destination"
        return [f"exit code 4, though it could be known that the {side} runs"]
    return []


def _as_expected(seen: Seen) -> list[str]:
    """An undisturbed migration is done; one that is only interrupted is aborted."""
    undisturbed = seen.plan.fault is Fault.NONE or seen.struck is None
    if not undisturbed or seen.plan.fault in (Fault.OUTPUT_FULL,):
        return []
    expected = 0
    if seen.plan.moment.interrupt_at is not None:
        expected = 1
    if seen.exit_code != expected and not (seen.exit_code == 0 and expected == 1):
        return [f"undisturbed, but exit code {seen.exit_code}"]
    return []


def says_so(seen: Seen) -> list[str]:
    """The last line of stdout is a JSON object that agrees with the exit code."""
    code = seen.exit_code
    if code is None or code < 0 or not seen.stdout_open:
        return []
    if seen.said is None:
        return [f"exit code {code}, but no JSON object"]
    status = seen.said.get("status")
    if (status == "completed") != (code == 0):
        return [f"exit code {code}, but status {status!r}"]
    return []


def receiver_is_true(seen: Seen) -> list[str]:
    """The receiver's exit code is the truth."""
    code, destination = seen.receiver_code, seen.destination
    if code is None or code < 0:
        if code is not None and not _is(seen, Fault.RECEIVER_KILL, Fault.RECEIVER_HUP):
            return [f"the receiver was ended by signal {-code}"]
        return []
    arrived = destination.ran or destination.loaded
    if code == 0 and not arrived:
        return ["the receiver's exit code is 0, but the destination never ran"]
    if code == 1 and destination.ran:
        return ["the receiver's exit code is 1, but the destination ran"]
    if code not in (0, 1, 4) or (code == 4 and not seen.disturbed):
        return [f"the receiver's exit code is {code}"]
    return []


def nothing_is_left(seen: Seen) -> list[str]:
    """No process, file, tracer or userfaultfd of the product's remains."""
    found = [f"left: {each}" for each in seen.left]
    for name, side in (("source", seen.source), ("destination", seen.destination)):
        found += [f"in the {name}: {trace}" for trace in side.traces]
    return found


def goes_on(seen: Seen) -> list[str]:
    """The VM that remains can be migrated again, after ``migrator resolve`` if need be."""
    found = [f"resolve: {seen.resolution}"] if seen.resolution else []
    return found + ([f"follow-up: {seen.follow_up}"] if seen.follow_up else [])


ORACLES: tuple[Callable[[Seen], list[str]], ...] = (
    command_ends,
    never_two,
    one_runs,
    heart_beats_on,
    memory_is_whole,
    settings_as_before,
    exit_code_is_true,
    says_so,
    receiver_is_true,
    nothing_is_left,
    goes_on,
)


def violations(seen: Seen, without: Collection[str] = ()) -> list[str]:
    """All violations, each with the name of its oracle.

    :param without: names of oracles that are not asked
    """
    asked = [oracle for oracle in ORACLES if oracle.__name__ not in without]
    return [f"{oracle.__name__}: {found}" for oracle in asked for found in oracle(seen)]


def outcome(seen: Seen) -> str:
    """How it ended, in a word for a table."""
    code = "hangs" if seen.exit_code is None else str(seen.exit_code)
    if seen.source.runs and seen.destination.runs:
        return f"{code}/both" + ("-by-operator" if by_the_operator(seen) else "")
    side = "S" if seen.source.runs else "D" if seen.destination.runs else "-"
    return f"{code}/{side}"
