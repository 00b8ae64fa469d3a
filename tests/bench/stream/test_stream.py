"""``migrator-bench stream``: that it ends well, compares what it sent, and leaves nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.cli.main import main
from bench.hosts.twohosts import missing
from bench.stream import transport
from bench.stream.content import PAGE, SHAPES, Shape, differing, fill
from bench.stream.transport import Case, Differs, Rig
from migrator.link import keys
from tests.conftest import require
from tests.live.qemus import SYSTEM
from tests.live.twohosts import two_hosts

MIB = 1 << 20
TIMEOUT_S = 300.0


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from bench.cli.main import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_by(pid: int) -> list[Path]:
    return [
        *Path("/dev/shm").glob(f"migrator-bench-{pid}-*"),
        *Path("/run/netns").glob(f"mig{pid}-*"),
    ]


# -- the command --------------------------------------------------------------------------------


@pytest.mark.live
@pytest.mark.thorough
def test_quick(tmp_path: Path) -> None:
    require(missing())
    SYSTEM.require()
    file = tmp_path / "results.json"
    with start("stream", "--quick", "--json", str(file)) as command:
        tables, words = command.communicate(timeout=TIMEOUT_S)
    assert command.returncode == 0, words
    assert not left_by(command.pid)

    results = json.loads(file.read_text())
    assert {entry["what"] for entry in results["transport"]} == {"hot loop", "file loop", "stream"}
    for entry in results["transport"]:
        (sample,) = entry["samples"]
        if entry["what"] == "stream":
            shape = next(shape for shape in SHAPES if shape.name == entry["memory"])
            assert sample["guest_bytes"] == results["size"] // shape.every
            assert sample["content_bytes"] <= sample["wire_bytes"]
            assert sample["content_bytes"] / sample["guest_bytes"] == pytest.approx(
                shape.content, abs=0.02
            )
    assert {entry["who"] for entry in results["moves"]} == {"migrator", "QEMU"}
    for entry in results["moves"]:
        (sample,) = entry["samples"]
        assert sample["wire_bytes"] > results["guest"]["working_set"]

    assert CliRunner().invoke(main, ["show", str(file)]).stdout == tables


@pytest.mark.live
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(number: signal.Signals) -> None:
    require(missing())
    with start("stream", "--size", "16M", "--runs", "1000") as command:
        deadline = time.monotonic() + TIMEOUT_S
        while len(left_by(command.pid)) < 3 and time.monotonic() < deadline:
            assert command.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        command.send_signal(number)
        _, words = command.communicate(timeout=TIMEOUT_S)
    assert command.returncode == 1
    assert "interrupted" in words
    assert "Traceback" not in words
    assert not left_by(command.pid)


@pytest.mark.parametrize("arguments", [["--help"], ["stream", "--help"], ["show", "--help"]])
def test_help(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, arguments).exit_code == 0


@pytest.mark.parametrize("size", ["1000", "0", "1X"])
def test_a_size_that_makes_no_sense(size: str) -> None:
    assert CliRunner().invoke(main, ["stream", "--size", size]).exit_code == 2


# -- comparing ----------------------------------------------------------------------------------


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    fill(tmp_path / "sent", 2 * MIB, 1.0)
    return tmp_path / "sent"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_arrived_is_compared(sent: Path, shape: Shape) -> None:
    arrived = bytearray(sent.read_bytes())
    for page in range(len(arrived) // PAGE):
        if page % shape.every:
            arrived[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    there = sent.with_name("arrived")
    there.write_bytes(arrived)
    assert differing(sent, there, shape) == 0
    for page in (0, 1, 511):  # of which some were not to be sent
        arrived[page * PAGE + 4000] ^= 1
    there.write_bytes(arrived)
    assert differing(sent, there, shape) == 3
    there.write_bytes(arrived[:-PAGE])
    assert differing(sent, there, shape) == 512


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with two_hosts() as hosts:
        keys.init(tmp_path / "keys", [hosts.a.address, hosts.b.address])
        pair = (str(tmp_path / "keys" / h.address) for h in (hosts.a, hosts.b))
        with Rig(hosts, (next(pair), next(pair)), tmp_path, MIB) as made:
            yield made


@pytest.mark.live
@pytest.mark.parametrize("what", ["file loop", "stream"])
def test_a_difference_is_no_result(
    rig: Rig, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = Case(what, tls=True, connections=2)
    assert rig.sample(case)["guest_bytes"] == MIB

    def spoiled(source: Path, destination: Path, shape: Shape) -> int:
        with destination.open("r+b") as file:
            file.write(b"spoiled")
        return differing(source, destination, shape)

    monkeypatch.setattr(transport, "differing", spoiled)
    with pytest.raises(Differs, match="1 pages differ"):
        rig.sample(case)
    assert not (tmp_path / "destination").exists()


# -- tables -------------------------------------------------------------------------------------


def test_ratios_are_of_the_same_run() -> None:
    from bench.tables import ratios

    def entry(*seconds: float) -> dict[str, Any]:
        return {"samples": [{"s": s, "content_bytes": 100} for s in seconds]}

    assert ratios(entry(1, 20), entry(0.5, 10)) == [0.5, 0.5]
