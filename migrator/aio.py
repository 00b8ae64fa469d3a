"""Awaiting what must not be left half done, however often one is cancelled meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def settle(work: Coroutine[Any, Any, _T], *, too_late: bool = False) -> _T:
    """Run ``work`` to its end; a cancellation that came meanwhile is raised after it.

    :param too_late: nothing can be cancelled any more: a cancellation is dropped
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


async def within(timeout_s: float | None, work: Awaitable[_T]) -> _T:
    """Await ``work``, which is cancelled when the time is over; ``None``: it never is.

    Unlike ``asyncio.wait_for``, which before Python 3.12 returns the result that arrives together
    with a cancellation, and forgets the cancellation.

    :raise asyncio.TimeoutError: the time is over
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=timeout_s)
    except asyncio.CancelledError:
        task.cancel()
        await settle(ended(task), too_late=True)
        if not task.cancelled():
            task.exception()
        raise
    if not task.done():
        task.cancel()
        await settle(ended(task))
        if task.cancelled():
            raise asyncio.TimeoutError
    return task.result()


async def in_thread(function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call ``function`` in a thread; unlike ``asyncio.to_thread``, return only when it has."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        # that we are cancelled comes before what became of the work
        await settle(ended(task), too_late=True)
        if not task.cancelled():
            task.exception()
        raise


@contextmanager
def on_signals(action: Callable[[], object]) -> Iterator[None]:
    """Have each SIGINT, SIGTERM and SIGHUP call ``action`` in the event loop; then undo that.

    A SIGHUP that is ignored, as under ``nohup``, stays ignored. The handlers of before take over at
    the end without a gap. ``loop.remove_signal_handler`` would leave one, in which a signal ends
    the process, whatever was decided by then.
    """
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)

    def heed() -> None:
        with contextlib.suppress(BlockingIOError):
            for number in reader.recv(64):
                if number in before:
                    action()

    with reader, writer:
        loop.add_reader(reader, heed)
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in before:
            signal.signal(number, lambda *_: None)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            loop.remove_reader(reader)


@contextmanager
def cancelled_by_signals(task: asyncio.Future[Any]) -> Iterator[None]:
    """Have signals cancel ``task``, as often as they come; see :func:`on_signals`."""
    with on_signals(task.cancel):
        yield


async def interruptible(work: Coroutine[Any, Any, _T]) -> _T:
    """Await ``work``; signals cancel it, as often as they come; see :func:`on_signals`."""
    task = asyncio.ensure_future(work)
    with cancelled_by_signals(task):
        return await task


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """As :func:`asyncio.run`, but signals cancel ``work``, wherever it is, and it cleans up.

    A second one, while it cleans up, would otherwise break that off: ``timeout`` sends two.

    :raise KeyboardInterrupt: it was interrupted, and has ended
    """
    try:
        return asyncio.run(interruptible(work))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def ended(task: asyncio.Future[Any]) -> None:
    """Wait until ``task`` has ended, however it does."""
    await asyncio.wait([task])
