"""The pin matrix on the lab's kernel, where nothing is missing: soft-dirty and huge pages too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tracker.pins.pins import NPAGES, SCENARIOS

HUGE_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
TRACKERS = ("uffd async", "uffd sync", "soft-dirty")

Cells = dict[tuple[str, str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def cells() -> Cells:
    """What ``migrator doctor --pins --json`` says; its table is in the test's output."""
    HUGE_POOL.write_text(str(NPAGES))
    try:
        program = "from migrator.cli.main import main; main()"
        command = [sys.executable, "-c", program, "doctor", "--pins", "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    finally:
        HUGE_POOL.write_text("0")
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["trouble"], done.returncode) == ([], 0)
    return {(e["memory"], e["pin"], e["tracker"]): e for e in said["experiments"]}


@pytest.mark.parametrize("pin", SCENARIOS)
@pytest.mark.parametrize("memory", ["shared memfd", "shared file"])
@pytest.mark.parametrize("tracker", TRACKERS)
def test_shared_memory(cells: Cells, memory: str, pin: str, tracker: str) -> None:
    cell = cells[memory, pin, tracker]
    assert cell["cpu_writes_reported"]["answer"] == "yes", cell
    expected = "not applicable" if pin == "no pin" else "yes"
    assert cell["coherent"]["answer"] == expected, cell
    through = cell["pin_writes_reported"]["answer"]
    assert (through in ("yes", "no")) == SCENARIOS[pin].pin.writes, cell


@pytest.mark.parametrize("pin", SCENARIOS)
@pytest.mark.parametrize("tracker", TRACKERS)
def test_private_memory(cells: Cells, pin: str, tracker: str) -> None:
    cell = cells["private anonymous", pin, tracker]
    answer = cell["cpu_writes_reported"]["answer"]
    if tracker != "soft-dirty":
        assert answer == "yes", cell
    elif SCENARIOS[pin].pin.writes:
        # clear_refs leaves the bits of pinned private pages as they are (fs/proc/task_mmu.c,
        # pte_is_pinned), and the pin has set them
        assert answer == "always", cell
    else:
        assert answer in ("yes", "always"), cell
    if pin == "fork, then reference":
        assert cell["coherent"]["answer"] == "no", cell


@pytest.mark.parametrize("pin", SCENARIOS)
def test_huge_pages(cells: Cells, pin: str) -> None:
    for tracker in ("uffd async", "uffd sync"):
        cell = cells["hugetlb", pin, tracker]
        assert cell["cpu_writes_reported"]["answer"] == "yes", cell
    cell = cells["hugetlb", pin, "soft-dirty"]
    assert cell["cpu_writes_reported"]["answer"] == "not tried", cell
    assert "not on this memory" in cell["cpu_writes_reported"]["seen"]
