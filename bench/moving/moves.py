"""Whole migrations of a guest that runs, by us or by QEMU itself, and what it noticed of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.guests.pulse import BeatsBroken
from bench.hosts.twohosts import TwoHosts
from bench.moving import by_qemu, by_us
from bench.moving.journey import Journey
from bench.moving.ways import Terms, Way


@dataclass(frozen=True)
class Spans:
    """For how long the guest is looked at.

    :ivar before_s: until it is moved
    :ivar after_s: once it was
    """

    before_s: float = 2.0
    after_s: float = 1.0


class Mover:
    """Moves guests.

    :param keys: directories with keys, of the first host and of the second; needed for TLS only
    :param run: a directory, for sockets
    """

    def __init__(
        self, hosts: TwoHosts, run: Path, spans: Spans, keys: Mapping[str, str] | None = None
    ) -> None:
        self._hosts, self._run, self._spans = hosts, run, spans
        self._keys = keys or {}
        self._qemu_keys = {
            address: by_qemu.keys_for_qemu(Path(key)) for address, key in self._keys.items()
        }

    async def sample(self, journey: Journey, way: Way, terms: Terms) -> dict[str, Any]:
        """Move a guest once, to the other host unless the terms say otherwise; look what it became.

        :return: what was measured; ``lost`` says what is not as it was, and is empty if all is
        :raise GivenUp: it did not converge; the guest is where it was
        :raise GuestBroken: it did not arrive
        """
        here, pulse = journey.here, journey.pulse
        host = here.host
        if not terms.local:
            host = self._hosts.b if here.host is self._hosts.a else self._hosts.a
        async with journey.destination(host) as there:
            await asyncio.sleep(self._spans.before_s)
            before = time.monotonic()
            sent = here.host.sent_bytes()
            if way.ours:
                moved = await by_us.move(here, there, way, terms, self._keys, self._run)
            else:
                moved = await by_qemu.move(here, there, way, terms, self._qemu_keys)
            sent = here.host.sent_bytes() - sent
            await journey.arrived(there)
        await asyncio.sleep(self._spans.after_s)
        after = time.monotonic()
        lost = await _lost(journey)
        return {
            "total_s": moved.total_s,
            "downtime_ms": moved.downtime_ms,
            "rounds": moved.rounds,
            "ram_bytes": moved.ram_bytes,
            "wire_bytes": sent,
            "throttle_percent": moved.throttle_percent,
            "forced": terms.forces and moved.total_s > terms.limit_s,
            "felt_ms": pulse.longest_gap_s(moved.began, after) * 1000,
            "usual_gap_ms": pulse.longest_gap_s(before - self._spans.before_s, before) * 1000,
            "work_per_s_before": pulse.work_per_s(before - self._spans.before_s, before),
            "work_per_s_during": pulse.work_per_s(moved.began, moved.ended),
            "lost": lost,
        }


async def _lost(journey: Journey) -> str:
    """What is not as an uninterrupted guest would have left it; empty if all is."""
    await journey.beats(2)
    async with journey.here.qmp() as qmp:
        await qmp.execute("stop")
        try:
            problem = await asyncio.to_thread(_problem, journey)
        finally:
            await qmp.execute("cont")
    return problem


def _problem(journey: Journey) -> str:
    try:
        journey.pulse.check_beats()
    except BeatsBroken as error:
        return str(error)
    ram = np.memmap(journey.here.side.ram, np.uint8, "r")
    return journey.guest.problem(ram, b"".join(journey.pulse.heard))
