"""Work that can be interrupted, and leaves nothing behind, however often that is tried."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from migrator.aio import cancelled_by_signals

_T = TypeVar("_T")


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """As :func:`asyncio.run`, but SIGINT and SIGTERM cancel it, wherever it is.

    A second one, while it cleans up, would otherwise break that off: ``timeout`` sends two.

    :raise KeyboardInterrupt: it was interrupted, and has ended
    """
    try:
        return asyncio.run(_cancelled_by_signals(work))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _cancelled_by_signals(work: Coroutine[Any, Any, _T]) -> _T:
    task = asyncio.ensure_future(work)
    with cancelled_by_signals(task):
        return await task
