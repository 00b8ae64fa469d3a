"""What two hosts and the link between them promise, shown with TCP connections and processes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from tests.conftest import require
from tests.live.cuts import Cut, cutting, random_cuts
from tests.live.twohosts import Host, TwoHosts, two_hosts
from tests.processes import is_running

pytestmark = pytest.mark.live

MB = 1 << 20
TIMEOUT_S = 60.0
SILENCE_S = 0.3  # how long nothing is to arrive
USER_TIMEOUT_S = 1.0
_GONE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)  # the last two: from a cut link


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as made:
        yield made


def connect(source: Host, address: str, port: int) -> socket.socket:
    with source.inside():
        return socket.create_connection((address, port), timeout=TIMEOUT_S)


@contextlib.contextmanager
def connection(hosts: TwoHosts, v6: bool = False) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection, made from ``a``: its end there, and its end on ``b``."""
    address = hosts.b.address6 if v6 else hosts.b.address
    with hosts.b.inside():
        listening = socket.create_server(
            (address, 0), family=socket.AF_INET6 if v6 else socket.AF_INET
        )
    with listening, connect(hosts.a, address, listening.getsockname()[1]) as near:
        far, _ = listening.accept()
        far.settimeout(TIMEOUT_S)
        with far:
            yield near, far


def arrives(message: bytes, sender: socket.socket, receiver: socket.socket) -> None:
    sender.sendall(message)
    assert receiver.recv(len(message), socket.MSG_WAITALL) == message


def stays_silent(receiver: socket.socket) -> None:
    receiver.settimeout(SILENCE_S)
    with pytest.raises(TimeoutError):
        receiver.recv(1)
    receiver.settimeout(TIMEOUT_S)


def transfer(near: socket.socket, far: socket.socket, size: int) -> float:
    """Send so many bytes, and check each of them; how many bits there were a second."""
    sent, received = Random(size).randbytes(MB), bytearray()
    count = size // MB

    def send() -> None:
        for _ in range(count):
            near.sendall(sent)
        near.shutdown(socket.SHUT_WR)

    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        sending = pool.submit(send)
        while data := far.recv(MB):
            received += data
        took_s = time.monotonic() - began
        sending.result()
    assert len(received) == count * MB
    assert received == sent * count
    return len(received) * 8 / took_s


def eventually_gone(*pids: int) -> bool:
    deadline = time.monotonic() + TIMEOUT_S
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(is_running, pids))


_NAMESPACES = ("net", "mnt", "pid", "user")


# --- being there ----------------------------------------------------------------------------------


def test_a_process_is_there_under_its_own_pid(hosts: TwoHosts) -> None:
    script = "import os; print(os.getpid(), *(os.readlink(f'/proc/self/ns/{n}') for n in NAMES))"
    script = script.replace("NAMES", str(_NAMESPACES))
    with hosts.a.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        pid, network, *rest = process.communicate()[0].split()
    assert int(pid) == process.pid
    assert network == f"net:[{os.stat(hosts.a.path).st_ino}]"
    assert rest == [os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES[1:]]


def here() -> str:
    return os.readlink("/proc/thread-self/ns/net")


def test_a_thread_goes_there_and_returns_whatever_happens(hosts: TwoHosts) -> None:
    ours = here()
    with hosts.a.inside():
        there = here()
        with hosts.b.inside():
            assert len({ours, there, here()}) == 3
        assert here() == there
        others: list[str] = []
        thread = threading.Thread(target=lambda: others.append(os.readlink("/proc/self/ns/net")))
        thread.start()
        thread.join()
    assert here() == ours
    with pytest.raises(ZeroDivisionError), hosts.a.inside():
        1 / 0  # noqa: B018
    assert here() == ours


def test_a_socket_stays_on_the_host_on_which_it_was_made(hosts: TwoHosts) -> None:
    with hosts.a.inside():
        there = socket.socket()
    with there, socket.socket() as here:
        there.bind((hosts.a.address, 0))
        with pytest.raises(OSError, match="assign requested address"):
            here.bind((hosts.a.address, 0))


@pytest.mark.parametrize("v6", [False, True])
def test_they_are_connected(hosts: TwoHosts, v6: bool) -> None:
    with connection(hosts, v6) as (near, far):
        assert near.getpeername()[0] == (hosts.b.address6 if v6 else hosts.b.address)
        assert far.getpeername()[0] == (hosts.a.address6 if v6 else hosts.a.address)
        arrives(b"there", near, far)
        arrives(b"back", far, near)


def test_two_pairs_do_not_meet(hosts: TwoHosts) -> None:
    with two_hosts() as others:
        with hosts.b.inside():
            listening = socket.create_server((hosts.b.address, 0))
        with listening:
            port = listening.getsockname()[1]
            connect(hosts.a, hosts.b.address, port).close()
            with pytest.raises(ConnectionRefusedError):
                connect(others.a, hosts.b.address, port)


