"""Whatever is settled ends, and nothing is forgotten."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from migrator.settle import in_thread, settle


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
