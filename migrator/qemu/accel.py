"""KVM or TCG? Only running a guest tells.

``/dev/kvm`` can open, and QEMU start with it, on hosts where guests then hang or crawl (nested
ones without hardware support behind them, above all). So the workload guest is run for a moment:
KVM is taken if it boots and its heartbeats come at the rate they should.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

from migrator.aio import within
from migrator.choices import DEFAULT_ACCEL, AccelName
from migrator.errors import AccelUnavailable
from migrator.guest.workload import MIB, Workload, boot_image, guest_args, heartbeats

KVM_DEVICE = "/dev/kvm"

PROBE_S = 1.5
"""How long a probe may take. A guest that really runs needs half of it, the boot included."""

_PROBE = Workload(working_set_bytes=MIB, pages_per_s=20_000, heartbeat_ms=10)
_MEASURED_BEATS = 30
_DUE_S = (_MEASURED_BEATS - 1) * _PROBE.heartbeat_ms / 1000
_LONGEST_S = 2 * _DUE_S

_KILL_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class AccelChoice:
    """An accelerator that can be used.

    :ivar name: as QEMU's ``-accel`` has it
    :ivar reason: why this one, for people
    """

    name: Literal["kvm", "tcg"]
    reason: str


async def choose_accel(
    qemu_binary: str = "qemu-system-x86_64",
    wanted: AccelName = DEFAULT_ACCEL,
) -> AccelChoice:
    """Choose an accelerator; KVM only if a guest really runs under it.

    Takes at most about :data:`PROBE_S` seconds. The probe's QEMU is gone afterwards, also after a
    cancellation, and no file of it ever had a name.

    :param qemu_binary: the QEMU to be used, a path or a name in ``PATH``
    :param wanted: ``tcg`` is not probed
    :raise AccelUnavailable: ``kvm`` was asked for, and guests do not run under it
    :raise OSError: the QEMU binary could not be started
    """
    if wanted == "tcg":
        return AccelChoice("tcg", "asked for")
    problem = _kvm_device_problem()
    if problem is None:
        problem = await _kvm_guest_problem(qemu_binary)
    if problem is None:
        return AccelChoice("kvm", "a probe guest ran under it at its proper rate")
    if wanted == "kvm":
        raise AccelUnavailable("kvm", problem)
    return AccelChoice("tcg", problem)


def _kvm_device_problem() -> str | None:
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{KVM_DEVICE} cannot be opened: {error.strerror}"
    return None


async def _kvm_guest_problem(qemu_binary: str) -> str | None:
    arrivals: list[float] = []
    async with _probe_guest(qemu_binary) as process:
        started = time.monotonic()
        try:
            ended = await within(PROBE_S, _record(process, arrivals))
        except asyncio.TimeoutError:
            if not arrivals:
                return f"a KVM guest did not boot within {PROBE_S} s"
            return (
                f"a KVM guest took {arrivals[0] - started:.2f} s to boot, and had shown "
                f"{len(arrivals)} heartbeats, not {_MEASURED_BEATS}, after {PROBE_S} s"
            )
        except ValueError as error:
            return f"a KVM guest went wrong: {error}"
    if ended is not None:
        return f"QEMU ended: {ended or 'it did not say why'}"
    took_s = arrivals[_MEASURED_BEATS - 1] - arrivals[0]
    if took_s > _LONGEST_S:
        return (
            f"{_MEASURED_BEATS} heartbeats of a KVM guest took {took_s:.2f} s instead of "
            f"{_DUE_S:.2f} s"
        )
    return None


async def _record(process: asyncio.subprocess.Process, arrivals: list[float]) -> str | None:
    """Note when each heartbeat arrived, until there are enough.

    :return: None; or, if QEMU ended before, the last line of what it said
    :raise ValueError: the guest wrote something else
    """
    assert process.stdout is not None
    assert process.stderr is not None
    serial = b""
    while len(arrivals) < _MEASURED_BEATS:
        chunk = await process.stdout.read(4096)
        if not chunk:
            said = (await process.stderr.read()).decode(errors="replace").strip()
            return said.rpartition("\n")[2]
        serial += chunk
        numbers = heartbeats(serial)
        if numbers != list(range(len(numbers))):
            raise ValueError(f"its heartbeats do not count up from 0: {numbers}")
        arrivals += [time.monotonic()] * (len(numbers) - len(arrivals))
    return None


def _nameless_image() -> int:
    """:return: a descriptor; no file is left behind, however this process ends."""
    image = os.memfd_create("probe")
    with open(image, "wb", closefd=False) as file:
        file.write(boot_image(_PROBE))
    return image


@contextlib.asynccontextmanager
async def _probe_guest(qemu_binary: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the workload guest under KVM, its serial port on the process's standard output."""
    image = _nameless_image()
    try:
        process = await asyncio.create_subprocess_exec(
            qemu_binary,
            *["-accel", "kvm", "-machine", "q35", "-m", "64", "-no-reboot"],
            *["-serial", "stdio", *guest_args(f"/dev/fd/{image}")],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=(image,),
        )
    finally:
        os.close(image)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        # Bounded: a process stuck in the kernel must not stop us too.
        with contextlib.suppress(asyncio.TimeoutError):
            await within(_KILL_TIMEOUT_S, process.wait())
