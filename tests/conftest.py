"""What every test may use, and which tests a run has: all of the quick ones, and thorough ones."""

from __future__ import annotations

import fcntl
import os
import signal
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

# asserts in helpers tell what they saw, too
pytest.register_assert_rewrite(
    "tests.bench", "tests.faults", "tests.lab", "tests.live", "tests.migrator", "tests.tracker"
)

from tests.profiles import load_profile  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough",
        nargs="?",
        const="1/1",
        metavar="PART/PARTS",
        help="run the tests that a quick run leaves out, too, or a part of them, such as 2/3; with "
        "the first part, look at more generated examples",
    )


def pytest_configure(config: pytest.Config) -> None:
    # generated examples, and loops inside a test, belong to the first part
    load_profile(thorough=(config.getoption("--thorough") or "").startswith("1/"))


def pytest_report_header() -> str:
    """The seed of the disturbed migrations; chosen here, before xdist starts its workers."""
    seed = os.environ.get("MIGRATOR_FAULTS_SEED") or str(time.time_ns() % (1 << 32))
    os.environ["MIGRATOR_FAULTS_SEED"] = seed
    return f"disturbed migrations: MIGRATOR_FAULTS_SEED={seed}"


def _is_of_part(item: pytest.Item, part: int, parts: int) -> bool:
    """By its name alone, so that a test stays in its part when others come or go."""
    return zlib.crc32(item.nodeid.encode()) % parts == part - 1


def _thorough(items: list[pytest.Item]) -> list[pytest.Item]:
    """Those that a quick run leaves out: marked so, or not the one in so many of a function."""
    found, seen = [], Counter[tuple[Path, str]]()
    for item in items:
        one_in = item.get_closest_marker("one_in")
        function = item.path, item.nodeid.partition("[")[0]
        if item.get_closest_marker("thorough"):
            found.append(item)
        elif one_in is not None:
            if seen[function] % one_in.args[0]:
                found.append(item)
            seen[function] += 1
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--thorough")
    part, parts = (int(word) for word in (chosen or "0/1").split("/"))
    if not 0 <= part <= parts:
        raise pytest.UsageError(f"--thorough: there is no part {chosen}")
    left_out = {item for item in _thorough(items) if not (part and _is_of_part(item, part, parts))}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _turns(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Let a test marked ``alone`` run while no worker of xdist runs another one.

    All lock one file, most of them together. One that wants it alone holds a second one meanwhile,
    for which the others wait: otherwise there would always be another one.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    directory = tmp_path_factory.getbasetemp().parent  # of all workers
    alone = request.node.get_closest_marker("alone") is not None
    how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    with open(directory / "running", "ab") as running, open(directory / "next", "ab") as following:
        fcntl.flock(following, how)
        fcntl.flock(running, how)
        fcntl.flock(following, fcntl.LOCK_UN)
        yield


@pytest.fixture(autouse=True, scope="session")
def _sockets_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Migrations of tests are not served among the user's, where a killed one leaves its socket."""
    os.environ["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("runtime"))


@pytest.fixture(autouse=True, scope="session")
def _signals_are_heeded() -> None:
    """By what tests start, too: in the background of a shell, or under ``nohup``, they are ignored.

    A process inherits that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def require(missing: str | None) -> None:
    """Skip the running test because of ``missing``; go on if that is ``None`` or empty.

    With ``MIGRATOR_REQUIRE_LIVE=1`` in the environment the test fails instead of being skipped.
    """
    if not missing:
        return
    if os.environ.get("MIGRATOR_REQUIRE_LIVE") == "1":
        pytest.fail(f"a live test cannot run here: {missing}")
    pytest.skip(missing)
