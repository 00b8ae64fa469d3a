"""A guest that is moved again and again, and booted anew where something of it was lost."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.guests.guests import Guest
from bench.hosts.twohosts import TwoHosts
from bench.moving.journey import Journey
from bench.moving.moves import Mover
from bench.moving.ways import GivenUp, GuestBroken, Terms, Way
from migrator.aio import settle
from migrator.errors import VmError


class Traveller:
    """The guest; it is booted when it is needed.

    :param directory: for its files; it may be that of other guests too
    """

    def __init__(self, guest: Guest, hosts: TwoHosts, directory: Path) -> None:
        self._guest, self._hosts, self._directory = guest, hosts, directory
        self._journey: Journey | None = None
        self._life = AsyncExitStack()
        self._lives = 0

    async def move(self, mover: Mover, way: Way, terms: Terms) -> dict[str, Any]:
        """Move it; what came of it, as in :func:`bench.versus.run.measure`, but for the run.

        :raise GuestBroken, VmError: it does not boot
        """
        journey = self._journey or await self._boot()
        try:
            sample = await mover.sample(journey, way, terms)
        except GivenUp as error:
            return {"problem": str(error), "gave_up": True, "lost": ""}
        except (GuestBroken, VmError) as error:
            await self.end()
            return {"problem": str(error), "gave_up": False, "lost": ""}
        speeds = sample["work_per_s_before"], sample["work_per_s_during"]
        if sample["lost"]:  # the page with its counter too, perhaps
            speeds = math.nan, math.nan
            await self.end()
        return {
            "problem": "",
            "gave_up": False,
            **{key: None if _is_nan(value) else value for key, value in sample.items()},
            "bytes": sample["ram_bytes" if terms.local else "wire_bytes"],
            "progress": speeds[1] / speeds[0]
            if speeds[0] and not any(map(_is_nan, speeds))
            else None,
        }

    async def _boot(self) -> Journey:
        directory = self._directory / str(self._lives)
        self._lives += 1
        self._life.enter_context(_made(directory))
        journey = Journey(self._guest, directory)
        await self._life.enter_async_context(journey.begun(self._hosts.a))
        self._journey = journey
        return journey

    async def end(self) -> None:
        """End it, if it runs."""
        self._journey = None
        life, self._life = self._life, AsyncExitStack()
        await settle(life.aclose())


@contextmanager
def _made(directory: Path) -> Iterator[None]:
    directory.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(directory)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
