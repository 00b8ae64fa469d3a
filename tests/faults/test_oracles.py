"""Each oracle finds violations of its own kind, in observations that were broken on purpose."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from migrator.guest.workload import Workload
from tests.faults import moments, oracles, plans
from tests.faults.kinds import PLAIN, TWO_HOSTS_ONLY, Fault
from tests.faults.moments import Moment
from tests.faults.monitors import QemuEvent, running_intervals
from tests.faults.observations import Seen, SideSeen
from tests.faults.plans import Plan
from tests.faults.scenes import beats_problem, walk_problem
from tests.faults.strikes import Strike

FOREVER = float("inf")
MOVED = (
    SideSeen("postmigrate", ((0.0, 10.0),)),
    SideSeen("running", ((10.1, FOREVER),), loaded=True),
)
STAYED = SideSeen("running", ((0.0, 10.0), (10.2, FOREVER))), SideSeen("gone")
DONE = {"status": "completed", "verified_pages": 100, "mismatched_pages": 0}
GIVEN_UP = {"status": "failed"}


def plan(fault: Fault = Fault.NONE, **changed: Any) -> Plan:
    """A plan on one host, verified, of a guest that runs."""
    changed = {"moment": Moment("load", held=True), "paused": False, "verify": True, **changed}
    return replace(
        plans.draw(1, hosts_share=0.0), **{"fault": fault, "memory_only": False, **changed}
    )


def seen(
    code: int | None,
    sides: tuple[SideSeen, SideSeen],
    fault: Fault = Fault.NONE,
    phase: str = "load",
    **more: Any,
) -> Seen:
    known: dict[str, Any] = {
        "plan": plan(fault),
        "struck": Strike(phase, 9.9),
        "exit_code": code,
        "said": DONE if code == 0 else GIVEN_UP,
        "source": sides[0],
        "destination": sides[1],
        "decision_s": 10.03,
        "go_s": 10.05,
    }
    return Seen(**{**known, **more})


def names(observation: Seen) -> set[str]:
    return {violation.split(":")[0] for violation in oracles.violations(observation)}


# -- observations in which all is well -------------------------------------------------------------

GONE = SideSeen("gone", ((0.0, 9.9),))
OPERATED = SideSeen("running", ((0.0, 10.0), (10.5, FOREVER)))
HELD = SideSeen("paused", ((0.0, 10.0), (10.04, 10.2)))
PAUSED = SideSeen("paused", ((0.0, 1.0),))
NEVER_RAN = SideSeen("gone")
STANDS = SideSeen("paused", loaded=True)

FINE = {
    "moved": seen(0, MOVED),
    "given up": seen(1, STAYED, Fault.DESTINATION_KILL),
    "killed": seen(-9, STAYED, Fault.COMMAND_KILL, said=None),
    "killed with the guard": seen(
        -9, (SideSeen("finish-migrate", ((0.0, 10.0),)), NEVER_RAN), Fault.COMMAND_AND_GUARD_KILL
    ),
    "the source is gone": seen(4, (GONE, NEVER_RAN), Fault.SOURCE_KILL),
    "not reachable": seen(6, (GONE, NEVER_RAN), Fault.SOURCE_KILL),
    "the guest has ended": seen(5, (GONE, NEVER_RAN), Fault.GUEST_ENDS),
    "the operator let the source run": seen(0, (OPERATED, MOVED[1]), Fault.SOURCE_CONT, "finish"),
    "the operator resumed a source that was held": seen(
        0, (HELD, MOVED[1]), Fault.SOURCE_CONT, "resume"
    ),
    "the operator stopped it there": seen(
        0, (MOVED[0], SideSeen("paused", ((10.1, 11.0),))), Fault.DESTINATION_STOP, "finish"
    ),
    "it ended there": seen(
        0, (MOVED[0], SideSeen("gone", ((10.1, 11.0),))), Fault.DESTINATION_KILL, "finish"
    ),
    "paused, and moved": seen(0, (PAUSED, STANDS), plan=plan(paused=True)),
    "paused, moved and ended there": seen(
        0, (PAUSED, replace(STANDS, state="gone")), plan=plan(Fault.DESTINATION_KILL, paused=True)
    ),
    "stopped by the operator, whose cont was refused": seen(
        0, (PAUSED, STANDS), Fault.SOURCE_STOP_CONT,
        struck=Strike("switchover", 9.9, ["done", "cont: refused"]),
    ),
    "paused, and not moved": seen(
        1, (PAUSED, NEVER_RAN), Fault.COMMAND_INT, plan=plan(Fault.COMMAND_INT, paused=True)
    ),
    "a rehearsal": seen(0, STAYED, plan=plan(memory_only=True), go_s=None),
    "undecided": seen(
        4, (SideSeen("postmigrate", ((0.0, 10.0),)), NEVER_RAN), Fault.LINK_CUT, "resume"
    ),
    "booted anew": seen(0, MOVED, Fault.SOURCE_RESET, beats_problem="heartbeat 0"),
    "nothing to print to": seen(
        0, MOVED, Fault.OUTPUT_CLOSED, said=None, stdout_open=False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FINE)
def test_a_good_observation_has_no_violation(name: str) -> None:
    assert oracles.violations(FINE[name]) == []


# -- the same, broken ------------------------------------------------------------------------------

RAN_BOTH = replace(MOVED[0], intervals=((0.0, 10.0), (10.04, FOREVER)), state="running")
EARLIER = replace(HELD, intervals=((0.0, 10.0), (10.02, 10.2)))
FOR_A_MOMENT = replace(MOVED[0], intervals=((0.0, 10.0), (10.11, 10.12)))
CHANGED = SideSeen("inmigrate", changed=("events",))
NEITHER = SideSeen("postmigrate", ((0.0, 10.0),)), NEVER_RAN

BROKEN = [
    ("command_ends", seen(None, STAYED)),
    ("command_ends", replace(FINE["moved"], complaints=("OSError: no space",))),
    ("never_two", seen(0, (RAN_BOTH, MOVED[1]))),
    ("never_two", seen(0, (FOR_A_MOMENT, MOVED[1]))),
    # a source that ran before go is not the operator's affair: it could have been noticed
    ("never_two", seen(0, (RAN_BOTH, MOVED[1]), Fault.SOURCE_CONT)),
    # it was resumed before the decision, which had to notice that
    ("never_two", seen(0, (EARLIER, MOVED[1]), Fault.SOURCE_CONT)),
    # it was not the operator that resumed it
    ("never_two", seen(0, (HELD, MOVED[1]))),
    # resumed after the decision, and not held: both have beaten
    ("heart_beats_on", seen(0, (HELD, MOVED[1]), Fault.SOURCE_CONT, beats_problem="heartbeat 7")),
    # the source ends later than the destination begins
    ("never_two", seen(0, (replace(MOVED[0], intervals=((0.0, 10.1001),)), MOVED[1]))),
    # the old one is let run once the new one has died: all that was written meanwhile is lost
    ("never_two", seen(1, (STAYED[0], SideSeen("gone", ((10.1, 10.15),))), Fault.DESTINATION_KILL)),
    ("one_runs", seen(1, NEITHER)),
    ("one_runs", seen(-9, NEITHER, Fault.COMMAND_KILL)),
    ("one_runs", seen(1, (PAUSED, NEVER_RAN), Fault.SOURCE_CONT)),
    # the fault never struck, so that it excuses nothing
    ("one_runs", seen(-9, NEITHER, Fault.COMMAND_AND_GUARD_KILL, struck=None)),
    ("one_runs", replace(FINE["paused, and moved"], destination=MOVED[1])),
    ("one_runs", replace(FINE["paused, and not moved"], source=STAYED[0])),
    ("one_runs", replace(FINE["paused, and not moved"], exit_code=0, said=DONE)),
    ("one_runs", seen(0, (PAUSED, STANDS), Fault.SOURCE_STOP_CONT)),
    ("heart_beats_on", replace(FINE["moved"], beats_problem="heartbeat 7 where 5 was expected")),
    ("memory_is_whole", replace(FINE["moved"], walk_problem="page 3 is at 9, but page 4 at 7")),
    ("memory_is_whole", replace(FINE["moved"], said={**DONE, "mismatched_pages": 2})),
    ("memory_is_whole", replace(FINE["given up"], said={**GIVEN_UP, "mismatched_pages": 2})),
    ("memory_is_whole", replace(FINE["moved"], said={**DONE, "verified_pages": None})),
    ("settings_as_before", replace(FINE["moved"], source=replace(MOVED[0], changed=("events",)))),
    ("settings_as_before", replace(FINE["given up"], destination=CHANGED)),
    ("exit_code_is_true", seen(0, STAYED)),
    ("exit_code_is_true", seen(0, (RAN_BOTH, MOVED[1]))),
    ("exit_code_is_true", seen(0, (MOVED[0], SideSeen("inmigrate")))),
    ("exit_code_is_true", seen(0, (MOVED[0], SideSeen("paused", ((10.1, 11.0),))))),
    ("exit_code_is_true", seen(1, MOVED, Fault.COMMAND_INT)),
    ("exit_code_is_true", seen(1, (GONE, NEVER_RAN), Fault.SOURCE_KILL)),
    ("exit_code_is_true", seen(1, STAYED)),  # undisturbed, but not done
    ("exit_code_is_true", seen(2, STAYED, Fault.COMMAND_INT)),
    ("exit_code_is_true", seen(3, STAYED, Fault.COMMAND_INT)),
    ("exit_code_is_true", seen(3, MOVED, Fault.COMMAND_INT, "preflight")),
    ("exit_code_is_true", seen(4, STAYED, Fault.COMMAND_INT)),
    ("exit_code_is_true", seen(4, MOVED, Fault.SOURCE_FREEZE)),
    ("exit_code_is_true", seen(5, STAYED, Fault.COMMAND_INT)),
    ("exit_code_is_true", seen(6, STAYED, Fault.COMMAND_INT)),
    ("exit_code_is_true", seen(-15, STAYED, Fault.COMMAND_TERM)),
    ("exit_code_is_true", seen(0, MOVED, plan=plan(memory_only=True))),
    ("says_so", replace(FINE["moved"], said=None)),
    ("says_so", replace(FINE["moved"], said=GIVEN_UP)),
    ("says_so", replace(FINE["given up"], said=DONE)),
    ("receiver_is_true", replace(FINE["moved"], receiver_code=1)),
    ("receiver_is_true", replace(FINE["moved"], receiver_code=4)),
    ("receiver_is_true", replace(FINE["given up"], receiver_code=0)),
    ("receiver_is_true", replace(FINE["given up"], receiver_code=-11)),
    ("nothing_is_left", replace(FINE["moved"], left=("process 1",))),
    ("nothing_is_left", replace(FINE["moved"], source=replace(MOVED[0], traces=("TracerPid",)))),
    ("goes_on", replace(FINE["moved"], follow_up="Failed: 1 pages differ")),
    ("goes_on", replace(FINE["killed"], resolution="--decide source: exit code 4")),
]  # fmt: skip


@pytest.mark.parametrize(("oracle", "observation"), BROKEN)
def test_a_broken_observation_is_found(oracle: str, observation: Seen) -> None:
    assert oracle in names(observation)


def test_every_oracle_is_shown_to_find_something() -> None:
    assert {oracle for oracle, _ in BROKEN} == {each.__name__ for each in oracles.ORACLES}


def test_an_oracle_that_is_not_asked_finds_nothing() -> None:
    broken = replace(FINE["moved"], walk_problem="page 3", left=("process 1",))
    found = oracles.violations(broken, without=["nothing_is_left"])
    assert [each.split(":")[0] for each in found] == ["memory_is_whole"]


# -- the oracles' own material ---------------------------------------------------------------------


def _events(*names_and_times: tuple[str, float]) -> list[QemuEvent]:
    return [QemuEvent(name, at_s) for name, at_s in names_and_times]


def test_a_guest_runs_between_resume_and_stop() -> None:
    events = _events(("STOP", 2.0), ("MIGRATION", 2.1), ("RESUME", 3.0), ("RESUME", 3.5))
    assert running_intervals(1.0, events, None) == ((1.0, 2.0), (3.0, FOREVER))
    assert running_intervals(1.0, events, 4.0) == ((1.0, 2.0), (3.0, 4.0))
    assert running_intervals(None, events[:1], None) == ()
    assert running_intervals(None, events, None) == ((3.0, FOREVER),)


def test_heartbeats_count_up_from_console_to_console() -> None:
    first, second = b"00000000\n00000001\n0000", b"0002\n00000003\n"
    assert beats_problem(first, second) == ""
    assert "where 2" in beats_problem(first[:18], second[5:])
    assert "where 2" in beats_problem(first[:18], b"00000001\n")
    assert "not a heartbeat" in beats_problem(first, first)


def _walked(position: int, value: int, workload: Workload) -> np.ndarray[Any, np.dtype[np.uint8]]:
    ram = np.zeros(workload.end, np.uint8)
    pages = np.arange(workload.npages)
    ram[workload.start :: 4096] = np.where(pages < position, value + 1, value)
    return ram


def test_a_lost_page_shows_in_ram_also_after_a_reset() -> None:
    workload = Workload(working_set_bytes=1 << 20, start=1 << 20)
    ram = _walked(100, 255, workload)
    assert walk_problem(ram, workload, 0) == walk_problem(ram, workload, 1) == ""
    again = ram.copy()
    again[workload.start : workload.start + 30 * 4096 : 4096] += 1  # a walk begun anew
    assert walk_problem(again, workload, 0)
    assert walk_problem(again, workload, 1) == ""
    for resets, kept in ((0, ram), (1, again)):
        lost = kept.copy()
        lost[workload.start + 200 * 4096] -= 1
        assert walk_problem(lost, workload, resets)


# -- plans -------------------------------------------------------------------------------


def test_a_plan_follows_from_its_seed() -> None:
    assert plans.draw(7) == plans.draw(7)
    assert len({str(plans.draw(seed)) for seed in range(100)}) > 90


def test_every_fault_and_every_phase_comes_up() -> None:
    drawn = [plans.draw(seed) for seed in range(4000)]
    assert {each.fault for each in drawn} == set(Fault)
    phases = Counter(each.moment.phase for each in drawn)
    assert set(phases) == {*moments.EARLY, *moments.LATE, moments.ROLLBACK}
    late = sum(phases[phase] for phase in moments.LATE)
    assert 0.6 < late / len(drawn) < 0.75
    for each in drawn:
        assert each.two_hosts or each.fault not in TWO_HOSTS_ONLY
        assert not each.paused or each.fault in PLAIN
        assert (each.moment.interrupt_at is not None) == (each.moment.phase == moments.ROLLBACK)
    assert not any(plans.draw(seed, hosts_share=0.0).two_hosts for seed in range(100))


def test_faults_may_be_chosen() -> None:
    only = frozenset({Fault.SOURCE_CONT, Fault.LINK_CUT})
    drawn = [plans.draw(seed, only=only) for seed in range(200)]
    assert {each.fault for each in drawn} == only
    with pytest.raises(ValueError, match="none of these"):
        plans.draw(1, hosts_share=0.0, only=frozenset({Fault.LINK_CUT}))
