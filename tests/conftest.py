"""What every test may use: skipping that turns into failing where the machine must be able."""

from __future__ import annotations

import os
import signal

import pytest


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
