"""Which room may import which: a folder is a room, and so is a file beside the folders.

What is imported later, in a function, or only for the type checker, counts like any other import.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# one line a room; a room of another package is named with its package
MAY_IMPORT = {
    "tracker": """
        errors:
        abi:
        child:
        syscalls: abi
        bits: errors
        memory: abi bits errors syscalls
        inject: abi child errors syscalls
        sources: abi bits errors inject memory syscalls
        devices: abi bits errors memory sources syscalls
        answered: abi bits child errors inject memory sources syscalls
        probe: abi answered child errors memory syscalls
        pins: abi child errors probe sources syscalls
        warm: bits memory
        """,
    "migrator": """
        __init__: errors migration policy report
        errors: report
        aio:
        harmless:
        ranges:
        choices:
        yamlfile: errors
        report: harmless tracker.bits tracker.memory
        policy: choices report tracker.bits
        config: choices errors policy ranges yamlfile
        guest:
        control: errors report
        qemu: aio choices errors guest
        doctor: aio errors harmless qemu tracker.errors tracker.inject tracker.memory tracker.pins
            tracker.probe tracker.syscalls
        link: aio choices errors
        tracking: aio errors qemu tracker.answered tracker.bits tracker.devices tracker.errors
            tracker.memory tracker.probe tracker.sources
        transport: aio errors link report tracker.bits tracker.errors tracker.memory tracker.warm
        preflight: aio errors link qemu tracking transport tracker.devices tracker.errors
            tracker.memory tracker.probe tracker.sources
        watch: aio errors harmless policy preflight qemu tracking tracker.bits tracker.errors
            tracker.memory tracker.warm
        migration: aio choices errors harmless link policy preflight qemu report tracking transport
            tracker.bits tracker.child tracker.errors tracker.inject tracker.memory tracker.warm
        receiver: aio errors harmless link migration preflight qemu transport tracker.child
            tracker.errors tracker.memory
        scenario: aio config errors guest link migration policy qemu report
        cli: aio choices config control doctor errors guest harmless link migration policy ranges
            receiver report scenario transport watch
        """,
    "bench": """
        __init__:
        machine:
        parts: migrator.report
        tables: parts
        hosts:
        page: migrator.report
        guests: migrator.guest
        moving: guests hosts migrator.aio migrator.cli migrator.errors migrator.qemu
        kernels: page parts tables migrator.report migrator.transport tracker.bits tracker.memory
        simulate: guests page parts migrator.choices migrator.errors migrator.guest
            migrator.migration migrator.policy migrator.qemu migrator.report migrator.tracking
            migrator.transport migrator.watch tracker.bits tracker.memory tracker.sources
            tracker.warm
        strategies: guests machine page parts tables migrator.aio migrator.config migrator.errors
            migrator.qemu migrator.ranges migrator.report migrator.tracking migrator.yamlfile
            tracker.answered tracker.bits tracker.errors tracker.memory tracker.probe
            tracker.sources tracker.warm
        stream: guests hosts machine moving page tables migrator.aio migrator.link
            migrator.report migrator.transport tracker.bits tracker.memory
        versus: guests hosts machine moving page parts tables migrator.aio migrator.errors
            migrator.report
        cli: guests hosts kernels machine parts simulate strategies stream tables versus
            migrator.cli migrator.errors migrator.harmless migrator.policy migrator.ranges
            migrator.report migrator.watch
        """,
}
PACKAGES = tuple(MAY_IMPORT)

Graph = dict[str, set[str]]


@cache
def _files() -> dict[str, Path]:
    """Each module's file."""
    found = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def modules() -> Graph:
    """Which modules each module imports."""
    files = _files()
    return {module: _imported(file, files) - {module} for module, file in files.items()}


def _imported(file: Path, files: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                found.add(inner if inner in files else node.module)
    return found & set(files)


def room_of(module: str) -> str:
    package, _, rest = module.partition(".")
    return f"{package}.{rest.partition('.')[0] or '__init__'}"


def rooms() -> Graph:
    found: Graph = {}
    for module, imported in modules().items():
        room = room_of(module)
        found.setdefault(room, set()).update({room_of(other) for other in imported} - {room})
    return found


def allowed(package: str) -> Graph:
    """The table above, as a graph."""
    found: Graph = {}
    for word in MAY_IMPORT[package].split():
        if word.endswith(":"):
            room = f"{package}.{word[:-1]}"
            found[room] = set()
        else:
            known = word.partition(".")[0] in PACKAGES and "." in word
            found[room].add(word if known else f"{package}.{word}")
    return found


def circles(graph: Graph) -> list[list[str]]:
    """What is left once everything was taken away that imports nothing that is left."""
    left = {name: set(imported) for name, imported in graph.items()}
    while True:
        ends = {name for name, imported in left.items() if not imported & set(left)}
        if not ends:
            return [sorted(left)] if left else []
        for name in ends:
            del left[name]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_rooms_import_what_the_table_says(package: str) -> None:
    found = {room: used for room, used in rooms().items() if room.startswith(f"{package}.")}
    found = {room: used for room, used in found.items() if used or room in allowed(package)}
    assert found == allowed(package)


def test_no_circle() -> None:
    assert circles(rooms()) == []
    assert circles(modules()) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["a", "b", "c"]]


def test_the_tracker_knows_nothing_of_migrations_nor_the_migrator_of_benchmarks() -> None:
    for room, imported in rooms().items():
        packages = {other.partition(".")[0] for other in imported}
        if room.startswith("tracker."):
            assert packages <= {"tracker"}, room
        elif room.startswith("migrator."):
            assert packages <= {"migrator", "tracker"}, room


def test_late_imports_count() -> None:
    assert "migrator.receiver.testimony" in modules()["migrator.receiver.witness"]
    assert "migrator.report.report" in modules()["migrator.errors"]