# --- the link -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits_per_s", "size"), [(100_000_000, 8 * MB), (1_000_000_000, 64 * MB)])
@pytest.mark.alone
def test_the_link_is_as_fast_as_it_is_shaped(hosts: TwoHosts, bits_per_s: int, size: int) -> None:
    hosts.shape(bits_per_s)
    with connection(hosts) as ends:
        assert 0.5 < transfer(*ends, size) / bits_per_s < 1.05  # 0.95 where nothing else runs
    with connection(hosts) as (near, far):
        assert 0.5 < transfer(far, near, size) / bits_per_s < 1.05
    hosts.shape(None)
    with connection(hosts) as ends:
        assert transfer(*ends, size) / bits_per_s > 1.5


def test_the_bytes_that_left_are_counted(hosts: TwoHosts) -> None:
    before = hosts.a.sent_bytes(), hosts.b.sent_bytes()
    with connection(hosts) as ends:
        transfer(*ends, 8 * MB)
    assert 8 * MB < hosts.a.sent_bytes() - before[0] < 10 * MB
    assert hosts.b.sent_bytes() - before[1] < MB


@pytest.mark.parametrize("v6", [False, True])
def test_a_connection_goes_on_after_a_short_cut(hosts: TwoHosts, v6: bool) -> None:
    with connection(hosts, v6) as (near, far):
        arrives(b"before", near, far)
        hosts.cut()
        near.sendall(b"meanwhile")
        stays_silent(far)
        hosts.mend()
        assert far.recv(9, socket.MSG_WAITALL) == b"meanwhile"
        arrives(b"back", far, near)
    with connection(hosts, v6) as (near, far):
        arrives(b"a new one", near, far)


@pytest.mark.parametrize("silently", [False, True])
def test_what_is_sent_in_a_long_cut_fails(hosts: TwoHosts, silently: bool) -> None:
    with connection(hosts) as (near, far):
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(USER_TIMEOUT_S * 1000))
        hosts.drop(hosts.a, hosts.b) if silently else hosts.cut()
        for end in (near, far):
            with pytest.raises(OSError) as caught:  # noqa: PT011, PT012
                while True:
                    end.sendall(bytes(MB))
            assert caught.value.errno in _GONE
        hosts.mend()


def test_a_new_connection_in_a_cut_is_refused_at_once_on_one_side(hosts: TwoHosts) -> None:
    hosts.cut()
    with pytest.raises(OSError) as caught:  # noqa: PT011
        connect(hosts.a, hosts.b.address, 1)
    assert caught.value.errno == errno.ENETUNREACH
    hosts.mend()
    with pytest.raises(ConnectionRefusedError):
        connect(hosts.a, hosts.b.address, 1)


def test_one_direction_is_lost_and_the_other_is_not(hosts: TwoHosts) -> None:
    for loser in (hosts.a, hosts.b):
        with connection(hosts) as ends:
            lost, heard = ends if loser is hosts.a else ends[::-1]
            hosts.drop(loser)
            lost.sendall(b"into the void")
            arrives(b"this arrives", heard, lost)
            stays_silent(heard)
            hosts.mend()
            assert heard.recv(13, socket.MSG_WAITALL) == b"into the void"


def test_whoever_sends_is_not_told_of_what_is_dropped(hosts: TwoHosts) -> None:
    with hosts.b.inside():
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with hosts.a.inside():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender, receiver:
        receiver.bind((hosts.b.address, 0))
        hosts.drop(hosts.a)
        before = hosts.a.sent_bytes()
        for _ in range(10):
            assert sender.sendto(bytes(1000), receiver.getsockname()) == 1000
        assert hosts.a.sent_bytes() - before > 10_000  # nothing held it back
        stays_silent(receiver)
        hosts.mend()
        stays_silent(receiver)
        sender.sendto(b"later", receiver.getsockname())
        assert receiver.recv(5) == b"later"


def test_a_reset_connection_fails_on_both_sides(hosts: TwoHosts) -> None:
    with connection(hosts) as (near, far):
        require(None if hosts.a.reset() else "the kernel lacks CONFIG_INET_DIAG_DESTROY")
        with pytest.raises(ConnectionAbortedError):
            near.recv(1)
        with pytest.raises(ConnectionResetError):
            far.recv(1)
    with connection(hosts) as (near, far):
        arrives(b"a new one", near, far)


def test_a_reset_that_is_lost_leaves_half_a_connection(hosts: TwoHosts) -> None:
    with connection(hosts) as (near, far):
        hosts.drop(hosts.a)
        require(None if hosts.a.reset() else "the kernel lacks CONFIG_INET_DIAG_DESTROY")
        with pytest.raises(ConnectionAbortedError):
            near.recv(1)
        stays_silent(far)


# --- when to cut ----------------------------------------------------------------------------------


