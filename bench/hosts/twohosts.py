"""Two hosts with a network between them: two network namespaces, joined by a veth pair.

The link is as slow as its user likes, and is cut, loses packets or resets connections when that one
says so. What was made is removed at the end. If the process is killed, the next one to make hosts
removes it, with whatever still runs there: the names tell whose it was.

Addresses are those for documentation (RFC 5737, RFC 3849). Every pair of hosts has the same ones:
nobody outside a pair sees them.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.hosts.processes import is_running

LINK = "wire"  # what both interfaces are called

_NAME = re.compile(r"(mig([0-9]+)-[0-9]+)[ab]")  # of a namespace, with its owner's pid
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_NOWHERE = "02:00:00:00:00:01"  # a locally administered address that nobody has
_QUEUE_S = 0.05
_BURST_S = 0.004  # what a busy machine may wake up late, and lose nothing
_BURST_MIN = 16 << 10  # bytes; a larger packet is segmented first (Linux: tbf_segment)

_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()
_in_use: set[str] = set()


@dataclass(frozen=True)
class Host:
    """One of the two.

    :ivar namespace: its name
    :ivar address: IPv4
    :ivar address6: IPv6
    """

    namespace: str
    address: str
    address6: str
    _processes: list[subprocess.Popen[Any]] = field(default_factory=list, repr=False)

    @property
    def path(self) -> str:
        """The file that is its namespace."""
        return f"/run/netns/{self.namespace}"

    def run(self, argv: Iterable[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process there, with the options of Popen; the pid is the command's own.

        It is killed at the end. Only its network is another one.
        """
        # nsenter executes the command in its own place: it forks for --pid only
        process = subprocess.Popen(["nsenter", f"--net={self.path}", "--", *argv], **options)
        self._processes.append(process)
        return process

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Have this thread there. A socket stays on the host on which it was made.

        Nothing may be awaited meanwhile: the other tasks of the thread would be there too.
        """
        with open("/proc/thread-self/ns/net") as before:
            enter(self.path)
            try:
                yield
            finally:
                _set_namespace(before.fileno())

    def sent_bytes(self) -> int:
        """How much has left its interface so far, headers and what was lost later included."""
        with self.inside():
            counters = Path("/proc/thread-self/net/dev").read_text()
        found = re.search(rf"^ *{LINK}:((?: +[0-9]+)+)$", counters, re.MULTILINE)
        assert found, counters
        return int(found[1].split()[8])

    def reset(self) -> int:
        """Abort its TCP connections: ECONNABORTED here, and ECONNRESET where the RST arrives.

        :return: how many these were; none also if the kernel lacks ``CONFIG_INET_DIAG_DESTROY``
        """
        closed = self.run(
            ["ss", "--kill", "--tcp", "--no-header", "state", "connected"],
            stdout=subprocess.PIPE,
        )
        return len(closed.communicate()[0].splitlines())


@dataclass(frozen=True)
class TwoHosts:
    """Both, and the link between them."""

    a: Host
    b: Host

    def shape(self, bits_per_s: int | None) -> None:
        """Make the link so fast in each direction, with a queue of 50 ms; ``None``: unlimited.

        Measured with all headers: TCP gets a little less. Connections may stay.
        """
        for host in (self.a, self.b):
            if bits_per_s is None:
                _command(
                    "tc", "-n", host.namespace, *f"qdisc del dev {LINK} root".split(), check=False
                )
                continue
            burst = max(_BURST_MIN, int(bits_per_s / 8 * _BURST_S))
            shaped = f"tbf rate {bits_per_s}bit burst {burst} latency {_QUEUE_S * 1000}ms"
            _command("tc", "-n", host.namespace, *f"qdisc replace dev {LINK} root {shaped}".split())

    def cut(self) -> None:
        """Take down the interface of ``a``; ``b`` has no carrier.

        A connection waits, and with IPv6 about a second longer than the cut. A new one is refused
        at once on ``a`` (ENETUNREACH).
        """
        _ip(self.a.namespace, f"link set {LINK} down")

    def drop(self, *senders: Host) -> None:
        """Lose every IP packet that these send; nobody is told, and no interface changes.

        They send to a hardware address that nobody has, so this needs nothing of the kernel.
        """
        for sender in senders:
            for address in self._peer(sender):
                nowhere = f"lladdr {_NOWHERE} dev {LINK} nud permanent"
                _ip(sender.namespace, f"neigh replace {address} {nowhere}")

    def mend(self) -> None:
        """Undo every :meth:`cut` and :meth:`drop`; nothing to undo is no error."""
        _ip(self.a.namespace, f"link set {LINK} up")
        for host in (self.a, self.b):
            _ip(host.namespace, f"neigh flush dev {LINK} nud permanent")

    def _peer(self, host: Host) -> tuple[str, str]:
        peer = self.b if host is self.a else self.a
        return peer.address, peer.address6


def enter(namespace: str) -> None:
    """Have this thread, and those that it starts, in a network namespace.

    :param namespace: a file that is one
    :raise OSError: it is none
    """
    with open(namespace) as there:
        _set_namespace(there.fileno())


def missing() -> str | None:
    """Why no hosts can be made here; ``None`` if they can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    for command, package in (("ip", "iproute2"), ("tc", "iproute2"), ("nsenter", "util-linux")):
        if not shutil.which(command):
            return f"{command} is not installed (Debian: {package})"
    return None


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Make two hosts, and remove them.

    :raise RuntimeError: that cannot be; see :func:`missing`
    """
    if problem := missing():
        raise RuntimeError(problem)
    stem = f"mig{os.getpid()}-{next(_numbers)}"
    _in_use.add(stem)
    _remove_abandoned()
    a = Host(f"{stem}a", "192.0.2.1", "2001:db8::1")
    b = Host(f"{stem}b", "192.0.2.2", "2001:db8::2")
    try:
        for host in (a, b):
            _command("ip", "netns", "add", host.namespace)
        _ip(a.namespace, f"link add name {LINK} type veth peer name {LINK} netns {b.namespace}")
        for host in (a, b):
            with host.inside():
                settings = Path(f"/proc/sys/net/ipv6/conf/{LINK}/keep_addr_on_down")
                settings.write_text("1")
            _ip(host.namespace, f"address add {host.address}/30 dev {LINK}")
            _ip(host.namespace, f"address add {host.address6}/64 dev {LINK} nodad")
            for interface in ("lo", LINK):
                _ip(host.namespace, f"link set {interface} up")
        yield TwoHosts(a, b)
    finally:
        for host in (a, b):
            for process in host._processes:
                process.kill()
                process.wait()
            _remove(host.namespace)
        _in_use.discard(stem)


# --- commands -------------------------------------------------------------------------------------


def _command(*argv: str, check: bool = True) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def _ip(namespace: str, arguments: str) -> None:
    _command("ip", "-n", namespace, *arguments.split())


def _set_namespace(fd: int) -> None:
    """setns(2) of this thread, for its network; :func:`os.setns` needs Python 3.12."""
    if _libc.setns(fd, _CLONE_NEWNET):
        errno = ctypes.get_errno()
        raise OSError(errno, f"setns: {os.strerror(errno)}")


def _remove_abandoned() -> None:
    """Remove what processes left that have ended, also an earlier one with our pid."""
    for name in _command("ip", "netns", "list").split():
        found = _NAME.fullmatch(name)
        if not found:
            continue
        stem, pid = found[1], int(found[2])
        if stem not in _in_use and (pid == os.getpid() or not is_running(pid)):
            _remove(name)


def _remove(namespace: str) -> None:
    """Remove a namespace, if it is there, its interface, and the other processes in it."""
    for pid in map(int, _command("ip", "netns", "pids", namespace, check=False).split()):
        if pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    # whoever still has a socket there keeps it, but not the interface
    _command("ip", "-n", namespace, "link", "delete", LINK, check=False)
    _command("ip", "netns", "delete", namespace, check=False)
