"""Everything compiled that a migration to another host runs."""

from __future__ import annotations

import tracker.warm
from migrator.transport import runs


def warm_up() -> None:
    """Compile every kernel, those of frames too, or load it from disk."""
    tracker.warm.warm_up()
    runs.warm_up()
