"""Moving a guest with the migrator's own commands."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.hosts.twohosts import Host
from bench.hosts.worker import PORT
from bench.moving.journey import Seat
from bench.moving.ways import GivenUp, GuestBroken, Moved, Terms, Way

_GIVEN_UP = 1  # 3: refused, 4: not known who may run
_PROGRAM = (sys.executable, "-c", "from migrator.cli.main import main; main()")


async def move(
    here: Seat, there: Seat, way: Way, terms: Terms, keys: Mapping[str, str], run: Path
) -> Moved:
    """Move the guest.

    :param keys: directories with keys, by address of the host
    :param run: for the commands' sockets
    :raise GivenUp: it did not converge
    :raise GuestBroken: it did not arrive, or not as it was
    """
    asked = _asked(way, terms)
    with ExitStack() as stack:
        if terms.local:
            asked = ["migrate", "--destination", there.vm.qmp, *asked]
        else:
            to = f"{there.host.address}:{PORT}"
            secured = [
                ["--tls", keys[seat.host.address]] if way.tls else ["--insecure"]
                for seat in (here, there)
            ]
            receive = ["receive", "--listen", to, "--destination", there.vm.qmp, *secured[1]]
            receiving = stack.enter_context(_command(there.host, run, *receive))
            await asyncio.to_thread(_said, receiving, "waiting for a VM")
            asked = ["send", "--to", to, *secured[0], *asked]
        sending = stack.enter_context(_command(here.host, run, *asked, "--source", here.vm.qmp))
        attached, words = await asyncio.to_thread(_said, sending, "phase attach")
        said, more = await asyncio.to_thread(sending.communicate)
        report = json.loads(said) if said else {}
        if sending.returncode == _GIVEN_UP and report.get("status") == "aborted":
            raise GivenUp(report["reason"])
        if sending.returncode:
            raise GuestBroken(f"{way}: {report.get('reason') or words + more}")
        if not terms.local:
            _, more = await asyncio.to_thread(receiving.communicate)
            if receiving.returncode:
                raise GuestBroken(f"{way}: the receiver ended with {receiving.returncode}: {more}")
    return Moved(
        began=attached - report["phases"]["preflight"] / 1000,
        total_s=report["total_ms"] / 1000,
        downtime_ms=report["downtime_ms"],
        rounds=len(report["rounds"]),
        ram_bytes=report["bytes_sent"] + (report["qemu_ram_transferred"] or 0),
        throttle_percent=max(r.get("throttle_percent") or 0 for r in report["rounds"]) or None,
    )


def can_throttle() -> bool:
    """Whether the migrator can slow a guest's writes."""
    from migrator.cli.hosts import send

    return any(parameter.name == "throttle" for parameter in send.params)


def _asked(way: Way, terms: Terms) -> list[str]:
    asked = f"--downtime-limit {terms.downtime_ms} --max-rounds 100000 "
    asked += f"--max-seconds {terms.limit_s} --on-limit {'force' if terms.forces else 'abort'}"
    if terms.checked:
        asked += " --verify"
    if way.throttle:
        asked += " --throttle auto"
    return asked.split()


@contextmanager
def _command(host: Host, run: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = host.run(
        [*_PROGRAM, *arguments, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(run)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _said(process: subprocess.Popen[str], words: str) -> tuple[float, str]:
    """When a command said something, in seconds of the monotonic clock, and all until then.

    :raise GuestBroken: it ended without
    """
    said = ""
    assert process.stderr is not None
    for line in iter(process.stderr.readline, ""):
        said += line
        if line.startswith(words):
            return time.monotonic(), said
    raise GuestBroken(f"never said {words!r}: {said}")
