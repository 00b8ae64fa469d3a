"""QEMU processes of ours: how they are started, watched, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import stat
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator.errors import VmError
from migrator.qemu.process import RunDirectory, Vm, fill_in
from tests.conftest import require
from tests.processes import is_running
from tests.tracker.targets import wait_until

# -- command lines ------------------------------------------------------------------------------


def test_fill_in() -> None:
    values = {"run": "/r", "guest": "/g {run}"}
    arguments = ["qemu", "a{run}b{run}", "{guest}", "{other}", "{}", '{"driver":"x"}', "{RUN}"]
    assert fill_in(arguments, values) == [
        *["qemu", "a/rb/r", "/g {run}", "{other}", "{}", '{"driver":"x"}', "{RUN}"]
    ]
    assert fill_in([], values) == []


# -- directories --------------------------------------------------------------------------------


def test_run_directory() -> None:
    with RunDirectory() as directory:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        (directory / "a").mkdir()
        (directory / "a/b").touch()
        with RunDirectory() as other:
            assert other != directory
    assert not directory.exists()


def test_run_directory_after_an_error() -> None:
    with pytest.raises(ValueError, match="it"), RunDirectory() as directory:
        raise ValueError("it")
    assert not directory.exists()


def test_run_directory_that_is_gone_already() -> None:
    with RunDirectory() as directory:
        directory.rmdir()


# -- processes ----------------------------------------------------------------------------------


@pytest.fixture
def directory() -> Iterator[Path]:
    with RunDirectory() as directory:
        yield directory


@pytest.fixture
def vm(directory: Path) -> Vm:
    return Vm("source", directory)


def run(vm: Vm, body: Coroutine[Any, Any, None]) -> None:
    """Run a test; the process has to be gone afterwards."""

    async def whole() -> None:
        try:
            await body
        finally:
            await vm.stop()
            await vm.stop()

    asyncio.run(whole())
    with pytest.raises((ProcessLookupError, AssertionError)):
        os.kill(vm.pid, 0)


def script(directory: Path, text: str) -> str:
    """Something that is started in place of QEMU."""
    path = directory / "script"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_binary_that_is_not_there(vm: Vm) -> None:
    async def body() -> None:
        with pytest.raises(VmError, match="there is no 'qemu-system-none'; install QEMU") as caught:
            await vm.start(["qemu-system-none"], incoming=False)
        assert caught.value.vm == "source"

    run(vm, body())


def test_a_binary_that_is_none(vm: Vm, directory: Path) -> None:
    (directory / "text").touch()

    async def body() -> None:
        with pytest.raises(VmError, match="text': Permission denied"):
            await vm.start([str(directory / "text")], incoming=False)

    run(vm, body())


def test_a_process_that_ends_at_once(vm: Vm, directory: Path) -> None:
    said = "; ".join(f"echo line {n} >&2" for n in range(5))

    async def body() -> None:
        with pytest.raises(VmError, match="ended with 7: line 2 / line 3 / line 4"):
            await vm.start([script(directory, f"{said}; exit 7")], incoming=False)

    run(vm, body())


def test_a_process_that_ends_without_a_word(vm: Vm, directory: Path) -> None:
    async def body() -> None:
        with pytest.raises(VmError, match="ended with -15: no word"):
            await vm.start([script(directory, "kill $$")], incoming=False)

    run(vm, body())


def test_a_process_that_never_listens(vm: Vm, directory: Path) -> None:
    async def body() -> None:
        with pytest.raises(VmError, match=r"no QMP socket after 0\.1 s"):
            await vm.start([script(directory, "exec sleep 60")], incoming=False, timeout_s=0.1)

    run(vm, body())


@pytest.mark.parametrize("incoming", [False, True])
def test_arguments_and_session(vm: Vm, directory: Path, incoming: bool) -> None:
    text = f'for a; do echo "$a"; done > {directory}/said; touch {vm.qmp}; exec sleep 60'

    async def body() -> None:
        await vm.start([script(directory, text), "-m", "1 G"], incoming=incoming)
        vm.check_alive()
        said = (directory / "said").read_text().splitlines()
        wanted = ["-m", "1 G", "-qmp", f"unix:{vm.qmp},server=on,wait=off"]
        assert said == wanted + ["-incoming", "defer"] * incoming
        assert os.getsid(vm.pid) == vm.pid  # the terminal's Ctrl-C is not its own
        assert vm.console_text() == ""

    run(vm, body())


def test_cancelled_while_it_starts(vm: Vm, directory: Path) -> None:
    async def body() -> None:
        start = vm.start([script(directory, "exec sleep 60")], incoming=False)
        task = asyncio.ensure_future(start)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert vm.pid  # the process is known, so that it can be ended

    run(vm, body())


def test_stopping_what_ignores_signals(vm: Vm, directory: Path) -> None:
    text = f"trap '' TERM INT HUP; touch {vm.qmp}; while :; do sleep 1; done"

    async def body() -> None:
        await vm.start([script(directory, text)], incoming=False)

    run(vm, body())


def test_stopping_what_was_never_started(vm: Vm) -> None:
    asyncio.run(vm.stop())


def test_a_wrapper_takes_its_children_along(vm: Vm, directory: Path) -> None:
    """A script around QEMU that does not exec it."""
    text = f"sleep 60 & echo $! > {directory}/child; touch {vm.qmp}; wait"

    async def body() -> None:
        await vm.start([script(directory, text)], incoming=False)

    run(vm, body())
    child = int((directory / "child").read_text())
    try:
        wait_until(lambda: not is_running(child))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_check_alive(vm: Vm, directory: Path) -> None:
    async def body() -> None:
        vm.check_alive()  # not started
        await vm.start([script(directory, f"touch {vm.qmp}; exec sleep 60")], incoming=False)
        vm.check_alive()
        os.kill(vm.pid, signal.SIGTERM)

        async def watch() -> None:
            while True:
                vm.check_alive()
                await asyncio.sleep(0.01)

        with pytest.raises(VmError, match="ended with -15"):
            await asyncio.wait_for(watch(), 20)

    run(vm, body())


# -- consoles -----------------------------------------------------------------------------------


def test_waiting_for_the_console(vm: Vm) -> None:
    async def body() -> None:
        vm.console.write_text("booting\n")
        wait = asyncio.ensure_future(vm.wait_for_console(r"\blog\w+:", timeout_s=5))
        await asyncio.sleep(0.05)
        assert not wait.done()
        with vm.console.open("a") as console:
            console.write("login: ")
        await wait

    run(vm, body())


def test_a_console_that_stays_silent(vm: Vm) -> None:
    async def body() -> None:
        vm.console.touch()
        with pytest.raises(VmError, match=r"did not show 'login' in 0\.05 s; .* 'nothing'"):
            await vm.wait_for_console("login", timeout_s=0.05)
        vm.console.write_bytes(b"one\ntwo \xff\n")
        with pytest.raises(VmError, match="it ends with 'two \ufffd'"):
            await vm.wait_for_console("login", timeout_s=0.05)

    run(vm, body())


def test_a_console_with_something_broken(vm: Vm) -> None:
    """Also where what was waited for is there too."""

    async def body() -> None:
        vm.console.write_text("fine\n[ 1.0] Oops: 0002\nlogin:\n")
        with pytest.raises(VmError, match=r"its console says '\[ 1\.0\] Oops: 0002'"):
            await vm.wait_for_console("login", timeout_s=5, broken="Oops")
        await vm.wait_for_console("login", timeout_s=5, broken="panic")

    run(vm, body())


def test_a_console_of_a_process_that_ended(vm: Vm, directory: Path) -> None:
    async def body() -> None:
        text = f"touch {vm.qmp}; sleep 0.2; echo no disk >&2; exit 1"
        await vm.start([script(directory, text)], incoming=False)
        with pytest.raises(VmError, match="ended with 1: no disk"):
            await vm.wait_for_console("login", timeout_s=20)

    run(vm, body())


# -- a real QEMU --------------------------------------------------------------------------------

QEMU = "qemu-system-x86_64"


@pytest.mark.live
def test_qemu_says_what_is_wrong(vm: Vm) -> None:
    require(None if shutil.which(QEMU) else f"{QEMU} is not installed")

    async def body() -> None:
        with pytest.raises(VmError, match=r"ended with 1: .*unsupported machine type"):
            await vm.start([QEMU, "-machine", "no-such-machine"], incoming=False)

    run(vm, body())
