"""Where writers are slowed, a processor that only reads keeps its speed."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from itertools import pairwise

import pytest

from migrator import Limits, Options, Progress
from migrator.guest.workload import Workload
from migrator.policy.throttling import AUTO
from migrator.qemu.qmp import Qmp
from tests.live.sending import Road, monitor, on_a_road
from tests.live.twocpus_guest import TwoProcessors, progress
from tests.live.vms import MIB

pytestmark = pytest.mark.live


@dataclass
class Sample:
    """What the guest had done by then.

    :ivar note: what the migration said
    """

    at_s: float
    written: int
    read: int
    note: str


class Speedometer:
    """Looks at a guest of two processors now and then."""

    def __init__(self, vm: Qmp) -> None:
        self.note = ""
        self.samples: list[Sample] = []
        self._vm = vm

    async def look_for_ever(self) -> None:
        while True:
            written, read = await progress(self._vm)
            self.samples.append(Sample(time.monotonic(), written, read, self.note))
            await asyncio.sleep(0.05)

    def per_s(self, note: str) -> tuple[float, float]:
        """Pages written and read a second, between looks at which the migration said that."""
        written = read = spent_s = 0.0
        for one, other in pairwise(self.samples):
            if one.note == other.note == note:
                written += (other.written - one.written) % 2**32
                read += (other.read - one.read) % 2**32
                spent_s += other.at_s - one.at_s
        assert spent_s > 0, [sample.note for sample in self.samples]
        return written / spent_s, read / spent_s


@pytest.mark.alone
def test_a_processor_that_only_reads_keeps_its_speed() -> None:
    async def body(road: Road) -> None:
        await road.next_receiver()
        looking = await Qmp.connect("source", monitor(road.vm))
        speed = Speedometer(looking)

        def watch(progress: Progress) -> None:
            speed.note = f"{progress.phase} {progress.note}"

        task = asyncio.create_task(speed.look_for_ever())
        try:
            limits = Limits(downtime_ms=80.0, max_rounds=30, on_limit="force")
            options = Options(limits, throttle_percent=AUTO, tracker="uffd", verify=True)
            report = await road.send(watch, options, bandwidth_bytes_per_s=8 * MIB)
        finally:
            task.cancel()
            await asyncio.wait([task])
            await looking.close()
        assert report.mismatched_pages == 0
        assert report.throttle_percent > 75  # a step, or more, above the first
        wrote, read = speed.per_s("rounds ")
        slowed = f"rounds writers slowed to {100 - report.throttle_percent} %"
        wrote_slowly, read_meanwhile = speed.per_s(slowed)
        assert wrote_slowly < wrote / 3
        assert read_meanwhile > read / 2
        assert await road.one_runs() == "destination"

    working_set = Workload(working_set_bytes=16 * MIB)
    on_a_road(body, TwoProcessors(memory=64 * MIB, workload=working_set))
