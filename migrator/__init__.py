"""Live migration of running QEMU VMs, driven from outside QEMU.

    >>> from migrator import Limits, Options, migrate
    >>> report = await migrate("/run/source.qmp", "/run/destination.qmp", Options(verify=True))

Everything is imported when it is first used: importing this package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from migrator.errors import (
        Aborted,
        Failed,
        GuestEnded,
        MigratorError,
        Refused,
        Undecided,
    )
    from migrator.migration.options import Options
    from migrator.migration.orchestrator import migrate
    from migrator.policy.judge import Limits
    from migrator.report.report import Progress, Report

__all__ = [
    "Aborted",
    "Failed",
    "GuestEnded",
    "Limits",
    "MigratorError",
    "Options",
    "Progress",
    "Refused",
    "Report",
    "Undecided",
    "migrate",
]

_HOMES = {
    "Options": "migration.options",
    "migrate": "migration.orchestrator",
    "Limits": "policy.judge",
    "Progress": "report.report",
    "Report": "report.report",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
