"""The page of a migration: what is in it, whatever the migration was, and how it is asked for."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result

from migrator.cli.main import main
from migrator.errors import Aborted, Finding, QmpUnreachable, Refused
from migrator.report.dirtymap import Recorder
from migrator.report.page import memory, migration, spans
from migrator.report.report import DirtyMap, MappedBlock, MapRow, Report, Round
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet
from tracker.memory.ram import RamBlock

MIB = 1 << 20
BLOCK = RamBlock("ram", 64 * MIB, 4096, 0x7000_0000_0000, 1, 2)
_VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """A page, taken apart; what is not well-formed fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def images(self) -> Iterator[tuple[str, ElementTree.Element]]:
        """What is told of each picture, and the picture."""
        for tag, attributes in self.tags:
            if tag == "img":
                kind, data = (attributes["src"] or "").split(",", 1)
                assert kind == "data:image/svg+xml;base64"
                yield attributes["alt"] or "", ElementTree.fromstring(base64.b64decode(data))


def check(text: str) -> Page:
    """Check that nothing is fetched from elsewhere, and that nothing in it is run."""
    page = Page(text)
    assert len(text) < 1_000_000
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "xlink:href"):
                assert (value or "").startswith("data:")
    assert not re.search(r"url\(|@import", text)
    for alt, image in page.images():
        assert len(alt) > 40
        for element in image.iter():
            assert not element.tag.endswith("script")
            for name, value in element.attrib.items():
                if name.endswith("href"):
                    assert value.startswith(("#", "data:image/png;base64,"))
                assert "url(http" not in value
    return page


def words(image: ElementTree.Element) -> str:
    """What is written in a picture."""
    found = [e for e in image.iter() if e.tag.endswith("}text")]
    return "\n".join("".join(element.itertext()) for element in found)


def recorded(rounds: int) -> DirtyMap:
    recorder = Recorder([BLOCK])
    for number in range(1, rounds + 1):
        first = 64 * number % BLOCK.npages
        pages = DirtyBitmap.from_pages(BLOCK.npages, list(range(first, first + 64)))
        found = PageSet([BLOCK], {"ram": pages})
        recorder.note(number, number / 10, found, later=number >= rounds - 1)
    return recorder.dirty_map()


ROUNDS = [
    Round(0, {"all": 16384}, {}, 16384, sent_bytes=48 * MIB, dirty_bytes=64 * MIB, ended_s=0.7),
    Round(1, {"uffd": 2345}, {}, 2345, waiting_pages=1000, sent_bytes=5 * MIB, began_s=0.7),
    Round(2, {"uffd": 1111}, {}, 1111, sent_bytes=4 * MIB, began_s=0.82, ended_s=0.85),
    Round(3, {"uffd": 0}, {}, 0, began_s=0.86, ended_s=0.87),
]
ROUNDS[1].dirty_bytes, ROUNDS[1].waiting_bytes, ROUNDS[1].ended_s = 2345 * 4096, 1000 * 4096, 0.8
ROUNDS[1].expected_downtime_ms, ROUNDS[1].decision = 44.5, "expected downtime 44 ms fits 100 ms"
COMPLETED = Report(
    status="completed",
    policy="adaptive",
    total_ms=905.0,
    downtime_ms=52.25,
    downtime_limit_ms=100.0,
    predicted_downtime_ms=44.5,
    predicted_downtime={"stop": 1.5, "final-send": 38.0, "load": 5.0},
    guest_bytes=64 * MIB,
    final_pages=1111,
    rounds=ROUNDS,
    dirty_map=recorded(3),
    verified_pages=16384,
    mismatched_pages=0,
    phases={
        "preflight": 100.0,
        "attach": 100.0,
        "copy": 500.0,
        "rounds": 100.0,
        "switchover": 22.75,
        "stop": 2.25,
        "final-send": 40.0,
        "load": 10.0,
        "finish": 30.0,
    },
    downtime_phases=["stop", "final-send", "load"],
)


