"""What may be chosen, by name, and what is chosen by default: for commands, files and the library.

Nothing is imported here, so that ``migrator --help`` need not either.
"""

from __future__ import annotations

from typing import Literal

OnLimit = Literal["abort", "force"]
ON_LIMIT: tuple[OnLimit, ...] = ("abort", "force")

PolicyName = Literal["send-all", "defer-hot", "skip-unchanged", "adaptive"]
POLICIES: tuple[PolicyName, ...] = ("send-all", "defer-hot", "skip-unchanged", "adaptive")

TrackerName = Literal["auto", "uffd", "uffd-sync"]
TRACKERS: tuple[TrackerName, ...] = ("auto", "uffd", "uffd-sync")

STRATEGIES = (*TRACKERS, "soft-dirty", "content-hash", "coarse")
"""How a VM can be watched; with the first ones it can be moved, too."""

AccelName = Literal["auto", "kvm", "tcg"]
ACCELS: tuple[AccelName, ...] = ("auto", "kvm", "tcg")

DOWNTIME_LIMIT_MS = 100.0
MAX_ROUNDS = 60
MAX_SECONDS = 300.0
DEFAULT_ON_LIMIT: OnLimit = "abort"
DEFAULT_POLICY: PolicyName = "adaptive"
DEFAULT_TRACKER: TrackerName = "auto"
DEFAULT_ACCEL: AccelName = "auto"

STREAMS = 2
COMPRESS = "none"
RECONNECT_S = 30.0
SILENCE_S = 10.0
