"""The commands as a user gives them: real processes, real QEMUs, what they print and leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from migrator.qemu.qmp import Qmp
from tests.live.vms import Machine, pair

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
MIGRATOR = [str(Path(sys.executable).with_name("migrator"))]
KEYS = {
    *("status", "downtime_ms", "total_ms", "rounds", "pages_sent", "bytes_sent", "final_pages"),
    *("verified_pages", "mismatched_pages", "phases", "qemu_ram_transferred", "verify_ms"),
}


def _run(
    *arguments: str, timeout_s: float = 300, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MIGRATOR, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=env,
    )


def _last_json(stdout: str) -> dict[str, Any]:
    found = json.loads(stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


class Leftovers:
    """What a command that was run with ``environment`` has left behind.

    Its TMPDIR is a directory of its own, so whatever it started can be told by its environment.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "TMPDIR": str(directory)}
        self._shared_memory = self._look_at_shared_memory()

    @staticmethod
    def _look_at_shared_memory() -> set[Path]:
        """Without the benchmarks', which may run at the same time."""
        return {
            path
            for path in Path("/dev/shm").iterdir()
            if path.name.startswith(("qemu", "migrator"))
            and not path.name.startswith("migrator-bench")
        }

    def _look(self) -> list[str]:
        found = [str(path) for path in self.directory.iterdir()]
        found += [str(path) for path in self._look_at_shared_memory() - self._shared_memory]
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if f"TMPDIR={self.directory}\0".encode() in (entry / "environ").read_bytes():
                        found.append((entry / "cmdline").read_bytes().decode(errors="replace"))
        return found

    def check(self) -> None:
        """Check that nothing was left behind; a process may take a moment to be gone."""
        deadline = time.monotonic() + 5
        while (left := self._look()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left == []


@pytest.fixture
def leftovers(tmp_path: Path) -> Leftovers:
    return Leftovers(tmp_path)


def test_demo(leftovers: Leftovers) -> None:
    done = _run("demo", "--json", env=leftovers.environment)
    assert done.returncode == 0, done.stderr
    report = _last_json(done.stdout)
    assert report.keys() >= KEYS
    assert report["status"] == "completed"
    assert report["verified_pages"] == (1 << 30) // 4096
    assert report["mismatched_pages"] == 0
    assert report["final_pages"] > 0
    assert report["guest"]["heartbeats_after"] >= 5
    in_phases = sum(report["phases"][name] for name in report["downtime_phases"])
    assert in_phases == pytest.approx(report["downtime_ms"], abs=1.0)
    assert "0 differ" in done.stderr
    leftovers.check()


@pytest.mark.thorough
def test_demo_with_other_options() -> None:
    done = _run("demo", "--memory", "128M", "--working-set", "8M", "--write-rate", "1000", "--json")
    assert done.returncode == 0, done.stderr
    report = _last_json(done.stdout)
    assert report["guest_bytes"] == 128 << 20
    assert report["mismatched_pages"] == 0
    # far from full speed, which would have written all 2048 pages of the working set
    assert report["final_pages"] < 1024


def test_a_working_set_that_does_not_fit_is_a_usage_error() -> None:
    done = _run("demo", "--memory", "64M", "--working-set", "60M")
    assert done.returncode == 2
    assert "working set" in done.stderr


@pytest.mark.thorough
def test_a_downtime_that_cannot_be_met_is_given_up_and_the_source_runs() -> None:
    async def body() -> None:
        async with pair() as vms:
            done = await asyncio.to_thread(
                _run,
                *["migrate", "--source", vms.source.qmp, "--destination", vms.destination.qmp],
                *["--downtime-limit", "1", "--max-rounds", "3", "--json"],
            )
            assert done.returncode == 1
            report = _last_json(done.stdout)
            assert report["status"] == "aborted"
            assert "does not converge" in report["reason"]
            assert len(report["rounds"]) == 3
            assert report["downtime_ms"] is None
            assert await vms.state(vms.source) == "running"
            # nothing had been asked of the destination yet: the same one can be used again
            again = await asyncio.to_thread(
                _run,
                *["migrate", "--source", vms.source.qmp, "--destination", vms.destination.qmp],
                *["--downtime-limit", "1", "--max-rounds", "3", "--on-limit", "force"],
                *["--verify", "--json"],
            )
            assert again.returncode == 0, again.stderr
            assert _last_json(again.stdout)["mismatched_pages"] == 0
            await vms.check_heartbeat_unbroken()

    asyncio.run(body())


def test_refused_by_preflight() -> None:
    async def body() -> None:
        async with pair(Machine(destination_extra=["-smp", "2"])) as vms:
            done = await asyncio.to_thread(
                _run,
                *["migrate", "--source", vms.source.qmp, "--destination", vms.destination.qmp],
                "--json",
            )
            assert done.returncode == 3
            said = _last_json(done.stdout)
            assert said["findings"][0]["check"] == "vCPUs"
            assert "-smp" in done.stderr
            assert await vms.state(vms.source) == "running"

    asyncio.run(body())


@pytest.mark.alone
def test_run_a_configuration(leftovers: Leftovers) -> None:
    done = _run("run", str(ROOT / "configs/demo.yaml"), "--json", env=leftovers.environment)
    assert done.returncode == 0, done.stderr
    assert _last_json(done.stdout)["mismatched_pages"] == 0
    leftovers.check()


@pytest.mark.thorough
def test_a_linux_guest_that_checks_its_memory(leftovers: Leftovers) -> None:
    done = _run(
        "run", str(ROOT / "configs/linux.yaml"), "--json", env=leftovers.environment, timeout_s=600
    )
    assert done.returncode == 0, done.stderr
    report = _last_json(done.stdout)
    assert report["mismatched_pages"] == 0
    assert report["pages_sent"] > 0
    leftovers.check()


@pytest.mark.thorough
def test_a_linux_guest_notices_pages_that_were_lost(leftovers: Leftovers, tmp_path: Path) -> None:
    """The other side: the same with the tracker's reports thrown away, and nothing compared."""
    text = (ROOT / "configs/linux.yaml").read_text()
    text = text.replace("./linux-guest", str(ROOT / "configs/linux-guest"))
    config = tmp_path / "lossy.yaml"
    config.write_text(text.replace("verify: true", "verify: false"))
    done = subprocess.run(
        [sys.executable, "-c", _LOSSY, "run", str(config), "--json"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=leftovers.environment,
    )
    config.unlink()
    assert done.returncode == 4, done.stderr
    said = _last_json(done.stdout)
    assert said["status"] == "failed"
    assert "destination" in said["reason"]
    leftovers.check()


_LOSSY = """
from migrator.cli.main import main
from tracker.bits.bitmap import DirtyBitmap
from tracker.sources.uffd import UffdAsync
scan_into = UffdAsync._scan_into
def lossy(self, dirty, *where, **how):
    scan_into(self, DirtyBitmap.empty(dirty.npages), *where, **how)
UffdAsync._scan_into = lossy
main()
"""


@pytest.mark.alone
def test_a_destination_that_is_to_be_kept(leftovers: Leftovers, tmp_path: Path) -> None:
    text = (ROOT / "configs/demo.yaml").read_text()
    before, source, destination = text.split("  keep: false\n")
    config = tmp_path / "keep.yaml"
    config.write_text(f"{before}{source}  keep: true\n{destination}")
    done = _run("run", str(config), env=leftovers.environment)
    config.unlink()
    assert done.returncode == 0, done.stderr
    found = re.search(r"the destination stays: process (\d+), QMP socket\s+(\S+)", done.stderr)
    assert found is not None, done.stderr
    try:

        async def state() -> str:
            qmp = await Qmp.connect("destination", found[2])
            try:
                return await qmp.run_state()
            finally:
                await qmp.close()

        assert asyncio.run(state()) == "running"
    finally:
        os.kill(int(found[1]), signal.SIGKILL)
    shutil.rmtree(Path(found[2]).parent)
    leftovers.check()


def test_run_a_configuration_that_attaches(tmp_path: Path) -> None:
    async def body() -> None:
        async with pair() as vms:
            config = tmp_path / "attach.yaml"
            config.write_text(
                f"source: {{qmp: {vms.source.qmp}}}\ndestination: {{qmp: {vms.destination.qmp}}}\n"
            )
            done = await asyncio.to_thread(_run, "run", str(config), "--verify", "--json")
            assert done.returncode == 0, done.stderr
            assert _last_json(done.stdout)["mismatched_pages"] == 0
            await vms.check_heartbeat_unbroken()

    asyncio.run(body())


@pytest.mark.parametrize(
    "line",
    [
        *("starting", "the source runs", "migrating", "phase attach", "phase copy"),
        *("phase rounds", "phase switchover", "phase verify", "phase finish"),
    ],
)
def test_ctrl_c_leaves_nothing_behind(line: str, leftovers: Leftovers) -> None:
    # a terminal sends SIGINT to the whole foreground process group
    demo = subprocess.Popen(
        [*MIGRATOR, "demo", "--json"],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=leftovers.environment,
    )
    assert demo.stderr is not None
    assert any(said.startswith(line) for said in demo.stderr), f"it never said {line!r}"
    os.killpg(demo.pid, signal.SIGINT)
    stdout, stderr = demo.communicate(timeout=120)
    assert "Traceback" not in stderr
    status = _last_json(stdout)["status"]
    assert (demo.returncode, status) in ((0, "completed"), (1, "aborted"))
    if line not in ("phase switchover", "phase verify", "phase finish"):
        assert status == "aborted"
    leftovers.check()


def test_a_killed_demo_takes_its_vms_along(leftovers: Leftovers) -> None:
    demo = subprocess.Popen(
        [*MIGRATOR, "demo"], stderr=subprocess.PIPE, text=True, env=leftovers.environment
    )
    assert demo.stderr is not None
    assert any(said.startswith("the source runs") for said in demo.stderr)
    demo.kill()
    demo.communicate()
    (directory,) = leftovers.directory.iterdir()
    shutil.rmtree(directory)  # this is all that stays
    leftovers.check()


def test_the_library_example_of_the_readme() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1

    async def body() -> None:
        async with pair() as vms:  # whose sockets are named as in the example
            done = await asyncio.create_subprocess_exec(
                *[sys.executable, "-c", blocks[0]],
                cwd=vms.directory,
                stdout=subprocess.PIPE,
            )
            stdout, _ = await asyncio.wait_for(done.communicate(), 120)
            assert done.returncode == 0
            assert stdout.decode().splitlines()[-1].endswith("ms, 0 pages differ")
            await vms.check_heartbeat_unbroken()

    asyncio.run(body())