def test_what_a_migration_was() -> None:
    page = check(migration.page(COMPLETED, "<a> & b"))
    assert "<title>Migration: completed</title>" in migration.page(COMPLETED, "")
    for said in ("<a> & b", "905 ms", "52.2 ms", "100 ms", "2,345", "1,111", "adaptive", "38.0 ms"):
        assert said in page.text, said
    assert "16,384 pages compared in 0 ms, 0 differ" in page.text
    timeline, terms, heat = page.images()
    assert "4 rounds (sent: 48.0, 5.0, 4.0, 0.0)" in timeline[0]
    for said in ("MiB a round", "seconds since the migration began", "as it was: 52.2 ms"):
        assert said in words(timeline[1])
    assert "limit 100 ms" in words(timeline[1])
    assert "the guest stands" in words(timeline[1])
    assert "final-send 40.0 ms, expected 38.0 ms" in terms[0]
    assert {"40.0 ms", "38.0 ms", "stop", "together"} <= set(words(terms[1]).splitlines())
    assert "ram 64 MiB" in heat[0]
    assert "64 pages in the first, 64 in the last" in heat[0]
    assert "guest memory, MiB from its beginning" in words(heat[1])


def test_when_the_guest_stood() -> None:
    stood = spans.stood(COMPLETED)
    assert stood is not None
    assert stood.began_s == pytest.approx(0.82275)
    assert (stood.ended_s - stood.began_s) * 1000 == pytest.approx(COMPLETED.downtime_ms)
    assert [s.name for s in spans.phases(COMPLETED)] == list(COMPLETED.phases)
    assert spans.stood(replace(COMPLETED, phases={"copy": 1.0, "rollback": 1.0})) is None
    assert spans.drained(COMPLETED) is None


def test_shares_are_of_each_region() -> None:
    block = MappedBlock("ram", 10 * 4096, 4096, 3)  # 3, 3 and 4 pages
    drawn = DirtyMap([block], [MapRow(1, 1, 0.0, False, [3, 0, 1])])
    assert memory.dirty_shares(drawn).tolist() == [[1.0, 0.0, 0.25]]


def test_a_migration_that_failed_is_told_with_what_it_was() -> None:
    phases = {"preflight": 100.0, "copy": 50.0, "rounds": 20.0, "rollback": 3.0}
    failed = replace(
        COMPLETED,
        status="failed",
        reason="no <b>more",
        downtime_ms=None,
        known=["the source is paused"],
        mismatched_pages=7,
        phases=phases,
        downtime_phases=[],
        total_ms=173.0,
    )
    page = check(migration.page(failed, "x"))
    assert "no <b>more" in page.text
    assert "the source is paused" in page.text
    bad = [attributes for _, attributes in page.tags if attributes.get("class") == "bad"]
    assert len(bad) == 2  # how it ended, and what differs
    assert len(list(page.images())) == 2


@pytest.mark.parametrize(
    "missing",
    [
        {"dirty_map": None},
        {"dirty_map": DirtyMap([], [])},
        {"rounds": []},
        {"rounds": ROUNDS[:1], "dirty_map": recorded(1)},
        {"downtime_limit_ms": None, "predicted_downtime": {}},
        {"phases": {}, "total_ms": 0.0, "downtime_phases": []},
        {"dirty_map": DirtyMap([MappedBlock("r", 4096, 4096, 1)], [MapRow(1, 1, 0, True, [0])])},
    ],
)
def test_whatever_is_not_known_there_is_a_page(missing: dict[str, Any]) -> None:
    check(migration.page(replace(COMPLETED, **missing), ""))
    check(migration.page(Report(**missing), ""))


def test_how_much_writers_were_slowed() -> None:
    slowed = [
        replace(r, throttle_percent=percent)
        for r, percent in zip(ROUNDS, (0, 25, 0, 0), strict=True)
    ]
    for rounds, said in ((ROUNDS, False), (slowed, True)):
        alt, image = next(check(migration.page(replace(COMPLETED, rounds=rounds), "")).images())
        assert ("up to 25 % of their time" in alt) is said
        assert ("writers are made to wait" in words(image)) is said


def test_a_long_migration_is_a_page_of_the_same_size() -> None:
    many = [
        Round(n, {"uffd": n}, {}, n, began_s=n, ended_s=n + 0.9, dirty_bytes=n << 12)
        for n in range(5000)
    ]
    for r in many:
        r.expected_downtime_ms, r.decision = 1.0 + r.number, "as it says"
    chooser = np.random.default_rng(1)
    recorder = Recorder([BLOCK])
    for n in range(1, 5000):
        pages = np.flatnonzero(chooser.random(BLOCK.npages) < 0.3)
        found = DirtyBitmap.from_pages(BLOCK.npages, pages)
        recorder.note(n, n, PageSet([BLOCK], {"ram": found}), later=False)
    report = replace(
        COMPLETED,
        rounds=many,
        dirty_map=recorder.dirty_map(),
        phases={"copy": 1000.0, "rounds": 5e6},
        total_ms=5e6,
    )
    check(migration.page(report, ""))


