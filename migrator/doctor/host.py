"""What the host lets its users do."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from migrator.doctor.check import Check
from tracker.inject.refusal import proc_status

SHM = "/dev/shm"
USERFAULTFD_DEVICE = "/dev/userfaultfd"
UNPRIVILEGED = Path("/proc/sys/vm/unprivileged_userfaultfd")

_CAP_SYS_PTRACE = 1 << 19
_GIB = 1 << 30


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
