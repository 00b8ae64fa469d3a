"""How long a guest may stand: one limit for all that happens between STOP and RESUME."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from migrator.aio import within
from migrator.errors import StoodTooLong

_T = TypeVar("_T")
_LEAST_S = 10.0
_TIMES_LIMIT = 10.0
_TIMES_EXPECTED = 3.0
_COMPARED_BYTES_PER_S = 100e6  # the slowest that is waited for, where RAM is compared
DECISION_S = 5.0
"""What is left for the destination's word once it was told to go, however late that was."""


def standstill_s(limit_ms: float, expected_ms: float, compared_bytes: int) -> float:
    """How long a guest may stand where the caller does not say: in seconds.

    :param limit_ms: the downtime limit
    :param expected_ms: the downtime that is expected: more than the limit, if the switchover is
        forced
    :param compared_bytes: RAM that is compared while the guest stands
    """
    allowed_ms = max(limit_ms * _TIMES_LIMIT, expected_ms * _TIMES_EXPECTED)
    return max(_LEAST_S, allowed_ms / 1000) + compared_bytes / _COMPARED_BYTES_PER_S


class Budget:
    """The time for which a guest may stand.

    :ivar limit_s: seconds
    :param clock: seconds of a clock that never goes back
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock = clock
        self._began: float | None = None

    def begin(self) -> None:
        """The guest was stopped; a second call changes nothing."""
        if self._began is None:
            self._began = self._clock()

    @property
    def left_s(self) -> float:
        """Seconds that are left; all of them before the guest was stopped."""
        if self._began is None:
            return self.limit_s
        return max(0.0, self._began + self.limit_s - self._clock())

    async def spend(self, work: Awaitable[_T]) -> _T:
        """Await work, which is cancelled when the time is over.

        :raise StoodTooLong: the time is over
        """
        try:
            return await within(self.left_s, work)
        except asyncio.TimeoutError as error:
            raise StoodTooLong(self.limit_s) from error
