"""What the kernel can: every mechanism is tried on processes of our own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from migrator.doctor.check import Check
from migrator.doctor.host import SHM
from tracker.errors import InjectionError, NotTracking, TrackerError
from tracker.inject.acquire import acquire_userfaultfd
from tracker.probe import probe
from tracker.probe.answering import check_answering
from tracker.probe.trial import FEATURES, HUGE_PAGES, Subject, shared_file
from tracker.syscalls import uffd_api

HUNG_TASK_PANIC = Path("/proc/sys/kernel/hung_task_panic")
PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")

_FEATURES = "userfaultfd's features"
_ANSWERED = "answered faults"
_NEWER_KERNEL = (
    "run a kernel whose asynchronous write-protection works (Linux 6.7 was the first to have it, "
    "with CONFIG_USERFAULTFD, CONFIG_PTE_MARKER_UFFD_WP and CONFIG_PROC_PAGE_MONITOR)"
)


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


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)
