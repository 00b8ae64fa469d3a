"""Is this host able to? Everything is tried, nothing is concluded from a version."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from migrator.aio import in_thread
from migrator.errors import CommandFailed, VmError
from migrator.harmless import harmless
from migrator.qemu.accel import choose_accel
from migrator.qemu.process import RunDirectory, Vm
from migrator.qemu.qmp import Qmp
from tracker.errors import InjectionError, NotTracking, RamError, TrackerError
from tracker.inject.acquire import acquire_userfaultfd
from tracker.inject.refusal import proc_status
from tracker.memory.ram import find_block
from tracker.probe import probe
from tracker.probe.answering import check_answering
from tracker.probe.trial import FEATURES, HUGE_PAGES, Subject, shared_file
from tracker.syscalls import uffd_api

SHM = "/dev/shm"
HUNG_TASK_PANIC = Path("/proc/sys/kernel/hung_task_panic")
PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
USERFAULTFD_DEVICE = "/dev/userfaultfd"
UNPRIVILEGED = Path("/proc/sys/vm/unprivileged_userfaultfd")

CAPABILITIES = ("events", "pause-before-switchover", "x-ignore-shared")
COMMANDS = (
    "cont",
    "getfd",
    "human-monitor-command",
    "migrate",
    "migrate-continue",
    "migrate-incoming",
    "migrate-set-capabilities",
    "migrate-set-parameters",
    "migrate_cancel",
    "qom-get",
    "query-block-exports",
    "query-block-jobs",
    "query-cpus-fast",
    "query-jobs",
    "query-memdev",
    "query-migrate",
    "query-migrate-capabilities",
    "query-migrate-parameters",
    "query-named-block-nodes",
    "query-status",
    "query-target",
    "quit",
    "stop",
    "x-query-ramblock",
)
"""What QEMU is asked in a migration."""

_CAP_SYS_PTRACE = 1 << 19
_GIB = 1 << 30
_PATIENCE_S = 1.0
_FEATURES = "userfaultfd's features"
_ANSWERED = "answered faults"
_T = TypeVar("_T")

_NEWER_QEMU = "use a QEMU that has them, and name it with --qemu"
_NEWER_KERNEL = (
    "run a kernel whose asynchronous write-protection works (Linux 6.7 was the first to have it, "
    "with CONFIG_USERFAULTFD, CONFIG_PTE_MARKER_UFFD_WP and CONFIG_PROC_PAGE_MONITOR)"
)


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    :ivar check: its short name
    :ivar result: a ``warning`` says that some migrations will not work, or that it was not tried
    :ivar seen: what was seen
    :ivar mend: what to do about it; never empty if it failed
    """

    check: str
    result: Literal["passed", "failed", "warning"]
    seen: str
    mend: str = ""


async def examine(
    qemu: str = "qemu-system-x86_64", say: Callable[[str], None] | None = None
) -> list[Check]:
    """Try everything; nothing is left behind.

    :param qemu: the QEMU that is to be used
    :param say: is told of whatever takes longer than a second; by default stderr is
    """
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    checks = await _patiently("QEMU", qemu_checks(qemu), say)
    if checks[0].result == "passed":
        checks += await _patiently("accelerator", accelerator_checks(qemu), say)
    checks += await _patiently("tracing", in_thread(tracing_checks), say)
    checks += await _patiently("tracking", in_thread(tracking_checks), say)
    checks += await _patiently("answered faults", in_thread(answering_checks), say)
    checks = soften(checks)
    checks += await _patiently("tracking of huge pages", in_thread(huge_page_checks), say)
    checks += [permission_check(), shared_memory_check(), memlock_check(), device_check()]
    return checks


async def _patiently(what: str, work: Coroutine[Any, Any, _T], say: Callable[[str], None]) -> _T:
    loop = asyncio.get_running_loop()
    reminder = loop.call_later(_PATIENCE_S, say, f"still trying: {what}")
    try:
        return await work
    finally:
        reminder.cancel()


# -- QEMU ---------------------------------------------------------------------------------------


async def accelerator_checks(qemu: str) -> list[Check]:
    """KVM or TCG: a guest runs under either."""
    try:
        choice = await choose_accel(qemu)
    except OSError as error:
        return [Check("accelerator", "failed", str(error), "name a QEMU that starts with --qemu")]
    seen = f"{choice.name.upper()}: {choice.reason}"
    return [Check("accelerator", "passed", seen)]


