"""Awaiting what must not be left half done, however often one is cancelled meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def settle(work: Coroutine[Any, Any, _T], *, too_late: bool = False) -> _T:
    """Run ``work`` to its end; a cancellation that came meanwhile is raised after it.

    :param too_late: nothing can be cancelled any more: forget that somebody tried
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
        except BaseException:  # noqa: BLE001 (raised below, by the task's result)
            break
    if cancelled is not None and task.exception() is None and not too_late:
        raise cancelled
    return task.result()


async def in_thread(function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call ``function`` in a thread; unlike ``asyncio.to_thread``, never walk away from it."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        # that we are cancelled comes before what became of the work
        await settle(ended(task), too_late=True)
        if not task.cancelled():
            task.exception()
        raise


async def ended(task: asyncio.Future[Any]) -> None:
    """Wait until ``task`` has ended, however it does."""
    await asyncio.wait([task])
