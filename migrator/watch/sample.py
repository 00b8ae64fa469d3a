"""What a watch tells: how much was written in an interval, where, and what moving it would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from migrator.policy.forecast import Forecast
from migrator.policy.judge import Limits
from tracker.bits.heat import History
from tracker.memory.ram import RamBlock

WINDOWS_S = (1, 10, 60)
"""Of what times the working set is told."""
CELLS = 64
"""Into how many ranges a block is divided in JSON."""


@dataclass(frozen=True)
class Watched:
    """A block of RAM.

    :ivar data_bytes: bytes that hold data; all of them if there is no file that tells
    :ivar history: what was written, and when; it is changed in the next interval
    """

    block: RamBlock
    data_bytes: int
    history: History


@dataclass(frozen=True)
class Sight:
    """What was seen in one interval.

    :ivar at_s: its end, since the watch began
    :ivar over_s: its length
    :ivar state: QEMU's run state at its end
    :ivar tracker: which strategy notes the CPU's writes
    :ivar notes: what has to be known about all this, a sentence an item
    :ivar dirty_pages_per_s: by source; a page that was written twice in a second counts once
    :ivar dirty_bytes_per_s: that any exact source reported
    :ivar working_set_bytes: distinct pages that were written in the last so many seconds;
        ``None`` for longer than has been watched
    """

    at_s: float
    over_s: float
    state: str
    tracker: str
    notes: tuple[str, ...]
    dirty_pages_per_s: Mapping[str, float]
    dirty_bytes_per_s: float
    working_set_bytes: Mapping[int, int | None]
    blocks: tuple[Watched, ...]
    bytes_per_s: float
    limits: Limits
    forecast: Forecast

    def to_json(self) -> dict[str, Any]:
        """As JSON: ``migrator watch --help`` tells its members."""
        return {
            "at_s": self.at_s,
            "over_s": self.over_s,
            "state": self.state,
            "tracker": self.tracker,
            "notes": list(self.notes),
            "dirty_pages_per_s": dict(self.dirty_pages_per_s),
            "dirty_bytes_per_s": self.dirty_bytes_per_s,
            "working_set_bytes": {str(s): found for s, found in self.working_set_bytes.items()},
            "blocks": [
                {
                    "name": one.block.name,
                    "bytes": one.block.size,
                    "page_size": one.block.page_size,
                    "file": one.block.has_file,
                    "data_bytes": one.data_bytes,
                    "heat": [round(float(heat), 4) for heat in one.history.strip(CELLS)],
                }
                for one in self.blocks
            ],
            "forecast": {
                "bytes_per_s": self.bytes_per_s,
                "downtime_limit_ms": self.limits.downtime_ms,
                **asdict(self.forecast),
            },
        }
