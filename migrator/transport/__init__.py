"""How pages get to the destination: what the loop asks of every transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from migrator.errors import NoSpace
from tracker.bits.pageset import PageSet


@dataclass
class Sent:
    """What came of one sending.

    :ivar pages: pages whose content the destination now has
    :ivar zero_pages: of these, zeros and holes, for which nothing was copied
    :ivar bytes: bytes of pages copied
    :ivar wire_bytes: bytes that went over a network for it
    :ivar least_s: what sending as much takes in the long run, where the rate is limited: after a
        pause, a little passes faster
    :ivar undelivered: pages that were asked for and did not arrive; they are owed
    :ivar reconnected: the link broke, and was made again
    :ivar error: why, where something did not arrive
    """

    pages: int = 0
    zero_pages: int = 0
    bytes: int = 0
    wire_bytes: int = 0
    least_s: float = 0.0
    undelivered: PageSet | None = None
    reconnected: bool = False
    error: Exception | None = None


@dataclass(frozen=True)
class Comparison:
    """What comparing both sides found.

    :ivar pages: pages compared
    :ivar mismatched: of these, pages that differ
    """

    pages: int
    mismatched: int


class Sender(Protocol):
    """Carries pages from the source's RAM blocks to the destination's, once both are connected.

    Dirty pages are always collected, and thereby protected again, before they are given to
    :meth:`send`: a page that changes while it is sent is dirty again.
    """

    @property
    def sent_pages(self) -> int:
        """Pages sent by the sending that is under way, or by the last one."""

    @property
    def compares_bytes(self) -> bool:
        """Whether :meth:`changed` compares bytes, not digests of them."""

    async def send(
        self,
        dirty: PageSet,
        data: PageSet,
        *,
        guest_stands: bool = False,
    ) -> Sent:
        """Make the dirty pages at the destination what they are at the source.

        :param dirty: pages to send
        :param data: pages that hold data, as of after ``dirty`` was collected; the
            others are holes, to be cleared at the destination and not to be read here
        :param guest_stands: what breaks now is an error, not something to be waited for
        """

    async def changed(
        self,
        pages: PageSet,
        data: PageSet,
        *,
        guest_stands: bool = False,
    ) -> PageSet:
        """Which of the pages are not at the destination as they are at the source.

        :param pages: pages to compare; what writes them from now on is reported
        :param data: see :meth:`send`; likewise ``guest_stands``
        """


class Transport(Sender, Protocol):
    """A sender, from the connecting of both sides to the end."""

    async def open(self) -> None:
        """Connect both sides, and reserve at the destination the pages that the source holds.

        :raise OSError: one of them cannot be reached
        :raise NoSpace: the destination lacks the space; nothing stays reserved
        """

    def shortage(self) -> NoSpace | None:
        """Whether the copy leaves the source too little space to grow. Takes microseconds.

        Always ``None`` where both sides share no file system.
        """

    async def check_room(self) -> None:
        """Check that the guest may grow at the destination as it may at the source.

        :raise NoSpace: it may not: it would die of SIGBUS where it lives on at the source
        :raise OSError: a file cannot be looked at
        """

    async def compare(self) -> Comparison:
        """Compare all pages of all blocks on both sides. Both VMs stand still."""

    async def give_back(self) -> None:
        """Punch out of the destination's files all that was allocated there for this migration.

        Only to be called where the destination certainly will not run. A destination on another
        host does it by itself, once it knows. May be called again, and when nothing is open.

        :raise OSError: the file system does not take it back
        """

    async def close(self) -> None:
        """Let go of both sides. May be called again."""
