"""The probe of answered faults: passed by this kernel, and failed by what does not report."""

from __future__ import annotations

import pytest

from tests.conftest import require
from tracker.answered.uffdsync import UffdSync
from tracker.bits.pageset import PageSet
from tracker.errors import NotTracking
from tracker.probe import answering
from tracker.probe.answering import check_answering


def _missing() -> str | None:
    try:
        check_answering()
    except NotTracking as error:
        return error.reason
    return None


@pytest.fixture(autouse=True)
def _able() -> None:
    require(_missing())


def test_this_kernel_is_able() -> None:
    check_answering()


def test_a_page_that_is_missed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(UffdSync):
        def collect(self) -> PageSet:
            found = super().collect()
            found["probe"].words[-1] = 0
            return found

    monkeypatch.setattr(answering, "UffdSync", Forgetful)
    with pytest.raises(NotTracking, match="misses page"):
        check_answering()


def test_calling_everything_written_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Generous(UffdSync):
        def collect(self) -> PageSet:
            return PageSet.full(super().collect().blocks)

    monkeypatch.setattr(answering, "UffdSync", Generous)
    with pytest.raises(NotTracking, match="everything"):
        check_answering()


def test_nowhere_to_try() -> None:
    with pytest.raises(NotTracking):
        check_answering("/no/such/directory")
