"""How pages get to the destination: what the loop asks of every transport."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tracker.bitmap import DirtyBitmap


@dataclass
class Sent:
    """What came of one sending.

    :ivar pages: pages whose content the destination now has
    :ivar zero_pages: of these, zeros and holes, for which nothing was copied
    :ivar bytes: bytes copied
    :ivar undelivered: pages that were asked for and did not arrive, by block; they are owed
    :ivar error: why, where something did not arrive
    """

    pages: int = 0
    zero_pages: int = 0
    bytes: int = 0
    undelivered: dict[str, DirtyBitmap] = field(default_factory=dict)
    error: Exception | None = None


@dataclass(frozen=True)
class Comparison:
    """What comparing both sides found.

    :ivar pages: pages compared
    :ivar mismatched: of these, pages that differ
    """

    pages: int
    mismatched: int


class Transport(Protocol):
    """Carries pages from the source's RAM blocks to the destination's.

    Dirty pages are always collected, and thereby protected again, before they are given to
    :meth:`send`: a page that changes while it is sent is dirty again.
    """

    @property
    def sent_pages(self) -> int:
        """Pages sent by the sending that is under way, or by the last one."""

    async def open(self) -> None:
        """Connect both sides.

        :raise OSError: one of them cannot be reached
        """

    async def send(self, dirty: Mapping[str, DirtyBitmap], data: Mapping[str, DirtyBitmap]) -> Sent:
        """Make the dirty pages at the destination what they are at the source.

        :param dirty: pages to send, by block
        :param data: pages that hold data, by block, as of after ``dirty`` was collected; the
            others are holes, to be cleared at the destination and not to be read here
        """

    async def changed(
        self, pages: Mapping[str, DirtyBitmap], data: Mapping[str, DirtyBitmap]
    ) -> dict[str, DirtyBitmap]:
        """Which of the pages are not at the destination as they are at the source.

        :param pages: pages to compare, by block; nothing can write them any more
        :param data: see :meth:`send`
        """

    async def compare(self) -> Comparison:
        """Compare all pages of all blocks on both sides. Both VMs stand still."""

    async def close(self) -> None:
        """Let go of both sides. May be called again."""
