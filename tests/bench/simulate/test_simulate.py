"""Simulated migrations: what holds for every one of them, and what recorded guests become."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from bench.cli.main import main
from bench.simulate.costs import Costs
from bench.simulate.replay import Replay
from bench.simulate.run import Outcome, migrate
from migrator.choices import PolicyName
from migrator.policy.downtime import Fixed
from migrator.policy.judge import Limits
from migrator.policy.policies import policy_of
from migrator.report.report import Report, Round
from migrator.watch.trace import Block, Header, Record, Trace, Writer
from tests.pagesets import page_set
from tests.profiles import examples
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet

PAGE = 4096
NPAGES = 16_384
MIB = float(1 << 20)
HEADER = Header((Block("ram", NPAGES * PAGE, PAGE),), 0.05, "uffd", "7.2.0")
LIMITS = Limits(downtime_ms=100.0, max_rounds=30)
FREE = Costs(Fixed(0.0, 0.0, 0.0, 0.0, 0.0), 0.1, 0.1, 0.0, read_bytes_per_s=1e15)
"""Nearly nothing but the pages takes time."""


def walked(pages: int, pages_per_s: float, seconds: float = 4.0, every_s: float = 0.05) -> Trace:
    """A guest that writes the first so many pages in order, over and over."""
    ends = np.arange(1, round(seconds / every_s) + 1) * every_s
    records = []
    for end in ends:
        steps = np.arange(round((end - every_s) * pages_per_s), round(end * pages_per_s))
        written = np.unique(steps[-pages:] % pages).astype(np.uint32)
        records.append(Record(float(end), {"ram": BitMap(written)}))
    data, zeros = DirtyBitmap.empty(NPAGES), DirtyBitmap.empty(NPAGES)
    data.set_range(0, NPAGES // 2)
    zeros.set_range(NPAGES // 4, NPAGES // 2)
    zeros = zeros - DirtyBitmap.from_pages(NPAGES, np.arange(pages))
    return Trace(HEADER, page_set({"ram": data}), page_set({"ram": zeros}), tuple(records))


def write(path: Path, trace: Trace) -> None:
    with path.open("wb") as file:
        writer = Writer(file, trace.header, trace.data, trace.zeros)
        for record in trace.records:
            pages = DirtyBitmap.from_pages(NPAGES, list(record.written["ram"]))
            writer.append(record.until_s, page_set({"ram": pages}))


def run(
    guest: Replay,
    policy: PolicyName,
    mib_per_s: float,
    limits: Limits = LIMITS,
    costs: Costs = FREE,
) -> Outcome:
    return migrate(guest, policy_of(policy, limits, Fixed()), mib_per_s * MIB, costs)


def moved(
    trace: Trace, mib_per_s: float, policy: PolicyName = "send-all", costs: Costs = FREE
) -> Outcome:
    return run(Replay(trace), policy, mib_per_s, costs=costs)


# -- what a recording becomes ---------------------------------------------------------------------

TRACE = walked(500, 3000.0)


@given(st.floats(0, 12), st.floats(1e-4, 6), st.floats(1e-4, 6))
def test_every_write_of_a_time_is_in_one_of_its_parts(
    start: float, first: float, then: float
) -> None:
    guest = Replay(TRACE)
    middle, end = start + first, start + first + then
    whole = guest.written(start, end)["ram"]
    parts = guest.written(start, middle)["ram"] | guest.written(middle, end)["ram"]
    assert (whole - parts).count() <= 1  # rounding, at a page's very moment
    assert (parts - whole).count() <= 1


@pytest.mark.parametrize("seconds", [0.004, 0.02, 0.05, 0.13])
@pytest.mark.parametrize("at", [0.0, 1.013, 3.99, 7.77])
def test_a_part_of_an_interval_holds_its_share(seconds: float, at: float) -> None:
    """Pages come evenly; and those that are written in each interval, always."""
    steady = Replay(walked(2000, 20_000.0)).written(at, at + seconds)["ram"]
    assert steady.count() == pytest.approx(min(20_000.0 * seconds, 2000), rel=0.15, abs=8)
    hot = Replay(walked(50, 20_000.0)).written(at, at + seconds)["ram"]
    assert hot.count() == 50


@pytest.mark.parametrize("times", [2, 3.5])
def test_more_memory_is_tiled(times: float) -> None:
    memory = round(times * NPAGES) * PAGE
    small, large = Replay(TRACE), Replay(TRACE, memory)
    same = Replay(TRACE, memory, scale_writes=False)
    assert sum(b.size for b in large.blocks) == memory
    for ours, theirs in (
        (small.data, large.data),
        (small.zeros, large.zeros),
        (small.written(0.3, 0.9), large.written(0.3, 0.9)),
    ):
        once, tiled = _pages(ours["ram"]), _pages(theirs["ram"])
        assert (tiled == np.resize(once, len(tiled))).all()
    first = _pages(same.written(0.3, 0.9)["ram"])
    assert (first[:NPAGES] == _pages(small.written(0.3, 0.9)["ram"])).all()
    assert not first[NPAGES:].any()
    assert same.data == large.data


def test_blocks_of_no_whole_words_are_tiled_too() -> None:
    header = Header((Block("ram", 70 * PAGE, PAGE),), 0.05, "uffd", "7.2.0")
    data = page_set({"ram": DirtyBitmap.from_pages(70, [0, 3, 69])})
    none = page_set({"ram": DirtyBitmap.empty(70)})
    large = Replay(Trace(header, data, none, (Record(1.0, {"ram": BitMap([69])}),)), 175 * PAGE)
    assert np.flatnonzero(_pages(large.data["ram"])).tolist() == [0, 3, 69, 70, 73, 139, 140, 143]
    assert np.flatnonzero(_pages(large.written(0.0, 5.0)["ram"])).tolist() == [69, 139]


def _pages(bitmap: DirtyBitmap) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    bits = np.unpackbits(bitmap.words.view(np.uint8), bitorder="little")
    assert not bits[bitmap.npages :].any()
    return bits[: bitmap.npages]


def test_less_memory_or_no_record_is_refused() -> None:
    with pytest.raises(ValueError, match="are less"):
        Replay(TRACE, 4096 * PAGE)
    with pytest.raises(ValueError, match="nothing was recorded"):
        Replay(Trace(HEADER, TRACE.data, TRACE.zeros, ()))


# -- whole migrations -----------------------------------------------------------------------------


def test_a_guest_that_does_not_write_costs_its_data_and_the_fixed_times() -> None:
    """Half of the memory is data, half of that zeros."""
    idle = Trace(HEADER, *_half(), (Record(1.0, {"ram": BitMap()}),))
    costs = Costs(Fixed(40.0, 1.0, 2.0, 3.0, 4.0), 0.0, 0.0, 0.0, read_bytes_per_s=1e15)
    report = moved(idle, 100.0, costs=costs).report
    assert report.bytes_sent == NPAGES // 4 * PAGE
    assert report.pages_sent == NPAGES
    assert report.downtime_ms == pytest.approx(10.0)
    assert report.total_ms == pytest.approx(report.bytes_sent / MIB * 10 + 50.0)
    assert report.phases["copy"] == pytest.approx(report.bytes_sent / MIB * 10)


def _half() -> tuple[PageSet, PageSet]:
    trace = walked(0, 0.0, 0.1)
    return trace.data, trace.zeros


def test_a_walker_over_a_link_as_fast_as_it_is_arithmetic() -> None:
    """Each round is as long as what was written in the one before takes: a part of it."""
    trace = walked(4000, 2560.0)  # 10 MiB/s
    report = moved(trace, 50.0).report
    copy_s = report.bytes_sent / MIB / 50
    copied = report.rounds[0].sent_bytes / MIB / 50
    first = report.rounds[1].dirty_pages
    assert first == pytest.approx(copied * 2560, rel=0.02)
    assert report.rounds[2].dirty_pages == pytest.approx(first / 5, rel=0.05)
    assert report.downtime_ms == pytest.approx(
        1000 * report.final_pages * PAGE / (50 * MIB) + 0.2, rel=0.02
    )
    assert copy_s > copied


@settings(deadline=None, max_examples=examples(40))
@given(
    st.integers(1, 8000),
    st.sampled_from([100.0, 1e3, 1e4, 1e5]),
    st.floats(20, 2000),
    st.floats(1.2, 10),
)
def test_a_slower_link_never_sends_less_nor_is_sooner_done(
    pages: int, pages_per_s: float, mib_per_s: float, times: float
) -> None:
    """If all is sent, and it converges either way."""
    trace = walked(pages, pages_per_s, seconds=1.0)
    slow, fast = (moved(trace, mib_per_s * t).report for t in (1.0, times))
    assume(slow.status == "completed")
    assert fast.status == "completed"
    assert fast.total_ms <= slow.total_ms
    # in less time less is written; but one round less may leave more for the end
    assert fast.bytes_sent - fast.rounds[-2].sent_bytes <= slow.bytes_sent


@pytest.mark.parametrize("policy", ["send-all", "skip-unchanged"])
def test_more_memory_over_a_link_that_is_faster_in_proportion(policy: PolicyName) -> None:
    """Is the same migration, four times as large; only what waits depends on numbers of pages."""
    trace = walked(6000, 30_000.0)
    small = run(Replay(trace), policy, 300).report
    large = run(Replay(trace, 4 * NPAGES * PAGE), policy, 1200)
    assert large.report.bytes_sent == pytest.approx(4 * small.bytes_sent, rel=0.03)
    assert large.report.downtime_ms == pytest.approx(small.downtime_ms, rel=0.05)
    assert len(large.report.rounds) == len(small.rounds)


def test_writes_that_do_not_scale_are_less() -> None:
    trace = walked(6000, 30_000.0)
    memory = 8 * NPAGES * PAGE
    scaled, same = (
        run(Replay(trace, memory, scale_writes=scale), "send-all", 400) for scale in (True, False)
    )
    assert not scaled.converges
    assert same.converges
    assert same.report.rounds[0].sent_bytes == scaled.report.rounds[0].sent_bytes


def test_what_does_not_converge_is_said_to_in_the_policys_words() -> None:
    outcome = moved(walked(8000, 1e6), 100.0)
    assert not outcome.converges
    assert outcome.report.status == "aborted"
    assert "does not converge" in outcome.report.reason
    assert outcome.report.downtime_ms is None
    assert outcome.report.predicted_downtime_ms == pytest.approx(8000 * PAGE / MIB * 10, rel=0.05)


def test_forced_is_not_converged() -> None:
    limits = Limits(100.0, 5, on_limit="force")
    trace = walked(8000, 1e6)
    outcome = run(Replay(trace), "send-all", 100, limits)
    assert outcome.report.status == "completed"
    assert not outcome.converges
    assert outcome.report.downtime_ms == pytest.approx(8000 * PAGE / MIB * 10, rel=0.05)


def test_what_waits_is_not_lost() -> None:
    """All that was ever written since the copy is sent at the end, or before."""
    report = moved(walked(3000, 3e5), 400.0, "adaptive").report
    assert report.status == "completed"
    assert report.final_pages == 3000


def test_a_limit_of_the_rate_lets_a_pause_be_made_up_for() -> None:
    """As it really does: after a pause, what is sent in so long a time passes at once."""
    trace = walked(4000, 8000.0)
    paused = replace(FREE, fixed=Fixed(40.0, 0.0, 0.0, 0.0, 0.0))
    usual, bursts = (
        moved(trace, 100.0, costs=replace(paused, burst_s=s)).report for s in (0.0, 0.01)
    )
    final_ms = usual.final_pages * PAGE / MIB * 10
    assert final_ms > 10
    assert usual.phases["final-send"] == pytest.approx(final_ms)
    assert bursts.phases["final-send"] == pytest.approx(
        bursts.final_pages * PAGE / MIB * 10 - 10, abs=0.2
    )


def test_what_passes_faster_after_a_pause_is_not_taken_for_the_rate() -> None:
    report = moved(walked(2000, 25_000.0), 100.0, costs=Costs(burst_s=0.02)).report
    *_, last = (r for r in report.rounds if r.decision)
    assert any(r.send_ms < r.sent_bytes / MIB * 10 - 5 for r in report.rounds[1:-2])
    assert report.predicted_downtime["final-send"] >= last.dirty_bytes / MIB * 10 * 0.999


# -- costs ----------------------------------------------------------------------------------------

MEASURED = Report(
    status="completed",
    guest_bytes=1 << 30,
    phases={
        "copy": 1000.0,
        "rounds": 330.0,
        "switchover": 20.0,
        "stop": 1.0,
        "device-state": 2.0,
        "load": 3.0,
        "resume": 4.0,
    },
    rounds=[
        Round(0, {}, {}, 0, sent_pages=1, sent_bytes=100_000_000, send_ms=1000.0),
        Round(1, {}, {}, 0, sent_pages=1, sent_bytes=20_000_000, send_ms=204.0, collect_ms=9.0),
        Round(2, {}, {}, 0, sent_pages=1, sent_bytes=10_000_000, send_ms=104.0, collect_ms=9.0),
        Round(
            3,
            {},
            {},
            0,
            sent_pages=1,
            sent_bytes=1_000_000,
            send_ms=14.0,
            collect_ms=2.5,
            merge_ms=0.5,
        ),
        Round(4, {}, {}, 0, sent_pages=1, send_ms=4.0, collect_ms=3.0),
    ],
)


def test_costs_as_a_migration_measured_them() -> None:
    costs = Costs.of(MEASURED)
    assert costs.fixed == Fixed(20.0, 1.0, 2.0, 3.0, 4.0)
    assert costs.round_ms == pytest.approx((330 - 308) / 2)
    assert costs.collect_ms == pytest.approx(3.0)
    assert costs.send_ms == pytest.approx(4.0)
    limited = Costs.of(MEASURED, MEASURED, burst_s=0.005)
    assert (limited.burst_s, limited.round_ms) == (0.005, costs.round_ms)
    assert limited.send_ms == pytest.approx(9.0)  # 4 ms more than what was not made up for
    paused = Costs.of(MEASURED, burst_s=1.0)
    assert paused.send_ms == pytest.approx(14.5)  # before a round it was not that long a pause
    larger = costs.at(11 << 30)
    assert larger.collect_ms == pytest.approx(3.0 + 4.6)
    assert larger.round_ms == pytest.approx(11.0 + 4.6)
    with pytest.raises(ValueError, match="completed"):
        Costs.of(Report())


# -- the command ----------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    trace, like, file = (tmp_path / name for name in ("a.trace", "report.json", "plans.json"))
    write(trace, walked(2000, 5000.0))
    like.write_text(f"phase copy\n{MEASURED.to_json()}\n")
    arguments = [
        *["simulate", str(trace), "--link", "100", "--link", "10Gbit/s", "--like", str(like)],
        *["--policy", "send-all", "--policy", "adaptive", "--json", str(file)],
        *["--memory", "1G"],
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    said = json.loads(file.read_text())
    assert said["trace"]["written_bytes_per_s"] == pytest.approx(5000 * PAGE, rel=0.01)
    assert [(p["policy"], p["link_bytes_per_s"]) for p in said["plans"]] == [
        ("send-all", 100 * MIB),
        ("adaptive", 100 * MIB),
        ("send-all", 1.25e9),
        ("adaptive", 1.25e9),
    ]
    # 16 tiles of 20 MiB/s each
    assert [p["converges"] for p in said["plans"]] == [False, False, True, True]
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4
    # the measured switchover, and two readings, are in every downtime
    assert min(p["downtime_ms"] for p in said["plans"]) > 10.0 + 2 * 3.0


def test_the_command_slows_what_would_not_converge(tmp_path: Path) -> None:
    trace, file = tmp_path / "a.trace", tmp_path / "plans.json"
    write(trace, walked(8000, 100_000.0))
    plans = []
    for throttle in ("off", "90%"):
        asked = ["simulate", str(trace), "--link", "100", "--policy", "adaptive"]
        done = CliRunner().invoke(main, [*asked, "--throttle", throttle, "--json", str(file)])
        assert done.exit_code == 0, done.output
        plans += json.loads(file.read_text())["plans"]
    assert [plan["converges"] for plan in plans] == [False, True]


def test_a_recording_that_was_cut_off_is_used_with_a_warning(tmp_path: Path) -> None:
    trace = tmp_path / "cut.trace"
    write(trace, walked(2000, 5000.0))
    content = trace.read_bytes()
    trace.write_bytes(content[:-3])
    done = CliRunner().invoke(main, ["simulate", str(trace), "--link", "100"])
    assert done.exit_code == 0, done.output
    assert "cut off in its last record" in done.stderr
    trace.write_bytes(content[:40])
    done = CliRunner().invoke(main, ["simulate", str(trace)])
    assert done.exit_code == 1
    assert "ends before its first record" in done.stderr


@pytest.mark.parametrize("rate", ["0", "fast", "10Gbit", "-3", "1.2.3"])
def test_links_that_are_none(tmp_path: Path, rate: str) -> None:
    done = CliRunner().invoke(main, ["simulate", str(tmp_path / "none"), "--link", rate])
    assert done.exit_code == 2
    assert "expected MiB/s" in done.stderr
