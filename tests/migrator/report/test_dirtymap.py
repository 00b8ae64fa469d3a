"""Where memory was dirty: what is recorded of each round, and what of many."""

from __future__ import annotations

import numpy as np
import pytest

from migrator.migration.account import Account
from migrator.report.dirtymap import REGIONS, Recorder
from migrator.report.phases import Phase
from migrator.report.report import DirtyMap
from tests.tracker import naive
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.memory.ram import RamBlock

HUGE = 2 << 20
BLOCKS = (
    RamBlock("b", 3 * HUGE * 64, HUGE, 0x7000_0000_0000, 1, 2),
    RamBlock("a", 4096 * 1000, 4096, 0x7100_0000_0000, 1, 3),
)
NPAGES = {block.name: block.npages for block in BLOCKS}


def some(seed: int) -> dict[str, set[int]]:
    chooser = np.random.default_rng(seed)
    return {
        name: {int(page) for page in np.flatnonzero(chooser.random(n) < 0.3)}
        for name, n in NPAGES.items()
    }


def bitmaps(pages: dict[str, set[int]]) -> PageSet:
    return PageSet(
        BLOCKS, {n: DirtyBitmap.from_pages(NPAGES[n], sorted(of)) for n, of in pages.items()}
    )


def oracle(drawn: DirtyMap, pages: dict[str, set[int]]) -> list[int]:
    return [
        count
        for block in drawn.blocks
        for count in naive.by_region(pages[block.name], NPAGES[block.name], block.regions)
    ]


def test_rows_are_what_the_oracle_counts() -> None:
    recorder = Recorder(BLOCKS)
    for number in (1, 2, 3):
        recorder.note(number, number / 4, bitmaps(some(number)), later=number > 1)
    drawn = recorder.dirty_map()
    assert [(b.name, b.bytes, b.page_size) for b in drawn.blocks] == [
        ("a", 4096 * 1000, 4096),
        ("b", 3 * HUGE * 64, HUGE),
    ]
    # shares of the memory; but no more than there are pages, and one at least
    assert [b.regions for b in drawn.blocks] == [3, 192]
    assert [r.dirty_pages for r in drawn.rows] == [oracle(drawn, some(n)) for n in (1, 2, 3)]
    assert [(r.first_round, r.last_round, r.began_s) for r in drawn.rows] == [
        (1, 1, 0.25),
        (2, 2, 0.5),
        (3, 3, 0.75),
    ]
    assert [r.guest_stood for r in drawn.rows] == [False, True, True]
    assert recorder.dirty_map() == drawn  # once more: nothing is counted twice


def test_one_block_has_all_regions() -> None:
    block = RamBlock("ram", 1 << 30, 4096, 0x7000_0000_0000, 1, 2)
    (found,) = Recorder([block]).dirty_map().blocks
    assert found.regions == REGIONS


@pytest.mark.parametrize("rounds", [8, 9, 100, 1001])
def test_many_rounds_take_no_more_room_and_hide_nothing(rounds: int) -> None:
    recorder = Recorder(BLOCKS, rows=8)
    for number in range(1, rounds + 1):
        recorder.note(number, float(number), bitmaps(some(number % 7)), later=False)
    drawn = recorder.dirty_map()
    assert len(drawn.rows) <= 8
    assert [r.first_round for r in drawn.rows] == [
        1,
        *(r.last_round + 1 for r in drawn.rows[:-1]),
    ]
    assert drawn.rows[-1].last_round == rounds
    for row in drawn.rows:
        numbers = range(row.first_round, row.last_round + 1)
        counts = [oracle(drawn, some(number % 7)) for number in numbers]
        assert row.dirty_pages == np.max(counts, axis=0).tolist()
        assert row.began_s == row.first_round


def test_nothing_is_counted_while_the_guest_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    account, none = Account(), PageSet.empty(BLOCKS)
    account.of(BLOCKS, dirty_map=True)

    def by_region(pages: DirtyBitmap, regions: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        counted.append(regions)
        return np.array(naive.by_region(naive.pages_of(pages.words), pages.npages, regions))

    monkeypatch.setattr("tracker.bits.regions.by_region", by_region)
    account.phases.enter(Phase.ROUNDS)
    account.begin_by_comparison(none, none)
    account.note_dirty(bitmaps(some(1)))
    assert counted == [3, 192]
    account.phases.enter(Phase.FINAL_COLLECT)
    account.begin_by_comparison(none, none)
    account.note_dirty(bitmaps(some(2)))
    assert counted == [3, 192]
    account.phases.enter(Phase.FINISH)
    account.finish("completed", "")
    drawn = account.report.dirty_map
    assert drawn is not None
    assert [r.dirty_pages for r in drawn.rows] == [oracle(drawn, some(n)) for n in (1, 2)]


def test_nothing_is_kept_that_was_not_asked_for() -> None:
    account = Account()
    account.of(BLOCKS)
    account.note_dirty(bitmaps(some(1)))
    account.finish("completed", "")
    assert account.report.dirty_map is None
