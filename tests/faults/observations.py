"""The observation of one disturbed migration, once the dust had settled: data without judgement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.faults.kinds import Fault
from tests.faults.plans import Plan
from tests.faults.strikes import Strike


@dataclass(frozen=True)
class SideSeen:
    """One QEMU.

    :ivar state: its run state in the end, or ``gone``
    :ivar intervals: when its guest ran, in seconds since the epoch
    :ivar loaded: whether it has loaded all of a VM, be that run or not
    :ivar changed: settings that are not as they were, in words
    :ivar traces: parts of the product that are still in its process
    """

    state: str
    intervals: tuple[tuple[float, float], ...] = ()
    loaded: bool = False
    changed: tuple[str, ...] = ()
    traces: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        return self.state == "running"

    @property
    def ran(self) -> bool:
        return bool(self.intervals)


@dataclass(frozen=True)
class Seen:
    """One disturbed migration.

    :ivar struck: the fault, or ``None`` if its moment never came
    :ivar exit_code: of the command; negative for a signal; ``None`` if it did not end
    :ivar said: the JSON object it printed, if it did
    :ivar stdout_open: whether it could print one
    :ivar complaints: tracebacks that the command and its helpers printed
    :ivar decision_s: when the command came to the point of no return, in seconds since the epoch
    :ivar looked_s: when the command had looked at the destination's space for the last time
    :ivar go_s: when the command went on after it had come to the point of no return
    :ivar beats_problem: of the heartbeats; likewise ``walk_problem`` of the guest's RAM
    :ivar left: processes and files of the product's that remain
    :ivar receiver_code: exit code of the receiver; ``None`` if there is none, or it goes on
    :ivar follow_up: the fault of the next migration of the VM that remained
    :ivar resolution: the fault in the words or deeds of ``migrator resolve``
    :ivar timeline: all that happened, for people
    """

    plan: Plan
    struck: Strike | None
    exit_code: int | None
    source: SideSeen
    destination: SideSeen
    said: Mapping[str, Any] | None = None
    stdout_open: bool = True
    complaints: tuple[str, ...] = ()
    decision_s: float | None = None
    looked_s: float | None = None
    go_s: float | None = None
    beats_problem: str = ""
    walk_problem: str = ""
    left: tuple[str, ...] = ()
    receiver_code: int | None = None
    follow_up: str = ""
    resolution: str = ""
    timeline: tuple[str, ...] = field(default=(), repr=False)

    @property
    def disturbed(self) -> bool:
        """Whether a fault struck, and was accepted where QEMU was told something."""
        if self.struck is None or self.plan.fault is Fault.NONE:
            return False
        return self.struck.accepted
