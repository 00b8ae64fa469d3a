"""Whatever is settled ends, and nothing is forgotten."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from migrator.aio import cancelled_by_signals, in_thread, on_signals, settle, within


def test_the_result() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 42

    assert asyncio.run(settle(work())) == 42


def test_the_error() -> None:
    async def work() -> None:
        raise ValueError("it")

    with pytest.raises(ValueError, match="it"):
        asyncio.run(settle(work()))


class Work:
    """Something that takes several steps; it notes how far it came."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.done = False

    async def run(self) -> str:
        self.begun.set()
        await self.go_on.wait()
        await asyncio.sleep(0)
        self.done = True
        if self.error is not None:
            raise self.error
        return "result"


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("too_late", [False, True])
def test_cancelled_meanwhile(times: int, too_late: bool) -> None:
    async def body() -> None:
        work = Work()
        task = asyncio.ensure_future(settle(work.run(), too_late=too_late))
        await work.begun.wait()
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done()
            assert not work.done
        work.go_on.set()
        if too_late:
            assert await task == "result"
        else:
            with pytest.raises(asyncio.CancelledError):
                await task
        assert work.done

    asyncio.run(body())


def test_cancelled_before_it_began() -> None:
    async def body() -> None:
        work = Work()
        work.go_on.set()
        task = asyncio.ensure_future(settle(work.run()))
        await asyncio.sleep(0)  # it has been called; what it runs has not
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.done

    asyncio.run(body())


def test_an_error_is_told_rather_than_the_cancellation() -> None:
    async def body() -> None:
        work = Work(ValueError("it"))
        task = asyncio.ensure_future(settle(work.run()))
        await work.begun.wait()
        task.cancel()
        await asyncio.sleep(0)
        work.go_on.set()
        with pytest.raises(ValueError, match="it"):
            await task

    asyncio.run(body())


def test_work_that_is_cancelled_itself() -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    async def body() -> None:
        with pytest.raises(asyncio.CancelledError):
            await settle(work())
        with pytest.raises(asyncio.CancelledError):
            await settle(work(), too_late=True)

    asyncio.run(body())


def test_without_it_the_work_is_cut_short() -> None:
    """The other side of these tests."""

    async def body() -> None:
        work = Work()
        task = asyncio.ensure_future(work.run())
        await work.begun.wait()
        task.cancel()
        work.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not work.done

    asyncio.run(body())


def test_in_thread() -> None:
    def work(a: int, *, b: int) -> tuple[int, int]:
        assert threading.current_thread() is not threading.main_thread()
        return a, b

    assert asyncio.run(in_thread(work, 1, b=2)) == (1, 2)


@pytest.mark.parametrize("fails", [False, True])
def test_a_thread_is_never_abandoned(fails: bool) -> None:
    begun, done = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        time.sleep(0.1)
        done.set()
        if fails:
            raise ValueError("it")

    async def body() -> None:
        task = asyncio.ensure_future(in_thread(work))
        await asyncio.to_thread(begun.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done.is_set()

    asyncio.run(body())


# -- within -------------------------------------------------------------------------------------


def test_within_the_time() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 42

    assert asyncio.run(within(60, work())) == 42


def test_the_error_within_the_time() -> None:
    async def work() -> None:
        raise ValueError("it")

    with pytest.raises(ValueError, match="it"):
        asyncio.run(within(60, work()))


def test_when_the_time_is_over_the_work_is_cancelled_and_has_ended() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.01)
            ended.append(True)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(within(0.01, work()))
    assert ended == [True]


def test_what_is_cancelled_within_the_time_cancels_the_work() -> None:
    async def body() -> None:
        work: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(within(60, work))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.cancelled()

    asyncio.run(body())


async def _cancelled_together_with(
    result: int | Exception, wait: Callable[[float, Awaitable[int]], Awaitable[int]]
) -> Any:
    work: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def waits() -> int:
        return await wait(60, work)

    task = asyncio.ensure_future(waits())
    await asyncio.sleep(0)
    if isinstance(result, Exception):
        work.set_exception(result)
    else:
        work.set_result(result)
    task.cancel()
    await asyncio.wait([task])
    return "cancelled" if task.cancelled() else task.result()


@pytest.mark.parametrize("result", [42, ValueError("it")])
def test_a_cancellation_that_comes_with_the_result_is_not_forgotten(
    result: int | Exception,
) -> None:
    assert asyncio.run(_cancelled_together_with(result, within)) == "cancelled"


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="it was mended in Python 3.12")
def test_which_wait_for_does_forget() -> None:
    """The other side of the test above."""

    def wait(timeout_s: float, work: Awaitable[int]) -> Awaitable[int]:
        return asyncio.wait_for(work, timeout_s)

    assert asyncio.run(_cancelled_together_with(42, wait)) == 42


# -- signals --------------------------------------------------------------------------------------

_IN_AND_OUT = """
import asyncio, signal
from migrator.aio import cancelled_by_signals

signal.signal(signal.SIGTERM, lambda *_: None)

async def main():
    print("ready", flush=True)
    for _ in range(3000):
        with cancelled_by_signals(asyncio.get_running_loop().create_future()):
            await asyncio.sleep(0)

asyncio.run(main())
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # an interpreter that ends resets its handlers
"""


def test_no_signal_ends_the_process_between_two_handlers() -> None:
    command = [sys.executable, "-c", _IN_AND_OUT]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        sent = 0
        while child.poll() is None:
            child.send_signal(signal.SIGTERM)
            sent += 1
    assert child.returncode == 0, f"after {sent} signals"


def test_each_signal_calls_and_the_handlers_of_before_are_back() -> None:
    heeded: list[int] = []
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]

    async def body() -> None:
        called = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            called.clear()

            def act(number: int = number) -> None:
                heeded.append(number)
                called.set()

            with on_signals(act):
                signal.raise_signal(number)
                await asyncio.wait_for(called.wait(), 10)

    asyncio.run(body())
    assert heeded == [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == handlers
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_wakes_a_loop_that_waits() -> None:
    """Sent to another thread, too, which does not run Python's handlers."""

    async def body() -> float:
        task = asyncio.ensure_future(asyncio.sleep(60))
        started = time.monotonic()
        with cancelled_by_signals(task):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            with pytest.raises(asyncio.CancelledError):
                await task
        return time.monotonic() - started

    assert asyncio.run(body()) < 30


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:

        async def body() -> None:
            with on_signals(lambda: pytest.fail("it was heeded")):
                assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
                signal.raise_signal(signal.SIGHUP)
                await asyncio.sleep(0.05)

        asyncio.run(body())
    finally:
        signal.signal(signal.SIGHUP, before)
