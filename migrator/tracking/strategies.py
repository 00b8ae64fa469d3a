"""The ways to notice what a VM writes, by the names that a watch has for them."""

from __future__ import annotations

from collections.abc import Sequence

from migrator.errors import Finding
from tracker.answered.uffdsync import CHUNK, UffdSync
from tracker.errors import NotTracking
from tracker.memory.ram import RamBlock
from tracker.probe.answering import check_answering
from tracker.probe.probe import check_tracking
from tracker.sources.coarse import Compared
from tracker.sources.contenthash import ContentHash
from tracker.sources.pagemap import soft_dirty_missing
from tracker.sources.softdirty import SoftDirty
from tracker.sources.source import DirtySource
from tracker.sources.uffd import UffdAsync

COARSE = "coarse"
STRATEGIES = (UffdAsync.name, UffdSync.name, SoftDirty.name, ContentHash.name, COARSE)

_READING = {
    ContentHash.name: "content-hash reads all memory that holds data at each look, twice a second "
    "or as often as it can; a write that leaves a page as it was is none",
    COARSE: "coarse reads all memory that holds data once, then the chunks of it that are written; "
    "a write that leaves a page as it was is none",
}


_TRACKERS = {UffdAsync.name: check_tracking, UffdSync.name: check_answering}


def choose_tracker(wanted: str) -> tuple[str, list[Finding]]:
    """Find the first source of CPU writes that works, or why none does.

    :param wanted: its name, or ``auto``
    """
    findings = []
    for name, check in _TRACKERS.items():
        if wanted not in (name, "auto"):
            continue
        try:
            check()
        except NotTracking as error:
            findings.append(
                Finding(
                    "kernel",
                    f"it does not track writes as it has to ({name}): {error.reason}",
                    "migrator doctor tells more; a kernel that behaves is needed (6.7 or newer)",
                )
            )
        else:
            return name, []
    return "", findings


def choose_strategy(
    wanted: str, blocks: Sequence[RamBlock]
) -> tuple[str, list[str], list[Finding]]:
    """Find out whether a strategy can be had here, by trying it where the kernel has a say.

    :param wanted: one of :data:`STRATEGIES`, or ``auto``: the first of the first two that works
    :return: which it is, what has to be known about it, and why it cannot be had
    """
    fileless = [block.name for block in blocks if not block.has_file]
    if fileless and wanted == "auto":
        wanted = UffdAsync.name
    if fileless and wanted != UffdAsync.name:
        return "", [], [_no_file(wanted, fileless)]
    if wanted == SoftDirty.name:
        return wanted, [], _soft_dirty_findings()
    if wanted == ContentHash.name:
        return wanted, [_READING[wanted]], []
    if wanted == COARSE:
        _, unable = choose_tracker(UffdSync.name)
        return wanted, [_READING[wanted]], unable
    name, unable = choose_tracker(wanted)
    return name, [], unable


def cpu_source(
    strategy: str,
    pid: int,
    blocks: Sequence[RamBlock],
    *,
    chunk: int = CHUNK,
    copied: bool = False,
) -> DirtySource:
    """Make the source of a strategy.

    :param chunk: bytes that a fault opens, where faults are answered
    :param copied: whether somebody copies the pages, and tells those that compare with copies
    """
    if strategy == UffdAsync.name:
        return UffdAsync(pid, blocks)
    if strategy == SoftDirty.name:
        return SoftDirty(pid, blocks)
    if strategy == ContentHash.name:
        return ContentHash(pid, blocks, copied=copied)
    source = UffdSync(pid, blocks, chunk=chunk)
    return source if strategy == UffdSync.name else Compared(source, pid, blocks, copied=copied)


def _no_file(wanted: str, fileless: Sequence[str]) -> Finding:
    return Finding(
        "strategy",
        f"{wanted} needs RAM that is a shared file, which {', '.join(map(repr, fileless))} is not",
        f"take --strategy {UffdAsync.name}, which does not; or start QEMU with "
        "memory-backend-file,share=on",
    )


def _soft_dirty_findings() -> list[Finding]:
    missing = soft_dirty_missing()
    if not missing:
        return []
    return [
        Finding(
            "strategy",
            f"{SoftDirty.name}: {missing}",
            f"take --strategy {UffdAsync.name} (Linux 6.7), {UffdSync.name} (5.19) or "
            f"{ContentHash.name} (any); or a kernel with CONFIG_MEM_SOFT_DIRTY, as Debian's",
        )
    ]