# -- the option ---------------------------------------------------------------------------------


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def commands(tmp_path: Path) -> list[list[str]]:
    config = tmp_path / "some.yaml"
    config.write_text("source: {qmp: a}\ndestination: {qmp: b}\n")
    return [
        ["demo"],
        ["run", str(config)],
        ["migrate", "--source", "a", "--destination", "b"],
        ["send", "--source", "a", "--to", "h:1", "--insecure"],
    ]


def ending(monkeypatch: pytest.MonkeyPatch, end: Report | Exception) -> list[bool]:
    """Let migrations end like this; whether each was asked for a map."""
    asked: list[bool] = []

    async def migrate(source: str, place: object, options: Any, **_: Any) -> Report:
        asked.append(options.dirty_map)
        if isinstance(end, Exception):
            raise end
        return end

    async def run(config: object, *, dirty_map: bool, **_: Any) -> Report:
        return await migrate("", "", type("Options", (), {"dirty_map": dirty_map}))

    monkeypatch.setattr("migrator.migration.orchestrator.migrate", migrate)
    monkeypatch.setattr("migrator.scenario.run", run)
    return asked


@pytest.mark.parametrize("number", range(4))
def test_each_command_that_migrates_writes_it(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ending(monkeypatch, COMPLETED)
    page = tmp_path / "out.html"
    command = commands(tmp_path)[number]
    done = invoke(*command, "--report", str(page), "--json")
    assert done.exit_code == 0, done.stderr
    assert "52.2 ms" in check(page.read_text()).text
    page.unlink()
    assert invoke(*command).exit_code == 0
    assert asked == [True, False]
    assert not page.exists()


def test_the_page_of_an_aborted_migration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = Aborted("rounds", "does not converge")
    error.report = replace(COMPLETED, status="aborted", reason=error.reason, downtime_ms=None)
    ending(monkeypatch, error)
    page = tmp_path / "out.html"
    done = invoke("demo", "--report", str(page), "--json")
    assert done.exit_code == 1
    assert '"status": "aborted"' in done.stdout.splitlines()[-1]
    assert "does not converge" in check(page.read_text()).text


@pytest.mark.parametrize(
    "error", [QmpUnreachable("source", "gone"), Refused([Finding("RAM", "none", "some")])]
)
def test_without_a_migration_there_is_no_page(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending(monkeypatch, error)
    page = tmp_path / "out.html"
    done = invoke("demo", "--report", str(page))
    assert done.exit_code in (1, 3)
    assert "is not written: no migration was begun" in done.stderr
    assert not page.exists()


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("name", ["nowhere/out.html", "."])
def test_where_no_page_can_be_written_nothing_is_begun(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ending(monkeypatch, COMPLETED)
    done = invoke(*commands(tmp_path)[number], "--report", str(tmp_path / name), "--json")
    assert done.exit_code == 2
    assert "cannot be written" in " ".join(done.stderr.split())
    assert '"status": "failed"' in done.stdout
    assert asked == []


def test_what_was_there_stays_until_there_is_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending(monkeypatch, QmpUnreachable("source", "gone"))
    page = tmp_path / "out.html"
    page.write_text("before")
    assert invoke("demo", "--report", str(page)).exit_code == 1
    assert page.read_text() == "before"


@pytest.mark.parametrize("error", [RuntimeError("no ink"), KeyboardInterrupt()])
def test_a_page_that_cannot_be_made_changes_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def page(*_: object) -> str:
        raise error

    ending(monkeypatch, COMPLETED)
    monkeypatch.setattr(migration, "page", page)
    done = invoke("demo", "--report", str(tmp_path / "out.html"), "--json")
    assert done.exit_code == 0
    assert '"status": "completed"' in done.stdout
    assert "warning: " in done.stderr
    assert (str(error) or "KeyboardInterrupt") in done.stderr
