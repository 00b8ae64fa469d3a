"""What every test may use: skipping that turns into failing where the machine must be able."""

from __future__ import annotations

import os

import pytest


def require(missing: str | None) -> None:
    """Skip the running test because of ``missing``; go on if that is ``None`` or empty.

    With ``MIGRATOR_REQUIRE_LIVE=1`` in the environment the test fails instead of being skipped.
    """
    if not missing:
        return
    if os.environ.get("MIGRATOR_REQUIRE_LIVE") == "1":
        pytest.fail(f"a live test cannot run here: {missing}")
    pytest.skip(missing)
