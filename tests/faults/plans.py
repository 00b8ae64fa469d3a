"""The plan of one disturbed migration: all of it follows from one seed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from random import Random

from migrator.guest.workload import Workload
from tests.faults import moments
from tests.faults.kinds import PLAIN, TWO_HOSTS_ONLY, Fault
from tests.faults.moments import Moment

MIB = 1 << 20

_TWICE = (
    *[Fault.NONE, Fault.SOURCE_CONT, Fault.SOURCE_CONT_BURST, Fault.SOURCE_STOP_CONT],
    *[Fault.COMMAND_KILL, Fault.SOURCE_KILL, Fault.DESTINATION_KILL],
)
"""Faults that are drawn twice as often as others."""

_POLICIES = ("adaptive", "adaptive", "send-all", "defer-hot", "skip-unchanged")
_RATES = (500, 2000, 2000, 5000, 20000)


@dataclass(frozen=True)
class Plan:
    """One disturbed migration.

    :ivar two_hosts: between two network namespaces, by ``receive`` and ``send``
    :ivar secured: with keys; between hosts only
    :ivar memory_bytes: guest RAM
    :ivar options: of the command
    :ivar paused: whether the guest is paused before it is migrated
    :ivar lasting_s: how long a fault lasts that ends again
    :ivar step_s: between two commands of one fault
    """

    seed: int
    two_hosts: bool
    secured: bool
    fault: Fault
    moment: Moment
    memory_bytes: int
    workload: Workload
    options: tuple[str, ...]
    verify: bool
    memory_only: bool
    paused: bool
    lasting_s: float
    step_s: float
    reconnect_s: float
    silence_s: float

    def __str__(self) -> str:
        words = ["hosts" if self.two_hosts else "local", self.fault.value, "@", str(self.moment)]
        words += ["rehearsal"] * self.memory_only + ["paused"] * self.paused
        return " ".join(words)


def _impossible() -> frozenset[Fault]:
    """Faults that need to be root: a file system is only filled up that was mounted for it."""
    return frozenset() if os.geteuid() == 0 else frozenset({Fault.DESTINATION_FULL})


def draw(seed: int, *, hosts_share: float = 0.3, only: frozenset[Fault] = frozenset()) -> Plan:
    """Make the plan of a seed.

    :param hosts_share: the part of all migrations that is between two hosts: 0.0 to 1.0
    :param only: choose among these faults, if there are any
    :raise ValueError: none of these faults is possible there
    """
    rng = Random(seed)
    two_hosts = rng.random() < hosts_share
    memory_only = rng.random() < 0.08
    verify = memory_only or rng.random() < 0.8
    paused = not memory_only and rng.random() < 0.08 and (not only or bool(only & PLAIN))
    possible = [
        fault
        for fault in (*Fault, *_TWICE)
        if fault not in _impossible()
        and (two_hosts or fault not in TWO_HOSTS_ONLY)
        and (not paused or fault in PLAIN)
        and (not only or fault in only)
    ]
    if not possible:
        raise ValueError(f"seed {seed}: none of these faults is possible")
    fault = rng.choice(possible)
    moment = moments.draw(rng, memory_only=memory_only, verified=verify)
    options = ["--on-limit", "force", "--policy", rng.choice(_POLICIES)]
    options += ["--tracker", "uffd-sync"] * (rng.random() < 0.15)
    options += ["--throttle", "auto"] * (rng.random() < 0.1)
    options += ["--verify"] * (verify and not memory_only)
    options += ["--memory-only"] * memory_only
    reconnect_s, silence_s = rng.choice((0.0, 1.0, 3.0)), rng.choice((1.0, 2.0, 10.0))
    if two_hosts:
        options += ["--reconnect-seconds", str(reconnect_s), "--silence-seconds", str(silence_s)]
        options += ["--compress", rng.choice(("none", "none", "auto", "zstd"))]
        options += ["--streams", str(rng.choice((1, 2, 3)))]
    return Plan(
        seed=seed,
        two_hosts=two_hosts,
        secured=rng.random() < 0.5,
        fault=fault,
        moment=moment,
        memory_bytes=rng.choice((64, 64, 128)) * MIB,
        workload=Workload(
            working_set_bytes=rng.choice((8, 16)) * MIB, pages_per_s=rng.choice(_RATES)
        ),
        options=tuple(options),
        verify=verify,
        memory_only=memory_only,
        paused=paused,
        lasting_s=rng.choice((rng.uniform(0.05, 0.5), rng.uniform(0.5, 3.0))),
        step_s=rng.uniform(0.001, 0.006),
        reconnect_s=reconnect_s,
        silence_s=silence_s,
    )