async def qemu_checks(qemu: str) -> list[Check]:
    """What QEMU can, asked of one without a machine."""
    with RunDirectory() as directory:
        vm = Vm("probe", directory)
        try:
            arguments = ["-machine", "none", "-S", "-nodefaults", "-display", "none"]
            await vm.start([qemu, *arguments], incoming=False)
            qmp = await Qmp.connect(qemu, vm.qmp)
            try:
                return [
                    await _version(qmp),
                    await _capabilities(qmp),
                    await _commands(qmp),
                    await _shared_ram(qmp),
                ]
            finally:
                await qmp.close()
        except VmError as error:
            mend = "install QEMU (Debian: qemu-system-x86), or name one with --qemu"
            return [Check("QEMU", "failed", error.reason, mend)]
        finally:
            await vm.stop()


async def _version(qmp: Qmp) -> Check:
    answer = await qmp.execute("query-version")
    number = "{major}.{minor}.{micro}".format(**answer["qemu"])
    return Check("QEMU", "passed", f"{qmp.name} says {number} {answer['package']}".rstrip())


async def _capabilities(qmp: Qmp) -> Check:
    name = "QEMU's capabilities"
    missing = sorted(set(CAPABILITIES).difference(await qmp.capabilities()))
    if missing:
        return Check(name, "failed", f"it lacks {', '.join(missing)}", _NEWER_QEMU)
    try:
        await qmp.set_capabilities(dict.fromkeys(CAPABILITIES, True))
    except CommandFailed as error:
        return Check(name, "failed", str(error), _NEWER_QEMU)
    return Check(name, "passed", f"{', '.join(CAPABILITIES)} can be turned on")


async def _commands(qmp: Qmp) -> Check:
    name = "QEMU's commands"
    there = {command["name"] for command in await qmp.execute("query-commands")}
    missing = sorted(set(COMMANDS).difference(there))
    if missing:
        return Check(name, "failed", f"it lacks {', '.join(missing)}", _NEWER_QEMU)
    return Check(name, "passed", f"all {len(COMMANDS)} that a migration uses")


async def _shared_ram(qmp: Qmp) -> Check:
    name = "RAM as a shared file"
    size = 16 * os.sysconf("SC_PAGE_SIZE")
    try:
        await qmp.execute(
            "object-add",
            qom_type="memory-backend-file",
            id="probe",
            size=size,
            share=True,
            mem_path=SHM,
        )
        (backend,) = await qmp.memory_backends()
        await in_thread(find_block, qmp.pid, backend.name, backend.size, backend.mem_path)
    except CommandFailed as error:
        mend = f"QEMU must be able to make files in {SHM}, and have memory-backend-file"
        return Check(name, "failed", str(error), mend)
    except (RamError, OSError) as error:
        return Check(name, "failed", str(error), "run this program as QEMU's user, or as root")
    return Check(name, "passed", f"memory-backend-file in {SHM}, found again in QEMU's memory")


# -- the kernel ---------------------------------------------------------------------------------


def tracing_checks() -> list[Check]:
    """Whether a userfaultfd can be had out of another process, and what it can."""
    try:
        with Subject(shared_file(SHM)) as subject:
            checks = _injection_checks(subject)
            return [*checks, _features(subject)]
    except (OSError, TrackerError) as error:
        return [Check("ptrace", "failed", _reason(error), f"see to {SHM}, and try again")]


def _injection_checks(subject: Subject) -> list[Check]:
    calls = ("ptrace", "userfaultfd", "pidfd_getfd")
    try:
        acquired = acquire_userfaultfd(subject.pid)
    except (InjectionError, OSError) as error:
        return refused_checks(_reason(error))
    os.close(acquired.fd)
    kind = (
        "one that leaves the kernel's own faults alone, which is enough"
        if acquired.user_mode_only
        else "made inside another process"
    )
    seen = (f"another process was stopped for {acquired.stopped_ms:.1f} ms", kind, "copied from it")
    return [Check(call, "passed", text) for call, text in zip(calls, seen, strict=True)]


