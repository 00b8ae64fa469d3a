"""RAM files that other users can read: told of at both sides, and the VM moves all the same."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from migrator import migrate
from migrator.cli.display import summary
from migrator.errors import Finding
from migrator.link.messages import Looked, parse
from migrator.preflight.waiting import Side
from migrator.report.page import migration
from migrator.report.report import Report
from tests.live.moving import VERIFIED, TwoKinds
from tests.live.sending import Road, on_a_road
from tests.live.vms import MIB, Pair, pair

pytestmark = pytest.mark.live


def machine(directory: Path) -> TwoKinds:
    return TwoKinds(
        memory=128 * MIB,
        ram_path=str(directory / "here"),
        destination_ram_path=str(directory / "there"),
    )


def check(report: Report, exposed: Sequence[tuple[str, Path]]) -> None:
    """Check that just these files are warned of, wherever people look."""
    assert report.status == "completed"
    assert len(report.warnings) == len(exposed), report.warnings
    for (vm, file), warning in zip(exposed, report.warnings, strict=True):
        assert f"of the {vm} is in {file}, which other users can read" in warning
        assert "mode is 0644" in warning
    assert json.loads(report.to_json())["warnings"] == report.warnings
    out = io.StringIO()
    summary(report, Console(file=out))
    assert out.getvalue().count("warning: ") == len(exposed)
    page = migration.page(report, "a test")
    assert ("Warnings" in page) == bool(exposed)


def moved(directory: Path, modes: tuple[int, int] = (0o644, 0o644)) -> Report:
    async def body() -> Report:
        async with pair(machine(directory)) as vms:
            for file, mode in zip(("here", "there"), modes, strict=True):
                (directory / file).chmod(mode)
            return await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED)

    return asyncio.run(body())


def test_files_with_names(tmpfs: Path) -> None:
    tmpfs.chmod(0o755)
    files = [("source", tmpfs / "here"), ("destination", tmpfs / "there")]
    check(moved(tmpfs), files)


def test_a_file_that_only_one_user_can_read(tmpfs: Path) -> None:
    tmpfs.chmod(0o755)
    check(moved(tmpfs, (0o600, 0o644)), [("destination", tmpfs / "there")])


def test_files_that_other_users_do_not_reach(tmpfs: Path) -> None:
    assert tmpfs.stat().st_mode & 0o777 == 0o700
    check(moved(tmpfs), [])


def test_files_without_names() -> None:
    async def body() -> Report:
        async with pair() as vms:
            return await migrate(vms.source.qmp, vms.destination.qmp, VERIFIED)

    check(asyncio.run(body()), [])


def test_a_file_on_another_host(tmpfs: Path) -> None:
    tmpfs.chmod(0o755)

    async def body(road: Road) -> Report:
        await road.next_receiver()
        (tmpfs / "here").chmod(0o600)
        report = await road.send()
        assert Pair.traces(road.vm) == []
        return report

    check(on_a_road(body, machine(tmpfs)), [("destination", tmpfs / "there")])


def test_a_side_of_an_older_receiver_has_no_warnings() -> None:
    refused = Finding("RAM", "it has none", "give it some")
    said = json.loads(json.dumps(Side(None, (refused,), warnings=("a", "b")).to_json()))
    assert Side.from_said(parse(Looked, {"side": said}, "there").side).warnings == ("a", "b")
    del said["warnings"]
    assert Side.from_said(parse(Looked, {"side": said}, "there").side).warnings == ()
