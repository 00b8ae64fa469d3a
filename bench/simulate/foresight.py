"""Whether simulations come true: guests are recorded, predicted, and then really moved.

Source and destination are on one host, and the pages go through its loopback device at a limited
rate, so that what the link carries is known. What else a prediction needs, what a switchover and a
round take beside sending, is measured beforehand, by moving other guests of the same size; nothing
of the migration that is predicted goes into its prediction.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from bench.guests.guests import Guest
from bench.simulate.costs import Costs, copy_rate, parse
from bench.simulate.replay import Replay
from bench.simulate.run import migrate
from migrator.choices import PolicyName
from migrator.guest.workload import MIB, heartbeats
from migrator.policy.downtime import Fixed
from migrator.policy.judge import Limits
from migrator.policy.policies import policy_of
from migrator.qemu.process import Vm
from migrator.qemu.qmp import Qmp
from migrator.report.report import Report
from migrator.transport.packing import BURST_S
from migrator.watch.trace import read

MEMORY = 512 * MIB
MIB_PER_S = 100
LIMITS = Limits(downtime_ms=80.0, max_seconds=60.0)
POLICIES: tuple[PolicyName, ...] = ("send-all", "adaptive")
WORKLOADS = (
    Guest("sequential", MEMORY, working_set=64 * MIB, pages_per_s=10_000),
    Guest("random", MEMORY, working_set=64 * MIB, pages_per_s=12_000),
    Guest("zipf", MEMORY, working_set=64 * MIB, pages_per_s=15_000),
    Guest("read-mostly", MEMORY, working_set=64 * MIB, pages_per_s=15_000),
    Guest("same-bytes", MEMORY, working_set=64 * MIB, pages_per_s=10_000),
    Guest("growing", MEMORY, working_set=64 * MIB, pages_per_s=6_000),
)
CALIBRATING = Guest("sequential", MEMORY, working_set=48 * MIB, pages_per_s=8_000)
CLOSE = 0.2
"""What a prediction may be wrong by, of what it predicts."""

_PROGRAM = (sys.executable, "-c", "from migrator.cli.main import main; main()")
_RECORD_S = 3.0
_BEFORE_S = 1.0
_START_S = 60.0


class Broken(Exception):
    """A guest could not be recorded, or moved, or is not what it was."""


@dataclass(frozen=True)
class Seen:
    """What a migration was, or was predicted to be.

    :ivar converged: or else it was given up
    :ivar rounds: of sending what is dirty, while the guest ran
    :ivar downtime_ms: what it would have been, if it was given up
    :ivar dirty_bytes: of each round, the copy and those in the downtime too
    :ivar phases: milliseconds of each
    """

    rounds: int
    sent_bytes: int
    downtime_ms: float
    dirty_bytes: Sequence[int] = ()
    phases: Mapping[str, float] = field(default_factory=dict)
    converged: bool = True

    @classmethod
    def of(cls, report: Report) -> Seen:
        """What a report says."""
        downtime_ms = report.downtime_ms
        if downtime_ms is None:
            downtime_ms = report.predicted_downtime_ms or 0.0
        return cls(
            sum(1 for r in report.rounds if r.decision),
            report.bytes_sent,
            downtime_ms,
            [r.dirty_bytes for r in report.rounds],
            report.phases,
            report.status == "completed",
        )


@dataclass(frozen=True)
class Foreseen:
    """A guest that was moved several times, and predicted each time from a recording of it."""

    workload: str
    policy: str
    predicted: Sequence[Seen]
    actual: Sequence[Seen]

    def ratio(self, what: str) -> float:
        """Predicted by actual, of the medians."""
        predicted, actual = (
            median(getattr(seen, what) for seen in all_) for all_ in (self.predicted, self.actual)
        )
        return float(predicted / actual) if actual else float("inf")

    def came_true(self, what: str) -> bool:
        """Whether the prediction was close enough; it never is of another end."""
        return self.same_end and abs(self.ratio(what) - 1) <= CLOSE

    @property
    def same_end(self) -> bool:
        """Whether as many converged as were to."""
        predicted, actual = ([s.converged for s in all_] for all_ in (self.predicted, self.actual))
        return sum(predicted) == sum(actual)


def foresee(
    workloads: Sequence[Guest],
    policies: Sequence[PolicyName],
    runs: int,
    step: Callable[[str], None],
) -> Iterator[Foreseen]:
    """Record, predict and move each of them.

    :param step: told of each guest that is begun; one for the calibration, and so many runs of
        each workload with each policy
    :raise Broken: a guest is not what it was, or a command failed
    """
    step("calibrating")
    reports = [asyncio.run(_moved(CALIBRATING, "send-all", None)) for _ in range(max(runs, 2))]
    costs = Costs.of(*reports, burst_s=BURST_S)
    bytes_per_s = min(median(copy_rate(report) for report in reports), float(MIB_PER_S * MIB))
    for guest in workloads:
        for policy in policies:
            predicted, actual = [], []
            for _ in range(runs):
                step(f"{guest.workload}, {policy}")
                deciding = policy_of(policy, LIMITS, Fixed())
                with tempfile.TemporaryDirectory() as directory:
                    trace = Path(directory) / "guest.trace"
                    report = asyncio.run(_moved(guest, policy, trace))
                    outcome = migrate(Replay(read(trace)), deciding, bytes_per_s, costs)
                predicted.append(Seen.of(outcome.report))
                actual.append(Seen.of(report))
            yield Foreseen(guest.workload, policy, predicted, actual)


# -- one guest ------------------------------------------------------------------------------------


async def _moved(guest: Guest, policy: PolicyName, trace: Path | None) -> Report:
    """Boot a guest, record it, move it, check it, end it.

    :param trace: where to record it; ``None``: it is not
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="foresight-") as name:
        directory = Path(name)
        async with _pair(guest, directory) as (source, destination):
            await asyncio.sleep(_BEFORE_S)
            if trace is not None:
                recording = ["record", "--source", source.qmp, "-o", str(trace)]
                await _done(directory, *recording, "--seconds", f"{_RECORD_S}")
            to = f"127.0.0.1:{_free_port()}"
            receive = ["receive", "--listen", to, "--destination", destination.qmp, "--insecure"]
            send = ["send", "--source", source.qmp, "--to", to, "--insecure", "--json"]
            send += ["--bandwidth", f"{MIB_PER_S}", "--policy", policy]
            send += ["--downtime-limit", f"{LIMITS.downtime_ms}"]
            with _command(directory, *receive) as receiving:
                await asyncio.to_thread(_said, receiving, "waiting for a VM")
                said = await _done(directory, *send, "--max-seconds", f"{LIMITS.max_seconds}")
                await asyncio.to_thread(receiving.communicate)
            report = parse(said)
            await _check(guest, source, destination, moved=report.status == "completed")
            return report


