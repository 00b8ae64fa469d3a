"""Moving a guest with QEMU's own migration."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.hosts.worker import PORT
from bench.moving.journey import Seat
from bench.moving.ways import GivenUp, GuestBroken, Moved, Terms, Way
from migrator.errors import QmpUnreachable, VmError
from migrator.qemu.qmp import Qmp

_FORCED_MS = 1_000_000
_UNLIMITED = 100 << 30  # bytes a second
_TLS_ID = "tls"
_SETTLED_S = 10.0


async def move(here: Seat, there: Seat, way: Way, terms: Terms, keys: Mapping[str, Path]) -> Moved:
    """Move the guest.

    :param keys: directories with keys under the names that QEMU looks for, by address of the host
    :raise GivenUp: it did not converge
    :raise GuestBroken: it did not arrive
    """
    uri = f"tcp:{there.host.address}:{PORT}"
    if terms.local:
        uri = f"unix:{there.vm.qmp}.migration"
    async with here.qmp() as source, there.qmp() as destination:
        for qmp, seat, end in ((source, here, "client"), (destination, there, "server")):
            await _set_up(qmp, way, terms, seat.side.ram.stat().st_size)
            if way.tls:
                await _secure(qmp, keys[seat.host.address], end, there.host.address)
        await destination.execute("migrate-incoming", uri=uri)
        marks = source.mark(), destination.mark()
        began = time.monotonic()
        await source.execute("migrate", uri=uri)
        await _completed(source, marks[0], way, terms)
        said = await _summed_up(source)
        stopped = source.seen("STOP", since=marks[0])
        assert stopped is not None
        ended = await destination.wait_for(
            lambda e: e.name == "RESUME",
            since=marks[1],
            timeout_s=terms.limit_s,
        )
        return Moved(
            began=began,
            total_s=said["total-time"] / 1000,
            downtime_ms=(ended.at - stopped.at) * 1000,
            rounds=said["ram"]["dirty-sync-count"],
            ram_bytes=said["ram"]["transferred"],
            throttle_percent=said.get("cpu-throttle-percentage"),
        )


async def _set_up(qmp: Qmp, way: Way, terms: Terms, ram_bytes: int) -> None:
    # also what is not wanted: an earlier migration of the same QEMU may have left it
    await qmp.set_capabilities(
        {
            "events": True,
            "x-ignore-shared": False,
            "pause-before-switchover": False,
            "multifd": bool(way.multifd),
            "xbzrle": way.xbzrle,
            "auto-converge": way.auto_converge,
        }
    )
    parameters = {
        "max_bandwidth": _UNLIMITED,
        "downtime_limit": round(terms.downtime_ms),
        # all of it, as far as a power of two can
        "xbzrle_cache_size": 1 << (ram_bytes.bit_length() - 1),
    }
    if way.auto_converge:
        # its defaults, 20 and 10, take half a minute
        parameters |= {"cpu_throttle_initial": 50, "cpu_throttle_increment": 20}
    if way.multifd:
        parameters["multifd_channels"] = way.multifd
    await qmp.execute("migrate-set-parameters", **parameters)


async def _secure(qmp: Qmp, keys: Path, end: str, hostname: str) -> None:
    await qmp.execute(
        "object-add",
        qom_type="tls-creds-x509",
        id=_TLS_ID,
        dir=str(keys),
        endpoint=end,
        verify_peer=True,
    )
    await qmp.execute("migrate-set-parameters", tls_creds=_TLS_ID, tls_hostname=hostname)


async def _completed(source: Qmp, since: int, way: Way, terms: Terms) -> None:
    """Wait for the end; see to it that there is one."""

    async def wait(*wanted: str, limit_s: float = terms.limit_s) -> str:
        event = await source.migration_status(*wanted, since=since, timeout_s=limit_s)
        return str(event.data["status"])

    try:
        status = await wait("completed")
    except QmpUnreachable:
        if terms.forces:
            await source.execute("migrate-set-parameters", downtime_limit=_FORCED_MS)
            status = await wait("completed")
        else:
            try:
                await source.execute("migrate_cancel")
                status = await wait("completed", "cancelled", limit_s=_SETTLED_S)
            except VmError as error:
                raise GuestBroken(f"{way}: cannot be called off: {error}") from error
            if status == "cancelled":
                raise GivenUp(f"not converged after {terms.limit_s:g} s") from None
    if status != "completed":
        said = await source.migration()
        raise GuestBroken(f"{way}: {said.get('error-desc') or said['status']}")


async def _summed_up(source: Qmp) -> dict[str, Any]:
    """What QEMU says of a migration; the event that it has completed comes before the times do."""
    deadline = time.monotonic() + _SETTLED_S
    while not (said := await source.migration()).get("total-time"):
        if time.monotonic() > deadline:
            raise GuestBroken("QEMU does not say how long it took")
        await asyncio.sleep(0.01)
    return said


def keys_for_qemu(keys: Path) -> Path:
    """Copy a host's keys to where, and under the names that, QEMU looks (docs/system/tls.rst).

    :return: the directory
    """
    directory = keys / "qemu"
    directory.mkdir()
    shutil.copy(keys / "ca.crt", directory / "ca-cert.pem")
    for end in ("client", "server"):
        shutil.copy(keys / "host.crt", directory / f"{end}-cert.pem")
        shutil.copy(keys / "host.key", directory / f"{end}-key.pem")
    return directory