def refused_checks(reason: str) -> list[Check]:
    """What a failed injection says about each of its calls, which come in this order.

    :param reason: of the :class:`~tracker.errors.InjectionError`
    """
    mends = {
        "ptrace": _ptrace_mend(),
        "userfaultfd": "use a kernel with CONFIG_USERFAULTFD; in a container, have its seccomp "
        "profile allow userfaultfd",
        "pidfd_getfd": "in a container, have its seccomp profile allow pidfd_open and pidfd_getfd",
    }
    failed = next((c for c in ("userfaultfd", "pidfd_getfd") if reason.startswith(c)), "ptrace")
    checks: list[Check] = []
    for call, mend in mends.items():
        if checks and checks[-1].result != "passed":
            checks.append(Check(call, "warning", "not reached", f"first mend {checks[0].check}"))
        elif call == failed:
            checks.append(Check(call, "failed", reason, mend))
        else:
            checks.append(Check(call, "passed", "works on another process"))
    return checks


def _ptrace_mend() -> str:
    mend = "run this program as root or with CAP_SYS_PTRACE"
    container = "in a container, have its seccomp profile allow ptrace"
    try:
        scope = int(PTRACE_SCOPE.read_text())
    except OSError:  # a kernel without Yama
        scope = 0
    if scope == 3:
        return f"{PTRACE_SCOPE} is 3, so nobody may trace until the host starts with another value"
    if scope:
        return f"{mend}, or set {PTRACE_SCOPE} to 0 (it is {scope}); {container}"
    return f"{mend}, or as QEMU's user; {container}"


def _features(subject: Subject) -> Check:
    name = "userfaultfd's features"
    if subject.uffd < 0:
        reason = os.strerror(subject.uffd_errno)
        return Check(name, "failed", f"userfaultfd: {reason}", _NEWER_KERNEL)
    try:
        there = uffd_api(subject.uffd, 0)
    except OSError as error:
        return Check(name, "failed", _reason(error), _NEWER_KERNEL)
    return features_check(there)


def features_check(there: int) -> Check:
    """Whether everything needed is among the features that UFFDIO_API reports."""
    name = _FEATURES
    missing = [feature for feature, bit in FEATURES.items() if not there & bit]
    if missing:
        return Check(name, "failed", f"it lacks {', '.join(missing)}", _NEWER_KERNEL)
    return Check(name, "passed", ", ".join(FEATURES))


def tracking_checks() -> list[Check]:
    """Every probe of :mod:`tracker.probe.probe` on shared memory."""
    return outcome_checks("tracking", _NEWER_KERNEL, probe.try_everything())


def answering_checks() -> list[Check]:
    """Whether write faults can be answered, which is the way where nothing better works."""
    try:
        check_answering()
    except NotTracking as error:
        mend = "needed only where asynchronous write-protection does not work"
        return [Check(_ANSWERED, "warning", error.reason, mend)]
    return [Check(_ANSWERED, "passed", "every write was reported")]


def soften(checks: Sequence[Check]) -> list[Check]:
    """Where faults can be answered, a kernel whose better way fails is able all the same."""
    if not any(c.check == _ANSWERED and c.result == "passed" for c in checks):
        return list(checks)
    return [
        replace(c, result="warning", mend=f"nothing: write faults are answered; or {c.mend}")
        if c.result == "failed" and c.check.startswith(("tracking: ", _FEATURES))
        else c
        for c in checks
    ]


def huge_page_checks() -> list[Check]:
    """Every probe on huge pages, of the smallest kind of which enough are free."""
    name = "tracking of huge pages"
    free = probe.free_huge_pages()
    sizes = sorted(size for size, count in free.items() if count > HUGE_PAGES)
    if not sizes:
        said = ", ".join(f"{free[size]} of {size >> 10} kB" for size in sorted(free)) or "none"
        seen = f"not tried: {said} are free; it matters only if guest RAM is on hugetlbfs"
        return [Check(name, "passed", seen)]
    if _panics():
        mend = f"set {HUNG_TASK_PANIC} to 0 to try it, if guest RAM is on hugetlbfs"
        seen = "not tried: some kernels deadlock in it, and this host would panic"
        return [Check(name, "warning", seen, mend)]
    mend = f"keep guest RAM in {SHM}, or run a kernel in which this works"
    return outcome_checks(f"{sizes[0] >> 10} kB pages", mend, probe.try_everything(sizes[0]))


