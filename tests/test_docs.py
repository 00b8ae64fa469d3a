"""Documents name what is there: links, files, and the names in the walk of a dirty bit."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.test_rooms import PACKAGES, allowed

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    file
    for pattern in ("*.md", "docs/*.md", "bench/*.md", "bench/results/*.md", "tests/*.md")
    for file in ROOT.glob(pattern)
)
ARCHITECTURE = ROOT / "docs" / "architecture.md"

_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
_PATH = re.compile(r"`((?:tracker|migrator|bench|tests|docs|configs)/[\w./-]+)`")
_NAME = re.compile(r"`([\w/]+\.py)`:\s+`(\w+(?:\.\w+)?)`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target, _ in _LINK.findall(document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_that_are_named_exist(document: Path) -> None:
    for path in _PATH.findall(document.read_text()):
        assert (ROOT / path).exists(), path


def _defines(file: Path, name: str) -> bool:
    body: list[ast.stmt] = ast.parse(file.read_text()).body
    for part in name.split("."):
        found = [
            node
            for node in body
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and node.name == part
        ]
        if not found:
            return False
        body = found[0].body
    return True


def test_the_names_of_the_walk_are_defined_where_it_says() -> None:
    names = _NAME.findall(ARCHITECTURE.read_text())
    assert len(names) > 15
    assert [f"{file}: {name}" for file, name in names if not _defines(ROOT / file, name)] == []


def test_a_name_that_is_not_defined_is_found() -> None:
    assert _defines(ROOT / "tracker/sources/uffd.py", "UffdAsync.collect")
    assert not _defines(ROOT / "tracker/sources/uffd.py", "UffdAsync.gather")


def test_every_room_is_on_the_map() -> None:
    text = ARCHITECTURE.read_text()
    for package in PACKAGES:
        for room in allowed(package):
            folder = ROOT / room.replace(".", "/")
            if folder.is_dir() and room not in ("bench.cli", "bench.page"):
                assert f"`{folder.relative_to(ROOT)}/`" in text, room


# -- every refusal has its mend in the page -----------------------------------------------------


def _refusals() -> set[str]:
    """The word that each finding begins with, as far as it is written out in the source."""
    found = set()
    for file in (ROOT / "migrator").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant):
                    found.add(str(first.value))
    return found


def test_every_refusal_is_in_the_page() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = {cell for line in page.splitlines() if line.startswith("| ") for cell in _words(line)}
    assert len(_refusals()) > 15
    assert _refusals() - rows == set()


def _words(line: str) -> list[str]:
    return [word.strip() for word in line.split("|")[1].split(",")]
