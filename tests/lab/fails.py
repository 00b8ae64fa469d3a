"""A test that fails in the lab VM, for the test that this is seen outside; not collected."""

from __future__ import annotations

import os
import platform


def test_that_fails() -> None:
    assert (platform.release(), os.environ.get("MIGRATOR_REQUIRE_LIVE")) == ("outside", None)
