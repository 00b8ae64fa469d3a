"""``migrator-bench versus``: its ratios, that it ends well, and that it leaves nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.cli.main import main
from bench.guests import tableguest
from bench.guests.guests import Guest
from bench.hosts.twohosts import missing
from bench.moving import by_qemu, by_us
from bench.moving.journey import Journey, Seat
from bench.moving.moves import Mover, Spans
from bench.moving.ways import Moved, Terms, Way
from bench.parts import to_markdown
from bench.versus import run as versus
from bench.versus.tables import parts
from bench.versus.targets import TARGETS, Target, broken_by_us, finalists, ratio
from migrator.guest.workload import PAGE_SIZE
from tests.bench.stream.test_stream import left_by, start
from tests.conftest import require
from tests.live.qemus import SYSTEM
from tests.live.twohosts import two_hosts

TIMEOUT_S = 300.0
TOTAL = Target("total", "total_s", 0.7)
GUEST = Target("guest", "progress", 1.0, more=True)


def done(run: int, total_s: float = 1.0, **other: Any) -> dict[str, Any]:
    """A sample of a move that came to its end."""
    return {
        "run": run,
        "problem": "",
        "gave_up": False,
        "lost": "",
        "total_s": total_s,
        "downtime_ms": 100 * total_s,
        "felt_ms": 110 * total_s,
        "bytes": 1_000_000,
        "progress": 0.5,
        "rounds": 3,
        "throttle_percent": None,
        **other,
    }


def not_done(run: int, problem: str = "not converged", *, gave_up: bool = True) -> dict[str, Any]:
    return {"run": run, "problem": problem, "gave_up": gave_up, "lost": ""}


def entry(*samples: dict[str, Any], setting: str = "", who: str = "QEMU") -> dict[str, Any]:
    return {
        "qemu": "QEMU 1.2.3",
        "workload": "idle",
        "link": "local",
        "who": who,
        "setting": setting,
        "downtime_limit_ms": 300.0,
        "limit_s": 10.0,
        "samples": list(samples),
        "checks": [],
    }


def ours(*samples: dict[str, Any]) -> dict[str, Any]:
    return entry(*samples, who="migrator")


# -- ratios -------------------------------------------------------------------------------------


def test_ratios_are_of_the_same_run() -> None:
    found = ratio(TOTAL, ours(done(0, 1.0), done(1, 20.0)), [entry(done(1, 40.0), done(0, 4.0))])
    assert found is not None
    assert sorted(found.values) == [0.25, 0.5]


def test_the_best_setting_is_that_of_the_best_median() -> None:
    plain = entry(done(0, 1.0), done(1, 8.0), done(2, 8.0))
    multifd = entry(done(0, 4.0), done(1, 4.0), done(2, 4.0), setting="multifd 2")
    found = ratio(TOTAL, ours(*(done(run, 2.0) for run in range(3))), [plain, multifd])
    assert found is not None
    assert found.best == "multifd 2"
    assert found.median == 0.5
    assert found.met


def test_more_may_be_better() -> None:
    slow, fast = entry(done(0, progress=0.4)), entry(done(0, progress=0.8), setting="xbzrle")
    found = ratio(GUEST, ours(done(0, progress=0.6)), [slow, fast])
    assert found is not None
    assert found.best == "xbzrle"
    assert found.median == pytest.approx(0.75)
    assert not found.met


def test_a_setting_that_was_dropped_is_not_the_best() -> None:
    lucky = entry(done(0, 0.1), setting="multifd 2")
    kept = entry(done(0, 2.0), done(1, 2.0))
    found = ratio(TOTAL, ours(done(0), done(1)), [lucky, kept])
    assert found is not None
    assert found.best == ""


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (ours(not_done(0)), entry(done(0))),
        (ours(done(0)), entry(not_done(0))),
        (ours(done(0)), entry(not_done(0), done(1))),
        (ours(), entry()),
    ],
)
def test_there_may_be_nothing_to_compare(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ratio(TOTAL, mine, [theirs]) is None


def test_what_is_not_known_is_not_compared() -> None:
    found = ratio(
        GUEST, ours(done(0, progress=None), done(1)), [entry(done(0), done(1, progress=0.25))]
    )
    assert found is not None
    assert found.values == (2.0,)


def test_who_has_another_turn_was_the_best_in_something() -> None:
    entries = [
        entry(done(0, 1.0, bytes=5, progress=0.1)),
        entry(done(0, 2.0, bytes=4, progress=0.2), setting="multifd 2"),
        entry(done(0, 3.0, bytes=6, progress=0.3), setting="xbzrle"),
        entry(done(0, 2.0, bytes=6, progress=0.2), setting="auto-converge"),
    ]
    assert finalists(entries) == {"", "multifd 2", "xbzrle"}
    assert finalists([entry(not_done(0))]) == set()


def test_who_would_have_slowed_the_guest_has_another_turn_if_it_did() -> None:
    plain, slowing = done(0, 2.0), done(0, 1.0, bytes=1)
    for percent, kept in ((None, {""}), (70, {"", "auto-converge"})):
        slowed = entry({**slowing, "throttle_percent": percent}, setting="auto-converge")
        assert finalists([entry({**plain, "progress": 0.9}), slowed]) == kept


def test_what_we_lose_is_told_and_what_qemu_loses_is_not() -> None:
    assert not broken_by_us([ours(done(0), not_done(1)), entry(done(0, lost="2 pages differ"))])
    lost = ours(done(0, lost="2 pages differ"))
    assert broken_by_us([lost]) == ["QEMU 1.2.3, idle, local: 2 pages differ"]
    assert len(broken_by_us([ours(not_done(0, "it broke", gave_up=False))])) == 1
    never = ours(not_done(0))
    assert broken_by_us([never, entry(done(0))]) == [
        "QEMU 1.2.3, idle, local: not converged, and QEMU has"
    ]
    assert not broken_by_us([never, entry(not_done(0))])
    assert not broken_by_us([never, {**entry(done(0)), "workload": "zipf"}])
    checked = {**ours(done(0)), "checks": [not_done(0, "3 of 9 pages differ", gave_up=False)]}
    assert len(broken_by_us([checked])) == 1


# -- tables -------------------------------------------------------------------------------------


def results(*entries: dict[str, Any]) -> dict[str, Any]:
    about = {
        "cpu": "a CPU",
        "cores": 2,
        "memory_bytes": 1 << 34,
        "kernel": "6.1",
        "python": "3.11",
        "qemu": "QEMU 1.2.3",
        "revision": "abc",
    }
    return {"machine": about, "versus": {"runs": 1, "throttle": True}, "entries": list(entries)}


def row(text: str, beginning: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {beginning} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_says_what_is_met_and_what_is_missed() -> None:
    text = to_markdown(parts(results(ours(done(0, 1.0)), entry(done(0, 1.6)))))
    cells = row(text, "idle, local")
    assert [cell.split()[2].rstrip(",") for cell in cells[1:6]] == [
        *["missed", "missed", "met", "met", "met"]
    ]
    assert cells[6] == "both"
    assert f"3 of {len(TARGETS)} targets met" in text


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [
        (done(0), not_done(0), "migrator only"),
        (not_done(0), done(0), "QEMU only: missed"),
        (not_done(0), not_done(0), "neither"),
    ],
)
def test_the_table_says_who_did_not_complete(
    mine: dict[str, Any], theirs: dict[str, Any], said: str
) -> None:
    text = to_markdown(parts(results(ours(mine), entry(theirs))))
    cells = row(text, "idle, local")
    assert cells[1:6] == ["–"] * len(TARGETS)
    assert cells[6] == said
    assert text.count("did not complete: 1 of 1") == (2 if said == "neither" else 1)


def test_the_table_says_what_was_lost() -> None:
    text = to_markdown(
        parts(results(ours(done(0)), entry(done(0, lost="7 pages differ"), done(1))))
    )
    assert row(text, "idle, local: QEMU")[-1] == "lost: 1 of 2"
    assert "- idle, local: QEMU, run 1: 7 pages differ" in text


# -- comparing ----------------------------------------------------------------------------------


def spoil(seat: Seat) -> None:
    """Change a byte of the working set that the guest itself leaves alone."""
    with seat.side.ram.open("r+b") as ram:
        ram.seek(tableguest.START + 5 * PAGE_SIZE + 100)
        byte = ram.read(1)[0]
        ram.seek(-1, 1)
        ram.write(bytes([byte ^ 1]))


@pytest.mark.live
@pytest.mark.parametrize("way", [Way("migrator"), Way("QEMU")], ids=["migrator", "QEMU"])
def test_what_is_lost_is_seen(way: Way, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require(missing())
    SYSTEM.require()
    room = by_us if way.ours else by_qemu
    move = room.move
    spoils = iter([False, True])

    async def moved(here: Seat, there: Seat, *arguments: Any) -> Moved:
        found: Moved = await move(here, there, *arguments)
        if next(spoils):
            spoil(there)
        return found

    monkeypatch.setattr(room, "move", moved)

    async def twice() -> list[str]:
        terms = Terms(300.0, local=True)
        # it writes nothing: no QEMU loses anything of it
        journey = Journey(Guest("idle", 128 << 20, working_set=1 << 20), tmp_path)
        with two_hosts() as hosts:
            mover = Mover(hosts, tmp_path, Spans(0.1, 0.1))
            async with journey.begun(hosts.a):
                return [(await mover.sample(journey, way, terms))["lost"] for _ in range(2)]

    before, after = asyncio.run(twice())
    assert before == ""
    assert after.startswith("1 pages")


# -- the command --------------------------------------------------------------------------------


@pytest.mark.live
@pytest.mark.thorough
def test_one_workload(tmp_path: Path) -> None:
    require(missing())
    SYSTEM.require()
    file = tmp_path / "results.json"
    arguments = ["--quick", "--workload", "read-mostly", "--json", str(file)]
    with start("versus", *arguments) as command:
        tables, words = command.communicate(timeout=TIMEOUT_S)
    assert command.returncode == 0, words
    assert not left_by(command.pid)

    entries = json.loads(file.read_text())["entries"]
    assert {(e["link"], e["who"], e["setting"]) for e in entries} == {
        (link, *way)
        for link in ("local", "veth")
        for way in [
            ("migrator", ""),
            *(("QEMU", name) for name in ("", "multifd 2", "xbzrle", "auto-converge")),
        ]
    }
    for e in entries:
        assert len(e["samples"]) == 1
        if e["who"] == "migrator":
            for sample in (*e["samples"], *e["checks"]):
                assert not sample["problem"]
                assert not sample["lost"]
                assert sample["downtime_ms"] < sample["total_s"] * 1000
                assert sample["bytes"] > 0
            assert len(e["checks"]) == 1

    assert CliRunner().invoke(main, ["show", str(file)]).stdout == tables


@pytest.mark.live
@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM] * 3], ids=["once", "thrice"])
def test_interrupted(numbers: list[signal.Signals]) -> None:
    require(missing())
    SYSTEM.require()
    with start("versus", "--workload", "sequential", "--runs", "1000") as command:
        deadline = time.monotonic() + TIMEOUT_S
        assert command.stderr is not None
        said = ""
        while "run 1: QEMU" not in said and time.monotonic() < deadline:
            said = command.stderr.readline()
        time.sleep(2)  # in the middle of a move, if the machine is quick enough
        qemus = [pid for pid in children(command.pid) if "qemu" in comm(pid)]
        assert qemus
        for number in numbers:
            command.send_signal(number)
            time.sleep(0.02)  # signals of a kind that come at once are one
        _, words = command.communicate(timeout=TIMEOUT_S)
    assert command.returncode == 1
    assert "interrupted" in words
    assert "Traceback" not in words
    assert not left_by(command.pid)
    assert not any(Path(f"/proc/{pid}").exists() for pid in qemus)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in found.split()]


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text()


@pytest.mark.parametrize(
    ("who", "lost", "code"), [("migrator", "1 pages differ", 1), ("QEMU", "1 pages differ", 0)]
)
def test_what_we_lose_fails(
    who: str, lost: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    them = [ours(done(0)), entry(done(0))]
    for it in them:
        if it["who"] == who:
            it["samples"][0]["lost"] = lost
    monkeypatch.setattr(versus, "missing", lambda _: "")
    monkeypatch.setattr(versus, "measure", lambda *_: results(*them))
    file = tmp_path / "results.json"
    result = CliRunner().invoke(main, ["versus", "--json", str(file)])
    assert result.exit_code == code
    assert f"run 1: {lost}" in result.stdout
    assert json.loads(file.read_text()) == results(*them)


# -- what is missing ----------------------------------------------------------------------------


def test_a_qemu_that_is_not_there() -> None:
    require(missing())
    found = versus.missing(versus.Extent(["no-such-qemu"], ["idle"], 1))
    assert "no-such-qemu" in found


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    require(missing())
    monkeypatch.setattr(versus.Extent, "shm_bytes", 1 << 60)
    assert "/dev/shm" in versus.missing(versus.Extent(["true"], ["idle"], 1))


def test_a_workload_that_is_unknown() -> None:
    result = CliRunner().invoke(main, ["versus", "--workload", "nothing"])
    assert result.exit_code == 2
    assert "zipf" in result.output
