"""Text from elsewhere commands no terminal, forges no line, and writes no markup."""

from __future__ import annotations

import io
import json
import logging
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bench.cli.main import main as bench_main
from bench.parts import Bad, Bullets, Table, to_html
from migrator.cli.control import _table
from migrator.cli.display import Display, findings, line, summary
from migrator.cli.main import main
from migrator.doctor import check as doctor
from migrator.errors import ConfigError, Failed, Finding, Refused, Undecided, VmError
from migrator.harmless import Formatter, harmless
from migrator.report.page import memory, migration, style
from migrator.report.report import DirtyMap, MappedBlock, MapRow, Progress, Report, Round
from migrator.watch import view as heatmap

FORGED = "completed: all is well"
EVIL = f"a\x1b]0;title\x07\x1b[2J\x9b31m\r\n{FORGED}\n\x00\u202edlrow\u2028"
EVIL += "[bold]<script>$\\frac$ :100:"


def check(printed: str) -> None:
    """Check that only what rich and this program made is in it, and that the text is told."""
    plain = re.sub(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\r?\x1b\[[0-9]?[AKG]", "", printed)
    harmful = {c for c in plain if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")} - {"\n"}
    assert not harmful
    assert not [said for said in plain.splitlines() if said.startswith(FORGED)]
    assert r"\x1b]0;title" in re.sub(r"[\s│┃]", "", plain)


# -- the function -------------------------------------------------------------------------------


@given(st.text() | st.text("\x1b[]\n\r\t\x9b\u202e\ud800ab"))
def test_what_is_left_is_shown_as_itself(text: str) -> None:
    found = harmless(text)
    assert not {unicodedata.category(c) for c in found} & {"Cc", "Cs", "Zl", "Zp"}
    assert not set("\xad\u200b\u200e\u200f\u202a\u202e\u2066\u2069\ufeff") & set(found)
    assert harmless(found) == found
    if text.isprintable():
        assert found == text
    assert harmless(text, newline="\n").count("\n") == text.count("\n")


def test_words_in_any_language_are_left() -> None:
    text = "Über → 你好 मुंबई ✓ 👍 é"
    assert harmless(text) == text


# -- the terminal -------------------------------------------------------------------------------


def evil_report(status: Any = "failed") -> Report:
    shown = Round(0, {EVIL: 1}, {EVIL: 1}, 1, decision=EVIL)
    report = Report(status=status, reason=EVIL, policy=EVIL, rounds=[shown], known=[EVIL])
    report.phases = report.predicted_downtime = {EVIL: 1.0}
    report.downtime_phases, report.downtime_ms = [EVIL], 1.0
    blocks = [MappedBlock(name, 1 << 20, 4096, 4) for name in (EVIL, "b")]
    report.dirty_map = DirtyMap(blocks, [MapRow(1, 1, 0.5, False, [1] * 8)])
    return report


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_shown_of_a_migration(terminal: bool) -> None:
    display = Display()
    out = io.StringIO()
    display.console = Console(
        file=out, force_terminal=terminal, width=300, emoji=False, highlight=False
    )
    evil = Progress(EVIL, 1, 2, 3, 4, 5.0, note=EVIL)
    with display:
        display.say(EVIL)
        display.show(evil)
    display.console.print(line(evil))
    for status in ("failed", "completed"):
        summary(evil_report(status), display.console)
    findings([Finding(EVIL, EVIL, EVIL)], display.console)
    check(out.getvalue())
    assert ":100:" in out.getvalue()  # rich would make a picture of a part of an IPv6 address


def test_what_is_shown_of_other_commands() -> None:
    out = io.StringIO()
    console = Console(file=out, width=300)
    doctor.show([doctor.Check(EVIL, "failed", EVIL, EVIL)], console)
    answer: dict[str, Any] = {"what": EVIL, "pid": 1, "note": EVIL, "phase": EVIL, "round": 1}
    names = ("dirty_pages", "sent_pages", "total_sent_pages", "bytes_per_s")
    answer |= dict.fromkeys(names, 1) | {"expected_downtime_ms": None, "left_s": None}
    console.print(_table({Path(EVIL[:20]): answer}))
    check(out.getvalue())


@pytest.mark.parametrize(
    "error",
    [
        ConfigError(EVIL, file=EVIL, key=EVIL),
        VmError(EVIL, EVIL),
        Refused([Finding(EVIL, EVIL, EVIL)]),
        Failed(EVIL, EVIL),
        Undecided(EVIL, EVIL, [EVIL, EVIL]),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("with_report", [False, True])
def test_errors(error: Any, with_report: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def migrate(*_: object, **__: object) -> Report:
        if with_report and hasattr(error, "report"):
            error.report = evil_report()
        logging.getLogger(EVIL).warning("%s", EVIL)
        raise error

    monkeypatch.setattr("migrator.migration.orchestrator.migrate", migrate)
    done = CliRunner().invoke(main, ["migrate", "--source=a", "--destination=b", "--json"])
    assert done.exit_code == error.exit_code
    check(done.stderr)
    said = json.loads(done.stdout)
    assert EVIL in said["reason"]  # as it is: JSON escapes what it has to


def printed_by(arguments: list[str], group: Any = main) -> Result:
    return CliRunner().invoke(group, arguments)


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    evil = EVIL.replace("\0", "")
    grid = {"strategies": [evil], "workloads": ["zipf"], "memory": ["1G"]}
    file.write_text(json.dumps({evil: 1, "source": {"qmp": "/a"}, "grids": [grid]}))
    for group, command in ((main, "run"), (bench_main, "strategies")):
        done = printed_by([command, str(file)], group)
        assert done.exit_code == 2
        check(done.stderr)


def test_names_of_files(tmp_path: Path) -> None:
    evil = EVIL.replace("\0", "").replace("/", "")
    check(printed_by(["run", str(tmp_path / evil)]).stderr)
    check(printed_by(["keys", "show", str(tmp_path / evil)]).stderr)
    check(printed_by(["keys", "init", str(tmp_path / evil), "host"]).stderr)
    check(printed_by(["keys", "show", str(tmp_path / evil)]).stderr)
    check(printed_by(["status", str(tmp_path / evil)]).stderr)
    check(printed_by(["cancel", str(tmp_path / evil)]).stderr)


def test_arguments() -> None:
    evil = EVIL.replace("\0", "")
    for words in (["demo", "--accel", evil], ["demo", f"--x{evil}"], [evil], ["demo", evil]):
        done = printed_by(words)
        assert done.exit_code == 2
        check(done.stderr)


def test_what_another_host_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        sentences = (EVIL, EVIL)
        exit_code = 0

    async def resolve(*_: object, **__: object) -> Found:
        return Found()

    monkeypatch.setattr("migrator.receiver.resolution.resolve", resolve)
    check(printed_by(["resolve", "--source", "/a"]).stderr)


def test_a_log() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(Formatter("%(name)s: %(message)s"))
    log = logging.Logger(EVIL)
    log.addHandler(handler)
    log.warning("%s", EVIL)
    check(out.getvalue())
    assert len(out.getvalue().splitlines()) == 1
    try:
        raise ValueError("\x1b[2J")
    except ValueError:
        log.exception("it failed")
    assert "Traceback (most recent call last):\n" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_watching() -> None:
    class Block:
        name, size = EVIL, 1 << 20

    class History:
        def strip(self, width: int) -> list[float]:
            return [0.0] * width

    class Seen:
        block, history, data_bytes = Block(), History(), 0

    class Forecast:
        converges, downtime_ms = False, 1.0

    class Limits:
        downtime_ms = 1.0

    class Sight:
        notes, state, blocks = (EVIL,), EVIL, (Seen(),)
        at_s = bytes_per_s = dirty_bytes_per_s = 1.0
        dirty_pages_per_s: ClassVar[dict[str, float]] = {}
        working_set_bytes: ClassVar[dict[str, float]] = {}
        forecast, limits = Forecast(), Limits()

    view = heatmap.View()
    out = io.StringIO()
    view.console = Console(file=out, width=300, emoji=False)
    sight: Any = Sight()
    view.show(sight)
    check(out.getvalue())


# -- pages --------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.text += f"{value}\n" if name == "alt" else ""

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page() -> None:
    page = migration.page(evil_report("completed"), EVIL)
    assert not {c for c in page if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")} - {"\n"}
    found = Tags(page)
    assert "script" not in found.tags
    assert found.text.count("<script>") >= 8
    assert r"\x1b]0;title" in found.text


def test_a_picture_of_memory() -> None:
    report = evil_report()
    assert report.dirty_map is not None
    with style.styled():
        drawn = ElementTree.fromstring(style.svg(memory.figure(report.dirty_map)))
    assert r"a\x1b]0;title" in "".join(drawn.itertext())


def test_a_page_of_measurements() -> None:
    table = Table(EVIL, ["a", EVIL], [[Bad(EVIL), EVIL]])
    made = "".join(to_html([EVIL, Bullets([(EVIL, "b")]), table]))
    found = Tags(made)
    assert "script" not in found.tags
    assert found.text.count("<script>") == 6
    assert "\x1b" not in made


def test_the_guard_and_the_runner_say_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from migrator.harmless import say

    say(EVIL)
    printed = capsys.readouterr()
    assert printed.out == ""
    check(printed.err)
    assert printed.err.count("\n") == 1
