"""Block jobs and exports of the source: its own migration does not survive them.

A mirror that is under way when the images are given up ends in a failed assertion of QEMU 7.2 (the
job writes to an image that is inactive), stays unfinished in 10.0; a backup or an export that may
write fails the migration once all of it was copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from migrator.errors import Finding
from migrator.qemu.qmp import Qmp

_HARMLESS = ("concluded", "null")  # QAPI: JobStatus


async def job_findings(source: Qmp) -> list[Finding]:
    """Jobs and exports that are in the way of a migration now; each with the command to end it.

    :raise VmError: QEMU does not answer
    """
    return findings(
        await source.execute("query-jobs"),
        await source.execute("query-block-jobs"),
        await source.execute("query-block-exports"),
    )


def findings(
    jobs: Iterable[Mapping[str, Any]],
    block_jobs: Iterable[Mapping[str, Any]],
    exports: Iterable[Mapping[str, Any]],
) -> list[Finding]:
    """The same, told from QEMU's answers.

    :param jobs: of ``query-jobs``; likewise the others
    """
    under_way = {
        str(job["id"]): str(job["type"]) for job in jobs if job.get("status") not in _HARMLESS
    }
    under_way |= {
        str(job["device"]): str(job["type"])
        for job in block_jobs
        if job.get("status") not in _HARMLESS
    }
    found = [
        Finding(
            "block job",
            f"the source has a job {name!r} ({kind}) under way on its disks",
            f"wait until it has ended, or end it with block-job-cancel device={name}",
        )
        for name, kind in under_way.items()
    ]
    found += [
        Finding(
            "block export",
            f"the source exports its disk {export.get('node-name')!r} ({export.get('type')}, "
            f"{export['id']!r})",
            f"end the export with block-export-del id={export['id']}",
        )
        for export in exports
        if not export.get("shutting-down")
    ]
    return found
