"""The ranges of numbers that options and configuration files take: one list for both.

A number that is no number (``nan``), infinite, or outside its range is refused at the door, with
the range in the message; nothing behind the door has to expect it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_LONGEST = 64  # characters of a number; more are a mistake, and slow to read


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` to ``most``, both of them included.

    :ivar unit: the unit, for messages; ``""`` for counts
    :ivar whole: whether only whole numbers are meant
    """

    least: float
    most: float
    unit: str = ""
    whole: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        text = f"{kind} from {self.least:,.15g} to {self.most:,.15g}"
        return f"{text} {self.unit}" if self.unit else text

    def parse(self, text: object) -> float:
        """A number as it is written in decimal ASCII digits, within the range.

        :return: an ``int`` where only whole numbers are meant
        :raise ValueError: it is something else
        """
        if isinstance(text, (int, float)) and not isinstance(text, bool):
            return self.check(text)
        written = text.strip() if isinstance(text, str) else ""
        if len(written) > _LONGEST or not _NUMBER.fullmatch(written):
            raise ValueError(f"expected {self}")
        return self.check(int(written) if re.fullmatch("[+-]?[0-9]+", written) else float(written))

    def check(self, number: float) -> float:
        """The same number, if it is within the range.

        :raise ValueError: it is not, or is not whole where it has to be
        """
        # comparisons with nan are false, those with a huge int are exact
        if not self.least <= number <= self.most or (self.whole and number != math.floor(number)):
            raise ValueError(f"expected {self}")
        return int(number) if self.whole else float(number)


_DAY_S = 86_400

DOWNTIME_MS = Range(0.001, 1000 * _DAY_S, "ms")
ROUNDS = Range(1, 1_000_000, whole=True)
MIGRATION_S = Range(0.001, 365 * _DAY_S, "s")
STANDSTILL_S = Range(1, _DAY_S, "s")
WAIT_S = Range(0.001, _DAY_S, "s")
SETTLE_S = Range(0, _DAY_S, "s")
RECONNECT_S = Range(0, 3600, "s")  # receivers wait no longer
SILENCE_S = Range(0.1, 3600, "s")  # likewise
STREAMS = Range(1, 32, whole=True)
BANDWIDTH_BYTES_PER_S = Range(1 << 10, 1 << 50, "bytes/s", whole=True)
BANDWIDTH_MIB_PER_S = Range((1 << 10) / (1 << 20), (1 << 50) / (1 << 20), "MiB/s")
WATCH_S = Range(0.001, 365 * _DAY_S, "s")
INTERVAL_S = Range(0.1, _DAY_S, "s")
INTERVAL_MS = Range(1, 1000 * _DAY_S, "ms")
PAGES_PER_S = Range(0, (1 << 31) - 1, "pages/s", whole=True)
SIZE_BYTES = Range(0, 1 << 52, "bytes", whole=True)  # an x86 processor addresses no more
DAYS = Range(1, 3650, "days", whole=True)
RUNS = Range(1, 10_000, whole=True)
