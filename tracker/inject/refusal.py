"""Why the kernel does not let us trace a process: said in words, from ``/proc``."""

from __future__ import annotations

import errno
import os

_PF_KTHREAD = 0x0020_0000  # include/linux/sched.h
_CAP_SYS_PTRACE = 1 << 19
_YAMA = "/proc/sys/kernel/yama/ptrace_scope"


def proc_status(pid: int | str) -> dict[str, str]:
    """Read ``/proc/PID/status``: each line's name and the rest of it.

    :raise OSError: there is no such process
    """
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        return {name: rest.strip() for name, _, rest in (line.partition(":") for line in file)}


def why_refused(pid: int) -> str:
    """Tell what stands in the way of ptrace, after it failed with EPERM (``ptrace(2)``).

    :raise OSError: the process is gone, or about to be
    """
    target = proc_status(pid)
    tracer = int(target["TracerPid"])
    if tracer:
        return f"it is already traced by process {tracer} ({_command(tracer)})"
    if "VmSize" not in target:  # it has no memory, or no more
        if not _is_kernel_thread(pid):
            raise ProcessLookupError(errno.ESRCH, "it is ending", str(pid))
        return "it is a kernel thread"

    ours = proc_status("self")
    privileged = int(ours["CapEff"], 16) & _CAP_SYS_PTRACE
    reasons = []
    if not privileged:
        for what in ("Uid", "Gid"):  # real, effective, saved, file system
            theirs, own = target[what].split()[:3], ours[what].split()[0]
            if set(theirs) != {own}:
                reasons.append(f"its {what.lower()} is {'/'.join(theirs)} and ours is {own}")
        if os.stat(f"/proc/{pid}").st_uid != int(target["Uid"].split()[1]):
            reasons.append("it is not dumpable (prctl PR_SET_DUMPABLE)")
        missing = int(target["CapPrm"], 16) & ~int(ours["CapPrm"], 16)
        if missing:
            reasons.append(f"it has capabilities that we lack ({missing:#x})")
    scope = _yama_scope()
    if scope == 3 or (scope and not privileged):
        reasons.append(f"{_YAMA} is {scope}")
    if not reasons:
        reasons.append("a security module or a user namespace is in the way")
    held = "although we have" if privileged else "and we do not have"
    return f"ptrace is not permitted: {'; '.join(reasons)}; {held} CAP_SYS_PTRACE"


def _is_kernel_thread(pid: int) -> bool:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        flags = file.read().rpartition(")")[2].split()[6]
    return bool(int(flags) & _PF_KTHREAD)


def _yama_scope() -> int:
    try:
        with open(_YAMA, encoding="ascii") as file:
            return int(file.read())
    except FileNotFoundError:  # a kernel without Yama
        return 0


def _command(pid: int) -> str:
    try:
        return proc_status(pid)["Name"]
    except OSError:
        return "gone meanwhile"
