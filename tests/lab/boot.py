"""Runs a command in the lab VM as if it ran here: its output comes out, and its exit status.

The VM has a kernel of its own (``build-kernel``), and this machine's files: its root is the root
of the host, read-only, with a tmpfs on ``/tmp``, ``/run``, ``/dev/shm`` and ``/var/tmp``. So tests
in it see this checkout and its virtual environment, and can harm neither. It has two processors,
under TCG on every host, so that all hosts see the same, no network, and QEMU's ``edu`` device
behind an emulated Intel IOMMU.

iommufd's self-test device and a real IOMMU exclude each other: in Linux 6.12 the made-up device is
probed by the driver of whichever IOMMU came first (iommu_ops_from_fwnode in drivers/iommu/iommu.c),
and then attaching it fails with EINVAL. So the tests in ``inside/selftest`` get a VM without.

``python -m tests.lab.boot [ARGUMENTS]`` runs ``pytest ARGUMENTS`` there, on all tests in ``inside``
if the arguments name none.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
INSIDE = "tests/lab/inside"
SELFTEST = f"{INSIDE}/selftest"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
LAB = CACHE / "migrator-lab"

FAILED = 125
"""Exit status where the VM, and not the command in it, failed; pytest has none above 5."""

_NONE_COLLECTED = 5  # of pytest

BOOT_S = 300.0
SILENCE_S = 900.0

# What virtme-ng's init puts a tmpfs on: what is needed of there is mounted again. /tmp is ours.
_HIDDEN = ("/dev", "/run", "/var/cache", "/var/log", "/var/tmp")
_TMP = Path("/tmp")

# Compiled kernels are kept by the name of the CPU and its features, and TCG's CPU is not the
# host's. With one that both can do, they are compiled outside, where that takes seconds, and found
# inside.
_NUMBA = {"NUMBA_CPU_NAME": "x86-64-v2", "NUMBA_CPU_FEATURES": ""}

_KERNEL_ARGUMENTS = (
    "intel_iommu=on",  # if there is one
    "vfio_iommu_type1.allow_unsafe_interrupts=1",
    # virtme-ng's, and a cache: each start of Python opens hundreds of files
    "rootflags=version=9p2000.L,trans=virtio,access=any,msize=524288,cache=loose",
    "loglevel=5",  # warnings and worse, which tell what happened when the VM ends before its time
)
_IOMMU = "intel-iommu,intremap=off,caching-mode=on"
_PORT = "lab.output"
_KERNEL_LINES = 40
_CONSOLE_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
_libc = ctypes.CDLL(None)  # before any fork


class LabError(Exception):
    """The VM could not be started, or ended before the command in it did.

    :ivar reason: what happened
    :ivar kernel: the last lines of its console
    """

    def __init__(self, reason: str, kernel: Sequence[str] = ()) -> None:
        self.reason = reason
        self.kernel = list(kernel)
        super().__init__("\n".join([reason, *(f"  | {line}" for line in self.kernel)]))


@dataclass(frozen=True)
class Limits:
    """How long the VM may say nothing.

    :ivar boot_s: until the command starts
    :ivar silence_s: from then on, between two outputs of the command
    """

    boot_s: float = BOOT_S
    silence_s: float = SILENCE_S


def kernel_directory() -> Path:
    """Where the lab's kernel is: ``bzImage``, ``config``, ``include/``. Built where needed.

    :raise LabError: it cannot be built; build-kernel has said why on stderr
    """
    return Path(_said_by(HERE / "build-kernel"))


def run(
    command: Sequence[str],
    *,
    iommu: bool = True,
    limits: Limits | None = None,
    out: BinaryIO | None = None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Boot the VM, run a command in it as root, in this checkout, and end the VM.

    Ctrl-C and SIGTERM end the VM, and so does the end of this process.

    :param command: with its arguments
    :param iommu: put the VM's devices behind an IOMMU
    :param out: where its stdout and stderr go, as they come; by default our stdout
    :param environment: added to what the command has by default
    :return: its exit status
    :raise LabError: there is none: the kernel panicked, the VM hangs, QEMU ended or cannot start
    """
    out = out or sys.stdout.buffer
    kernel = kernel_directory() / "bzImage"
    LAB.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"run.{os.getpid()}.", dir=LAB) as name:
        directory = Path(name)
        variables = {**_environment(), **(environment or {})}
        (directory / "script").write_text(_script(command, variables, directory))
        with _started(_qemu_command(kernel, directory, iommu)) as vm:
            tail = _forward(vm, out, limits or Limits())
            status = vm.wait()
        try:
            return int((directory / "status").read_text())
        except FileNotFoundError:
            reason = f"the lab VM ended before the command in it (QEMU: {status})"
            raise LabError(reason, tail) from None