@asynccontextmanager
async def _pair(guest: Guest, directory: Path) -> AsyncIterator[tuple[Vm, Vm]]:
    guest.prepare(directory)
    async with AsyncExitStack() as stack:
        vms = []
        for name in ("destination", "source"):
            vm = Vm(name, directory)
            stack.push_async_callback(vm.stop)
            ram = directory / f"{name}.ram"
            command = guest.command(directory, ram, vm.console)
            await vm.start(command, incoming=name == "destination")
            vms.append(vm)
        destination, source = vms
        await _beats(source)
        yield source, destination


async def _beats(vm: Vm) -> None:
    deadline = time.monotonic() + _START_S
    while vm.console.read_bytes().count(b"\n") < 3:
        vm.check_alive()
        if time.monotonic() > deadline:
            raise Broken(f"the guest does not run at the {vm.name}")
        await asyncio.sleep(0.02)


async def _check(guest: Guest, source: Vm, destination: Vm, *, moved: bool) -> None:
    """Nothing may be lost: neither a heartbeat nor a page."""
    runs = destination if moved else source
    await _beats(runs)
    qmp = await Qmp.connect(runs.name, runs.qmp)
    try:
        await qmp.execute("stop")
    finally:
        await qmp.close()
    beats = heartbeats(source.console.read_bytes() + destination.console.read_bytes())
    if beats != list(range(len(beats))):
        raise Broken("heartbeats are missing")
    ram = np.memmap(runs.console.with_suffix(".ram"), np.uint8, "r")
    if problem := guest.problem(ram):
        raise Broken(problem)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def _command(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*_PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(directory)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def _done(directory: Path, *arguments: str) -> str:
    """Run a command to its end; what it printed."""
    with _command(directory, *arguments) as process:
        said, words = await asyncio.to_thread(process.communicate)
        told = json.loads(said) if said.startswith("{") else {"reason": words}
        if process.returncode and told.get("status") != "aborted":
            raise Broken(f"{arguments[0]}: {told['reason']}")
        return said


def _said(process: subprocess.Popen[str], words: str) -> None:
    said = ""
    assert process.stderr is not None
    for line in iter(process.stderr.readline, ""):
        said += line
        if words in line:
            return
    raise Broken(f"never said {words!r}: {said}")
