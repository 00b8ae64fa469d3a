"""Soft-dirty bits as a source, where they are refused. That they work: tests/lab/inside."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.live.tracked import HUGE, PAGE, Tracked, ext4, huge_tmpfs, hugetlbfs, tmpfs, tracked
from tracker.errors import NotTracking, SourceError
from tracker.sources import softdirty
from tracker.sources.pagemap import soft_dirty_missing
from tracker.sources.softdirty import SoftDirty

pytestmark = pytest.mark.live


def refused(child: Tracked) -> str:
    """Why a source does not start; and that it has let go of everything then."""
    before = set(os.listdir("/proc/self/fd"))
    source = SoftDirty(child.pid, [child.block])
    with pytest.raises(NotTracking) as caught:
        source.start()
    assert set(os.listdir("/proc/self/fd")) == before
    source.stop()
    assert caught.value.source == "soft-dirty"
    return caught.value.reason


def test_a_kernel_without_it_is_refused() -> None:
    """One that is not noticed calls every page clean."""
    with tracked(tmpfs, 64) as child:
        if missing := soft_dirty_missing():
            assert missing == "not in this kernel: a page that was written is not soft-dirty"
            assert refused(child) == missing
        else:
            source = SoftDirty(child.pid, [child.block])
            source.start()
            source.stop()


@pytest.mark.parametrize(
    ("file_system", "page_size", "reason"),
    [
        pytest.param(ext4, PAGE, "on ext4: written back, a page loses its bit", id="ext4"),
        pytest.param(huge_tmpfs, PAGE, "may be made huge pages", id="tmpfs, huge=advise"),
        pytest.param(hugetlbfs, HUGE, "has huge pages, which have no bits", id="hugetlbfs"),
    ],
)
def test_memory_that_loses_its_bits_is_refused(
    file_system: Any, page_size: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softdirty, "soft_dirty_missing", lambda: "")
    manager: AbstractContextManager[Tracked] = tracked(file_system, 4, page_size)
    with manager as child:
        assert reason in refused(child)


def test_swap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softdirty, "soft_dirty_missing", lambda: "")
    swaps = tmp_path / "swaps"
    header = "Filename\tType\tSize\tUsed\tPriority\n"
    swaps.write_text(f"{header}/dev/vdb partition 1000 0 -2\n")
    monkeypatch.setattr(softdirty, "SWAPS", swaps)
    with tracked(tmpfs, 4) as child:
        assert "there is swap" in refused(child)
        swaps.write_text(header)
        source = SoftDirty(child.pid, [child.block])
        source.start()
        # and when it is turned on later, nothing is concluded any more
        swaps.write_text(f"{header}/dev/vdb partition 1000 0 -2\n")
        with pytest.raises(SourceError, match="there is swap"):
            source.collect()
        source.stop()


def test_forced_huge_pages_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softdirty, "soft_dirty_missing", lambda: "")
    setting = tmp_path / "shmem_enabled"
    setting.write_text("always within_size advise never deny [force]\n")
    monkeypatch.setattr(softdirty, "SHMEM_HUGE", setting)
    with tracked(tmpfs, 4) as child:
        assert "is force" in refused(child)


def test_a_process_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softdirty, "soft_dirty_missing", lambda: "")
    with tracked(tmpfs, 4) as child:
        source = SoftDirty(child.pid, [child.block])
        source.start()
        child.kill()
        with pytest.raises(SourceError) as caught:
            source.collect()
        assert not isinstance(caught.value, NotTracking)
        source.stop()