def _panics() -> bool:
    try:
        return int(HUNG_TASK_PANIC.read_text()) != 0
    except OSError:  # a kernel that does not look for hung tasks
        return False


def outcome_checks(what: str, mend: str, outcomes: Sequence[probe.Outcome]) -> list[Check]:
    """Probes as checks."""
    return [
        Check(f"{what}: {outcome.probe}", "passed", outcome.seen)
        if outcome.right
        else Check(f"{what}: {outcome.probe}", "failed", outcome.seen, mend)
        for outcome in outcomes
    ]


# -- the host -----------------------------------------------------------------------------------


def permission_check() -> Check:
    """Whether QEMUs of other users can be migrated."""
    if int(proc_status("self")["CapEff"], 16) & _CAP_SYS_PTRACE:
        return Check("other users' processes", "passed", "may be looked at (CAP_SYS_PTRACE)")
    return Check(
        "other users' processes",
        "warning",
        f"may not be looked at; only QEMUs of user {os.getuid()} can be migrated",
        "run this program as QEMU's user, as root, or with CAP_SYS_PTRACE",
    )


def shared_memory_check() -> Check:
    """Room for guest RAM, which is there twice until the source is gone."""
    try:
        usage = shutil.disk_usage(SHM)
    except OSError as error:
        return Check(SHM, "warning", str(error), "mount a tmpfs there, or keep RAM elsewhere")
    seen = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB are free"
    if usage.free >= 2 * _GIB:
        return Check(SHM, "passed", f"{seen}: guests of up to half of that can be moved within it")
    return Check(
        SHM,
        "warning",
        f"{seen}; the demo takes 2 GiB, and any VM twice its RAM",
        f"mount -o remount,size=SIZE {SHM}",
    )


def memlock_check() -> Check:
    """How much memory may be locked: nothing here does so, but some QEMUs do."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "no limit" if soft == resource.RLIM_INFINITY else f"{soft >> 10} kB"
    seen = f"{limit}; it matters only for QEMUs with VFIO devices or mem-lock=on"
    return Check("locked memory", "passed", seen)


def device_check() -> Check:
    """The ways to a userfaultfd besides the one that was tried."""
    try:
        setting = UNPRIVILEGED.read_text().strip()
    except OSError:
        setting = "not there"
    usable = os.access(USERFAULTFD_DEVICE, os.R_OK | os.W_OK)
    return Check(
        "ways to a userfaultfd",
        "passed",
        f"unprivileged_userfaultfd is {setting}, {USERFAULTFD_DEVICE} can "
        f"{'' if usable else 'not '}be opened; neither is needed",
    )


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)


# -- what people and programs get ---------------------------------------------------------------


def able(checks: Sequence[Check]) -> bool:
    """Whether no check failed."""
    return all(check.result != "failed" for check in checks)


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """``able`` and ``checks``, each with the fields of :class:`Check`."""
    return {"able": able(checks), "checks": [asdict(check) for check in checks]}


def show(checks: Sequence[Check], console: Console | None = None) -> None:
    """Print a table, by default on stderr; its last column only if there is something to mend."""
    console = console or Console(stderr=True, highlight=False, emoji=False)
    colours = {"passed": "green", "failed": "bold red", "warning": "yellow"}
    to_mend = any(check.mend for check in checks)
    table = Table()
    for heading in ("check", "result", "what was seen", "mend")[: 4 if to_mend else 3]:
        table.add_column(heading, overflow="fold")
    last_mend = ""
    for check in checks:
        cells = [Text(harmless(check.check)), Text(check.result, colours[check.result])]
        cells.append(Text(harmless(check.seen)))
        if to_mend:
            repeated = check.mend and check.mend == last_mend
            cells.append(Text("as above" if repeated else harmless(check.mend)))
            last_mend = check.mend
        table.add_row(*cells)
    console.print(table)
    failed = sum(check.result == "failed" for check in checks)
    if failed:
        console.print(f"[bold red]this host is not able to[/]: {failed} of {len(checks)} failed")
    else:
        console.print("[bold green]this host is able to[/]")
