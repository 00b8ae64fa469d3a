"""Pages that were written, and hold what they held before: are they worth looking for? Pure."""

from __future__ import annotations

from dataclasses import dataclass

SAMPLE = 16
"""Of so many words of a bitmap, one is looked at first."""

_FEW_BYTES = 1 << 20


@dataclass(frozen=True)
class Sampled:
    """What comparing some of the pages found.

    :ivar compared_bytes: how much was compared
    :ivar unchanged_bytes: of this, what needs no sending
    :ivar spent_s: what it took
    """

    compared_bytes: int
    unchanged_bytes: int
    spent_s: float

    @property
    def share(self) -> float:
        """Unchanged pages among all of them."""
        return self.unchanged_bytes / self.compared_bytes if self.compared_bytes else 0.0

    @property
    def bytes_per_s(self) -> float:
        """The rate at which pages are compared."""
        return self.compared_bytes / max(self.spent_s, 1e-6)


def worth_sampling(dirty_bytes: int) -> bool:
    """Whether there is enough to be saved."""
    return dirty_bytes >= _FEW_BYTES


def worth_comparing(sampled: Sampled, bytes_per_s: float) -> bool:
    """Whether comparing the rest takes less time than the sending that it saves.

    :param bytes_per_s: the rate at which pages are sent
    """
    if not sampled.compared_bytes:
        return False
    return sampled.share / max(bytes_per_s, 1.0) > 1 / sampled.bytes_per_s