def test_cut_when_so_much_was_sent(hosts: TwoHosts) -> None:
    hosts.shape(200_000_000)
    enough = Cut(lambda: hosts.a.sent_bytes() > 4 * MB, for_s=SILENCE_S)
    with connection(hosts) as ends, cutting(hosts, [enough]) as made:
        bits_per_s = transfer(*ends, 8 * MB)
    assert made == [enough]
    assert bits_per_s < 8 * MB * 8 / SILENCE_S


@pytest.mark.parametrize("silently", [False, True])
def test_a_connection_survives_random_cuts(hosts: TwoHosts, silently: bool) -> None:
    hosts.shape(100_000_000)
    after_s, for_s = (0.1, 0.5), (0.001, 0.1)  # up for longer than TCP waits to try again
    cuts = random_cuts(Random(1), 20, after_s, for_s)
    assert cuts == random_cuts(Random(1), 20, after_s, for_s)
    assert len(set(cuts)) == 20

    def lose() -> None:
        hosts.drop(hosts.a, hosts.b)

    with connection(hosts) as ends:
        with cutting(hosts, itertools.cycle(cuts), lose if silently else None) as made:
            transfer(*ends, 16 * MB)
        assert len(made) > 2


def test_a_cut_without_an_end_is_mended_at_the_end(hosts: TwoHosts) -> None:
    with connection(hosts) as (near, far):
        with cutting(hosts, [Cut(0.0)]) as made:
            while not made:
                time.sleep(0.001)
            near.sendall(b"meanwhile")
            stays_silent(far)
        assert far.recv(9, socket.MSG_WAITALL) == b"meanwhile"


@pytest.mark.parametrize("when", [TIMEOUT_S, lambda: False], ids=["time", "condition"])
def test_a_moment_that_does_not_come(hosts: TwoHosts, when: float) -> None:
    with cutting(hosts, [Cut(when), Cut(0.0)]) as made:
        pass
    assert made == []


def test_a_condition_that_fails_fails_the_test(hosts: TwoHosts) -> None:
    with pytest.raises(ZeroDivisionError), cutting(hosts, [Cut(lambda: 1 // 0 == 0)]):
        pass


# --- what is left ---------------------------------------------------------------------------------


_OWNER = """
from tests.live.twohosts import two_hosts
with two_hosts() as hosts:
    print(hosts.a.run(["sleep", "1000"]).pid, hosts.a.path, hosts.b.path, flush=True)
    input()
"""


@contextlib.contextmanager
def another_owner() -> Iterator[tuple[subprocess.Popen[str], int, list[str]]]:
    """Another process that has two hosts; the pid of a process there, and the namespaces."""
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        try:
            assert owner.stdout
            pid, *paths = owner.stdout.readline().split()
            yield owner, int(pid), paths
        finally:
            owner.kill()


def exist(paths: list[str]) -> list[bool]:
    return [os.path.exists(path) for path in paths]


def test_nothing_is_left_at_the_end_or_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), two_hosts() as hosts:  # noqa: PT012
        inside = hosts.a.run(["sleep", "1000"])
        grandchild = hosts.b.run(["sh", "-c", "sleep 1000 & echo $!"], stdout=subprocess.PIPE)
        assert grandchild.stdout
        with grandchild.stdout as said:
            stray = int(said.readline())
        1 / 0  # noqa: B018
    assert inside.returncode == -signal.SIGKILL
    assert eventually_gone(stray)
    assert exist([hosts.a.path, hosts.b.path]) == [False, False]


def test_whoever_is_still_there_at_the_end_survives() -> None:
    with contextlib.ExitStack() as returning:
        with two_hosts() as hosts:
            returning.enter_context(hosts.a.inside())
        assert not os.path.exists(hosts.a.path)


def test_what_a_killed_process_left_is_removed_by_the_next_and_nothing_of_a_live_one() -> None:
    with two_hosts(), another_owner() as (owner, pid, paths), another_owner() as (_, alive, others):
        owner.kill()
        owner.wait()
        assert is_running(pid)
        assert exist(paths) == [True, True]
        with two_hosts():
            assert exist(paths) == [False, False]
            assert eventually_gone(pid)
            assert is_running(alive)
            assert exist(others) == [True, True]
    with two_hosts():
        assert eventually_gone(alive)
        assert exist(others) == [False, False]


def test_what_an_earlier_process_of_our_pid_left_is_removed(hosts: TwoHosts) -> None:
    left = f"mig{os.getpid()}-1000000a"
    subprocess.run(["ip", "netns", "add", left], check=True)
    with two_hosts():
        assert exist([f"/run/netns/{left}", hosts.a.path, hosts.b.path]) == [False, True, True]


def test_without_the_commands_the_test_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIGRATOR_REQUIRE_LIVE", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.skip.Exception, match="iproute2"), two_hosts():
        pass