def _said_by(script: Path) -> str:
    done = subprocess.run([script], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise LabError(f"{script.name} failed: {done.returncode}")
    return done.stdout.strip()


# -- what runs inside ---------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    """What the command needs to know of ours."""
    passed = ("HOME", "LANG", "NUMBA_DISABLE_JIT", "PATH", "PYTEST_ADDOPTS", "TERM")
    ours = {
        name: value
        for name, value in os.environ.items()
        if name in passed or name.startswith("MIGRATOR_")
    }
    return {
        **ours,
        **_NUMBA,
        "COLUMNS": str(shutil.get_terminal_size().columns),
        "MIGRATOR_LAB": "inside",
        "NUMBA_CACHE_DIR": str(LAB / "numba"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XDG_CACHE_HOME": str(CACHE),
    }


def _needed() -> list[Path]:
    """Directories that the command may look into."""
    found = (CHECKOUT, CACHE / "qemu-migrator", LAB, Path(sys.base_prefix))
    return [path for path in found if path.exists()]


def _own_tmp(directory: Path) -> list[str]:
    """Shell lines that put a tmpfs on /tmp, and what is needed of there back into it."""
    before, after = [], []
    for i, path in enumerate([*_needed(), LAB / "numba", directory]):
        if path.is_relative_to(_TMP):
            here, there = f"/run/kept{i}", shlex.quote(str(path))
            before.append(f"mkdir {here} && mount --bind {there} {here}")
            after.append(f"mkdir -p {there} && mount --move {here} {there}")
    return [*before, "mount -t tmpfs -o mode=1777 tmpfs /tmp", *after]


def _script(command: Sequence[str], environment: Mapping[str, str], directory: Path) -> str:
    """What the VM's init runs.

    Output goes to a port that is looked for here, as virtme-ng's own need udev. A VM has no exit
    status: that of the command goes to a file.
    """
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    status = shlex.quote(str(directory / "status"))
    return "\n".join(
        [
            *_own_tmp(directory),
            *lines,
            f"cd {shlex.quote(str(CHECKOUT))}",
            "ulimit -l unlimited",
            f"port=$(grep -lx {_PORT} /sys/class/virtio-ports/*/name) || exit",
            "port=${port%/name}",
            f"{shlex.join(command)} </dev/null >/dev/${{port##*/}} 2>&1",
            f"echo $? >{status}.new && mv {status}.new {status}",
            "",
        ]
    )


def warm_up() -> None:
    """Compile here what the VM would take minutes to compile.

    :raise LabError: that failed; stderr has the reason
    """
    environment = {**os.environ, **_environment()}
    for arguments in (
        ["-m", "compileall", "-q", "migrator", "tests", "tracker"],
        ["-c", "from migrator.transport.warm import warm_up; warm_up()"],
    ):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=CHECKOUT, env=environment, check=False
        )
        if done.returncode:
            raise LabError(f"python {arguments[1]!r} failed: {done.returncode}")


# -- the VM -------------------------------------------------------------------------------------


def _qemu_command(kernel: Path, directory: Path, iommu: bool) -> list[str]:
    """The command line that virtme-ng makes.

    :param directory: private to this run, and written by both sides
    """
    numba = LAB / "numba"
    numba.mkdir(parents=True, exist_ok=True)
    virtme = [
        *[str(Path(sys.executable).with_name("virtme-run")), "--dry-run", "--show-command"],
        *[
            "--kimg",
            str(kernel),
            "--mods",
            "none",
            "--user",
            "root",
            "--cpus",
            "2",
            "--memory",
            "3G",
        ],
        *["--disable-kvm", "--disable-microvm", "--force-9p", "--show-boot-console"],
        *["--script-sh", f"sh {shlex.quote(str(directory / 'script'))}"],
    ]
    for path in _needed():
        if any(path.is_relative_to(hidden) for hidden in _HIDDEN):
            virtme += ["--rodir", str(path)]
    virtme += ["--rwdir", str(numba), "--rwdir", str(directory)]
    for argument in _KERNEL_ARGUMENTS:
        virtme += ["--kopt", argument]
    # it makes a file in the directory for temporary files, whose name is in the command line
    environment = {**os.environ, "TMPDIR": str(directory)}
    done = subprocess.run(
        virtme,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LabError(f"virtme-ng cannot make a command line: {done.stderr.strip()}")
    command = shlex.split(done.stdout.splitlines()[-1])
    command += ["-chardev", "file,id=lab,path=/proc/self/fd/1"]
    port = f"virtserialport,chardev=lab,name={_PORT}"
    for device in (*([_IOMMU] if iommu else []), "edu", "virtio-serial-pci", port):
        command += ["-device", device]
    return command


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The VM, ended with the block, or with us."""
    try:
        vm = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is ours to handle
            preexec_fn=_end_with_parent,
        )
    except OSError as error:
        raise LabError(f"{command[0]}: {error.strerror}") from error
    try:
        yield vm
    finally:
        if vm.poll() is None:
            vm.kill()
        vm.wait()
        for pipe in (vm.stdout, vm.stderr):
            assert pipe is not None
            pipe.close()


def _end_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _forward(vm: subprocess.Popen[bytes], out: BinaryIO, limits: Limits) -> list[str]:
    """Pass on what comes, until the VM ends.

    :return: the last lines of the VM's console
    :raise LabError: nothing has come for so long
    """
    assert vm.stdout is not None
    assert vm.stderr is not None
    console = bytearray()
    limit_s, what = limits.boot_s, "the lab VM does not start"
    deadline = time.monotonic() + limit_s
    with selectors.DefaultSelector() as selector:
        for pipe in (vm.stdout, vm.stderr):
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select(deadline - time.monotonic()):
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is vm.stderr:
                    console += data
                    del console[:-_CONSOLE_BYTES]
                else:
                    limit_s, what = limits.silence_s, "the command in the lab VM hangs"
                    deadline = time.monotonic() + limit_s
                    out.write(data)
                    out.flush()
            if time.monotonic() > deadline:
                raise LabError(f"{what}: no output for {limit_s:g} s", _lines(console))
    return _lines(console)


def _lines(console: bytearray) -> list[str]:
    return console.decode(errors="replace").splitlines()[-_KERNEL_LINES:]


# -- the command --------------------------------------------------------------------------------


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str]) -> int:
    """Run the tests that are for the inside.

    :param arguments: for pytest; where none names a test, it runs all
    :return: pytest's exit status, the worse one where there are two VMs; or :data:`FAILED`
    """
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGHUP, _terminated)
    named = [a for a in arguments if INSIDE in a and not a.startswith("-")]
    others = [a for a in arguments if a not in named]
    without_iommu = [a for a in named if SELFTEST in a]
    with_iommu = [a for a in named if SELFTEST not in a]
    if not named:
        with_iommu, without_iommu = [INSIDE], [SELFTEST]
    try:
        _said_by(HERE.parent / "live" / "fetch-qemu")
        warm_up()
        statuses = []
        if with_iommu:
            statuses.append(run([*_pytest(), f"--ignore={SELFTEST}", *others, *with_iommu]))
        if without_iommu:
            statuses.append(run([*_pytest(), *others, *without_iommu], iommu=False))
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    passed = {0, _NONE_COLLECTED}  # one VM has no test of a given name, the other may
    return next((status for status in statuses if status not in passed), min(statuses))


def _pytest() -> list[str]:
    colour = ["--color=yes"] if sys.stdout.isatty() else []
    # the plugins want to write into the checkout
    plugins = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    return [sys.executable, "-m", "pytest", *plugins, *colour]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
