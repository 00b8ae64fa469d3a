"""System calls injected into real processes, which check for themselves that nothing is amiss."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import children
from tests.conftest import require
from tests.tracker.targets import (
    Target,
    attach,
    compile_target,
    descriptors,
    injectors,
    read_line,
    run_tracer,
    start_tracer,
    status,
    wait_until,
)
from tracker import child
from tracker.errors import InjectionError, TargetGone
from tracker.inject import acquire as inject
from tracker.inject.acquire import acquire_userfaultfd
from tracker.inject.injector import copy_userfaultfd
from tracker.syscalls import uffd_api

pytestmark = pytest.mark.live

Start = Callable[[str], Target]


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require(None if shutil.which("gcc") else "no gcc")
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        try:
            os.close(acquire_userfaultfd(sleeper.pid).fd)
            missing = None
        except InjectionError as error:
            missing = error.reason if "permitted" in error.reason else None
        finally:
            sleeper.kill()
    require(missing)
    return compile_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def start(binary: Path) -> Iterator[Start]:
    """Start a target in a mode."""
    running = []

    def start_one(mode: str) -> Target:
        running.append(Target(binary, mode))
        return running[-1]

    yield start_one
    for target in running:
        target.__exit__()


class TestInterruptedCall:
    @pytest.mark.parametrize("mode", ["read", "futex"])
    def test_goes_on(self, start: Start, mode: str) -> None:
        target = start(mode)
        for _ in range(10):
            attach(target.pid)
        target.assert_untouched()
        # who is woken has to be asleep: on a busy machine it takes a while to get back there
        wait_until(lambda: status(target.pid, "State").startswith("S"))
        target.finish()

    @pytest.mark.parametrize(
        "mode", ["nanosleep", "clock_nanosleep", "poll", "ppoll", "futex_timeout"]
    )
    def test_sleeps_no_longer(self, start: Start, mode: str) -> None:
        """If a 3 s sleep began anew, it would end 3 s after the last attach."""
        target = start(mode)
        last = 0.0
        while last < 2.0:
            attach(target.pid)
            last = time.monotonic() - target.began
            time.sleep(0.2)
        slept_s = float(target.finish())
        assert 3.0 <= slept_s < 3.0 + last * 0.8

    def test_keeps_the_mask_of_ppoll(self, start: Start) -> None:
        target = start("ppoll_mask")
        for _ in range(5):
            attach(target.pid)
        os.kill(target.pid, signal.SIGUSR1)
        target.finish()

    def test_would_fail_if_put_back_at_the_end_of_our_call(self, start: Start) -> None:
        """The place where registers are put back is what restarts the interrupted call."""
        target = start("read")
        program = (
            "def leave(self, *exception):\n"
            "    self._set_registers(self._saved)\n"
            "    self._set_mask(self._mask)\n"
            "    self._ptrace(ptrace.Request.CONT)\n"
            "Tracee.__exit__ = leave\n"
            "injector.copy_userfaultfd(pid, deadline)\n"
        )
        assert run_tracer(target.pid, program).returncode == 0
        _, complaint = target.process.communicate(b"x", 20)
        assert target.process.returncode == 1
        assert b"(errno 512)" in complaint  # ERESTARTSYS, which no program should ever see


class TestRunningThread:
    def test_computes_the_same(self, start: Start) -> None:
        target = start("compute")
        for _ in range(50):
            attach(target.pid)
        target.assert_untouched()
        target.finish()

    def test_loses_no_signal(self, start: Start) -> None:
        target = start("signals")
        for _ in range(30):
            attach(target.pid)
        target.assert_untouched()
        target.finish()

    def test_restartable_sequence_is_aborted(self, start: Start) -> None:
        target = start("rseq")
        for _ in range(5):
            attach(target.pid)
        assert target.process.stdin is not None
        target.process.stdin.write(b"x")
        target.process.stdin.flush()
        with contextlib.suppress(TargetGone):  # being preempted aborts it too
            attach(target.pid)
        target.finish(b"")

    def test_restartable_sequence_would_be_forgotten(self, start: Start) -> None:
        """Then it never ends. (One that was preempted just before has been aborted for that.)"""
        program = (
            "tracee.resume_address = lambda ip, section: ip\n"
            "injector.copy_userfaultfd(pid, deadline)\n"
        )

        def ends() -> bool:
            target = start("rseq")
            assert run_tracer(target.pid, program).returncode == 0
            try:
                target.process.communicate(b"x", 2)
            except subprocess.TimeoutExpired:
                return False
            return True

        assert not all(ends() for _ in range(20))


class TestNothingIsLeft:
    @pytest.mark.thorough
    def test_after_200_times(self, start: Start) -> None:
        target = start("read")
        ours, threads = descriptors(os.getpid()), threading.active_count()
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        before = children.read_text()
        for _ in range(200):
            attach(target.pid)
        assert descriptors(os.getpid()) == ours
        assert threading.active_count() == threads
        assert children.read_text() == before
        assert status(target.pid, "Threads") == "1"
        target.assert_untouched()
        target.finish()

    @pytest.mark.thorough
    @pytest.mark.parametrize("mode", ["read", "compute"])
    def test_when_the_caller_is_killed(self, start: Start, mode: str) -> None:
        target = start(mode)
        found_at_work = 0
        for _ in range(200):
            if found_at_work == 20:
                break
            caller = os.fork()
            if caller == 0:
                try:
                    acquire_userfaultfd(target.pid)
                    signal.pause()
                finally:
                    os._exit(1)
            appears_by = time.monotonic() + 1
            while not injectors(target.pid) and time.monotonic() < appears_by:
                pass  # it lives for some 20 ms
            time.sleep(random.uniform(0, 0.02))
            os.kill(caller, signal.SIGKILL)
            os.waitpid(caller, 0)
            found_at_work += bool(injectors(target.pid))
            wait_until(lambda: not injectors(target.pid))
        assert found_at_work == 20
        target.assert_untouched()
        target.finish()

    def test_what_a_killed_tracer_would_leave(self, start: Start) -> None:
        """Hence the injector: nobody who kills the caller kills it."""
        target = start("read")
        program = (
            "with Tracee(pid, deadline) as thread:\n"
            "    thread.call('userfaultfd', thread.machine.numbers.userfaultfd, 0)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        assert run_tracer(target.pid, program).returncode == -signal.SIGKILL
        try:
            target.process.communicate(b"x", 5)
        except subprocess.TimeoutExpired:
            return
        assert target.process.returncode != 0

    def test_when_the_target_is_killed(self, binary: Path) -> None:
        ended = 0
        for _ in range(50):
            with Target(binary, "compute") as target:
                delay = threading.Timer(random.uniform(0, 0.08), target.process.kill)
                delay.start()
                try:
                    attach(target.pid)
                except TargetGone:
                    ended += 1
                delay.join()
                assert target.process.wait(20) == -signal.SIGKILL
        assert ended > 0

    def test_only_one_descriptor_exists(self, start: Start) -> None:
        """What registers through it is undone when it is closed: nobody else has it."""
        target = start("read")
        acquired = acquire_userfaultfd(target.pid)
        assert uffd_api(acquired.fd, 0)
        target.assert_untouched()
        os.close(acquired.fd)
        target.finish()


class TestStoppedTarget:
    def test_stays_stopped(self, start: Start) -> None:
        target = start("read")
        os.kill(target.pid, signal.SIGSTOP)
        wait_until(lambda: status(target.pid, "State") == "T (stopped)")
        for _ in range(5):
            attach(target.pid)
            wait_until(lambda: status(target.pid, "State") == "T (stopped)")
        target.assert_untouched()
        os.kill(target.pid, signal.SIGCONT)
        target.finish()

    @pytest.mark.parametrize("mode", ["read", "compute"])
    def test_stopped_and_continued_meanwhile(self, start: Start, mode: str) -> None:
        target = start(mode)
        for _ in range(30):
            stop = threading.Timer(random.uniform(0, 0.06), os.kill, (target.pid, signal.SIGSTOP))
            stop.start()
            attach(target.pid)
            stop.join()
            wait_until(lambda: status(target.pid, "State") == "T (stopped)")
            os.kill(target.pid, signal.SIGCONT)
        target.assert_untouched()
        target.finish()

    def test_storm_of_stops(self, start: Start) -> None:
        target = start("compute")
        over = threading.Event()

        def storm() -> None:
            while not over.is_set():
                os.kill(target.pid, signal.SIGSTOP)
                os.kill(target.pid, signal.SIGCONT)

        stormer = threading.Thread(target=storm)
        stormer.start()
        try:
            for _ in range(30):
                attach(target.pid)
        finally:
            over.set()
            stormer.join()
        target.assert_untouched()
        target.finish()


class TestRefusal:
    def test_no_such_process(self) -> None:
        with pytest.raises(TargetGone, match="there is no such process") as caught:
            acquire_userfaultfd(2**22 + 1)
        assert caught.value.pid == 2**22 + 1

    def test_zombie(self) -> None:
        with subprocess.Popen(["true"]) as ended:
            wait_until(lambda: status(ended.pid, "State")[0] == "Z")
            with pytest.raises(TargetGone, match="its main thread has ended"):
                acquire_userfaultfd(ended.pid)

    def test_already_traced(self, start: Start) -> None:
        target = start("read")
        program = (
            "from tracker.syscalls import ptrace_request\n"
            "ptrace_request(ptrace.Request.SEIZE, pid)\n"
            "print('seized', flush=True)\n"
            "input()\n"
        )
        tracer = start_tracer(target.pid, program)
        try:
            assert read_line(tracer) == "seized\n"
            with pytest.raises(InjectionError, match=rf"already traced by process {tracer.pid} "):
                acquire_userfaultfd(target.pid)
        finally:
            tracer.communicate("\n")
        attach(target.pid)
        target.finish()

    def test_another_user(self, start: Start) -> None:
        require(None if os.geteuid() == 0 else "only root can become another user")
        target = start("read")
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                copy_userfaultfd(target.pid, time.monotonic() + 5)
            except InjectionError as error:
                os.write(writer, str(error).encode())
            finally:
                os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        with open(reader) as pipe:
            said = pipe.read()
        assert "its uid is 0/0/0 and ours is 65534" in said
        assert "we do not have CAP_SYS_PTRACE" in said
        target.assert_untouched()
        target.finish()

    def test_kernel_thread(self) -> None:
        require(None if status(2, "Name") == "kthreadd" else "process 2 is not kthreadd")
        with pytest.raises(InjectionError, match="it is a kernel thread"):
            acquire_userfaultfd(2)

    def test_32_bit(self, tmp_path: Path) -> None:
        source = tmp_path / "compat.c"
        source.write_text(
            "static int call(int nr, int a, char *b, int c) {\n"
            '    int r; __asm__ volatile("int $0x80" : "=a"(r) : "a"(nr), "b"(a), "c"(b), "d"(c)'
            ' : "memory"); return r; }\n'
            "void _start(void) {\n"
            '    char byte = 0; call(4, 1, "ready\\n", 6);\n'
            "    int n = call(3, 0, &byte, 1);\n"
            "    call(1, n != 1 || byte != 'x', 0, 0); }\n"
        )
        compat = tmp_path / "compat"
        command = ["gcc", "-m32", "-static", "-nostdlib", "-fno-stack-protector", "-o"]
        made = subprocess.run([*command, compat, source], capture_output=True, check=False)
        require(f"gcc -m32: {made.stderr.decode()}" if made.returncode else None)
        try:
            target = Target(compat, "")
        except OSError as error:
            require(f"no 32-bit programs: {error}")
        with target:
            with pytest.raises(InjectionError, match="it is a 32-bit process"):
                acquire_userfaultfd(target.pid)
            target.assert_untouched()
            target.finish()

    def test_uninterruptible_sleep(self, start: Start) -> None:
        target = start("vfork")
        wait_until(lambda: status(target.pid, "State")[0] == "D")
        with pytest.raises(InjectionError, match="does not stop: state D"):
            acquire_userfaultfd(target.pid, timeout_s=0.3)
        target.assert_untouched()
        target.finish()

    def test_the_event_loop_runs_meanwhile(self, start: Start) -> None:
        target = start("vfork")
        wait_until(lambda: status(target.pid, "State")[0] == "D")

        async def turns_while_attaching() -> int:
            attaching = asyncio.create_task(asyncio.to_thread(attach, target.pid, 0.5))
            turns = 0
            while not attaching.done():
                await asyncio.sleep(0.01)
                turns += 1
            with pytest.raises(InjectionError):
                await attaching
            return turns

        assert asyncio.run(turns_while_attaching()) >= 10
        target.finish()


class TestSeccomp:
    def test_filter_that_kills_is_suspended(self, start: Start) -> None:
        require(None if os.geteuid() == 0 else "only CAP_SYS_ADMIN may suspend filters")
        target = start("seccomp")
        attach(target.pid)
        target.assert_untouched()
        assert status(target.pid, "Seccomp") == "2"
        target.finish()

    def test_filter_would_kill(self, start: Start) -> None:
        target = start("seccomp")
        program = (
            "ptrace.PTRACE_O_SUSPEND_SECCOMP = 0\n"
            "try:\n"
            "    injector.copy_userfaultfd(pid, deadline)\n"
            "except injector.TargetGone:\n"
            "    print('gone')\n"
        )
        assert run_tracer(target.pid, program).stdout == "gone\n"
        assert target.process.wait(20) == -signal.SIGSYS


class TestInjectorProcess:
    def test_that_crashes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        children.replace(
            monkeypatch, "tracker.inject.injector", "raise RuntimeError('out of luck')"
        )
        with pytest.raises(InjectionError, match=r"(?s)ended with 1: .*out of luck"):
            acquire_userfaultfd(os.getpid())

    def test_that_does_not_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        children.replace(
            monkeypatch,
            "tracker.inject.injector",
            "import time; time.sleep(60)  # {arguments} of tracker.inject.injector",
        )
        monkeypatch.setattr(inject, "_GRACE_S", 0.2)
        with pytest.raises(InjectionError, match="is not done with the injection"):
            acquire_userfaultfd(os.getpid(), timeout_s=0.1)
        (stray,) = injectors(os.getpid())
        os.kill(stray, signal.SIGKILL)
        wait_until(lambda: not injectors(os.getpid()))

    def test_ignores_what_ends_a_process(self, start: Start) -> None:
        """Signals sent to it while it waits for the thread to stop; and its session is its own."""
        target = start("vfork")
        wait_until(lambda: status(target.pid, "State")[0] == "D")
        outcome: list[str] = []

        def try_it() -> None:
            try:
                acquire_userfaultfd(target.pid, timeout_s=1.0)
            except InjectionError as error:
                outcome.append(error.reason)

        trying = threading.Thread(target=try_it)
        trying.start()
        wait_until(lambda: status(target.pid, "TracerPid") != "0")
        (injector,) = injectors(target.pid)
        assert os.getsid(injector) == injector
        for signo in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            os.kill(injector, signo)
        trying.join()
        assert outcome
        assert "does not stop" in outcome[0]
        target.finish()

    def test_needs_no_site_packages(self) -> None:
        """It must start quickly: nothing but the standard library and this package's own."""
        program = (
            "import sys\nsys.path.append(sys.argv[1])\nimport tracker.inject.injector\n"
            "print(*(m for m in ('numpy', 'numba', 'asyncio', 'subprocess') if m in sys.modules))"
        )
        command = [sys.executable, "-I", "-S", "-c", program, child._ROOT]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == "\n"

    def test_hears_of_stops_where_sigchld_was_ignored(self, start: Start) -> None:
        target = start("read")
        before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            attach(target.pid)
        finally:
            signal.signal(signal.SIGCHLD, before)
        target.finish()


def test_answer_to_a_caller_that_is_gone_is_dropped(start: Start) -> None:
    """The descriptor dies with the injector; the target is as before."""
    target = start("read")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    program = f"import sys\nfrom tracker.inject.injector import main\nmain({target.pid}, 5.0)\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdin=theirs.fileno(),
        capture_output=True,
        check=False,
        cwd=child._ROOT,
    )
    theirs.close()
    assert (done.returncode, done.stderr) == (0, b"")
    target.assert_untouched()
    target.finish()
