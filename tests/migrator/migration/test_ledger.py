"""No page that was written is in none of the ledger's places before it is delivered."""

from __future__ import annotations

import random

import pytest

from migrator.migration.ledger import Ledger
from migrator.migration.rate import Rate
from tests.pagesets import block
from tests.tracker import naive
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet

NPAGES = 100
BLOCKS = [block("ram", NPAGES)]


def of(pages: set[int]) -> PageSet:
    return PageSet(BLOCKS, {"ram": DirtyBitmap.from_pages(NPAGES, sorted(pages))})


def back(pages: PageSet) -> set[int]:
    return naive.pages_of(pages["ram"].words)


@pytest.mark.parametrize("seed", range(20))
def test_each_page_is_delivered_in_the_end(seed: int) -> None:
    """Rounds as they come: some pages wait, some sendings deliver half of what they were given."""
    choose = random.Random(seed)
    ledger, lacking = Ledger(BLOCKS), set[int]()
    for _ in range(10):
        written = set(choose.sample(range(NPAGES), choose.randrange(NPAGES // 2)))
        lacking |= written
        waiting = set(choose.sample(sorted(written), len(written) // 3))
        left = set(choose.sample(sorted(waiting), len(waiting) // 2))
        dirty = ledger.take(of(written), of(waiting), of(left))
        assert back(dirty) == lacking
        assert (back(ledger.waiting), back(ledger.left), back(ledger.owed)) == (
            waiting,
            left,
            set(),
        )
        sent = back(dirty) - waiting
        lost = set(choose.sample(sorted(sent), len(sent) // 2)) if choose.random() < 0.5 else set()
        ledger.owe(of(lost))
        lacking -= sent - lost
    assert back(ledger.take(of(set()))) == lacking
    assert back(ledger.take(of(set()))) == set()


def test_what_is_taken_is_the_callers() -> None:
    ledger = Ledger(BLOCKS)
    ledger.owe(of({1}))
    dirty = ledger.take(of({2}), of({2}))
    dirty["ram"].set_all()
    assert back(ledger.owed) == set()
    assert back(ledger.waiting) == {2}
    assert back(ledger.take(of(set()))) == {2}


def test_what_is_protected_waits_no_more() -> None:
    ledger = Ledger(BLOCKS)
    ledger.take(of({1, 2}), of({1, 2}), of({2}))
    ledger.protected()
    assert back(ledger.waiting) == back(ledger.left) == set()
    assert back(ledger.take(of(set()))) == set()


def test_a_rate_of_each_sending_half_of_the_next() -> None:
    rate = Rate()
    assert (rate.measured, rate.bytes_per_s > 0) == (0.0, True)
    rate.note(1000, 1.0)  # little, but all there is
    assert rate.bytes_per_s == rate.measured == 1000
    rate.note(1000, 100.0)
    assert rate.measured == 1000
    rate.note(8 << 20, 1.0)
    assert rate.measured == pytest.approx((500 + (8 << 20)) / 1.5)
    before = rate.measured
    rate.forget()
    assert rate.measured == before
    rate.note(4 << 20, 2.0)
    assert rate.measured == 2 << 20
