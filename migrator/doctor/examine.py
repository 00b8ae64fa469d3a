"""Is this host able to? Everything is tried, nothing is concluded from a version."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from migrator.aio import in_thread
from migrator.doctor import host, kernel
from migrator.doctor import qemu as qemus
from migrator.doctor.check import Check

_PATIENCE_S = 1.0
_T = TypeVar("_T")


async def examine(
    qemu: str = "qemu-system-x86_64", say: Callable[[str], None] | None = None
) -> list[Check]:
    """Try everything; nothing is left behind.

    :param qemu: the QEMU that is to be used
    :param say: is told of whatever takes longer than a second; by default stderr is
    """
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    checks = await _patiently("QEMU", qemus.qemu_checks(qemu), say)
    if checks[0].result == "passed":
        checks += await _patiently("accelerator", qemus.accelerator_checks(qemu), say)
    checks += await _patiently("tracing", in_thread(kernel.tracing_checks), say)
    checks += await _patiently("tracking", in_thread(kernel.tracking_checks), say)
    checks += await _patiently("answered faults", in_thread(kernel.answering_checks), say)
    checks = kernel.soften(checks)
    checks += await _patiently("tracking of huge pages", in_thread(kernel.huge_page_checks), say)
    checks += [
        host.permission_check(),
        host.shared_memory_check(),
        host.memlock_check(),
        host.device_check(),
    ]
    return checks


async def _patiently(what: str, work: Coroutine[Any, Any, _T], say: Callable[[str], None]) -> _T:
    loop = asyncio.get_running_loop()
    reminder = loop.call_later(_PATIENCE_S, say, f"still trying: {what}")
    try:
        return await work
    finally:
        reminder.cancel()
