"""What the documents say about two hosts, as it is written there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.live.twohosts import Host, TwoHosts, two_hosts
from tests.tracker.targets import wait_until

pytestmark = pytest.mark.live

TWO_HOSTS = Path(__file__).parents[2] / "docs" / "two-hosts.md"
SOCKET = Path("/run/a.qmp")


def blocks() -> list[str]:
    """Its commands, in order."""
    return re.findall(r"^```sh\n(.*?)^```", TWO_HOSTS.read_text(), re.MULTILINE | re.DOTALL)


def start(host: Host, command: str, directory: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return host.run(
        ["sh", "-c", f"exec {command}"],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_example_of_two_hosts(tmp_path: Path) -> None:
    keys, source, receive, send, resolve = blocks()
    assert not SOCKET.exists()
    with two_hosts() as hosts:
        assert (hosts.a.address, hosts.b.address) == ("192.0.2.1", "192.0.2.2")
        try:
            _as_written(hosts, keys, source, receive, send, resolve, tmp_path)
        finally:
            SOCKET.unlink(missing_ok=True)


def _as_written(
    hosts: TwoHosts,
    keys: str,
    source: str,
    receive: str,
    send: str,
    resolve: str,
    directory: Path,
) -> None:
    made = start(hosts.a, keys, directory)
    assert made.wait(60) == 0, made.communicate()
    start(hosts.a, source, directory)
    receiver = start(
        hosts.b, receive.replace("migrator receive", "migrator receive --json"), directory
    )
    wait_until(SOCKET.exists)
    assert receiver.stderr is not None
    assert "waiting" in receiver.stderr.readline()
    sender = start(hosts.a, send.replace("migrator send", "migrator send --json"), directory)
    said, words = sender.communicate(timeout=120)
    assert sender.returncode == 0, words
    report = json.loads(said.splitlines()[-1])
    assert report["mismatched_pages"] == 0
    assert report["verified_pages"] == (1 << 30) // 4096
    said, words = receiver.communicate(timeout=60)
    assert receiver.returncode == 0, words
    here = json.loads(said.splitlines()[-1])
    assert here["state"] == "running"
    try:
        os.kill(here["pid"], 0)
        asked = start(hosts.a, resolve, directory)
        _, words = asked.communicate(timeout=60)
        assert "the source is 'postmigrate'" in words
    finally:
        os.kill(here["pid"], signal.SIGKILL)
        time.sleep(0.1)
        shutil.rmtree(Path(here["qmp"]).parent)  # which it needs as long as it runs
