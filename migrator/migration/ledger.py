"""Which pages the destination lacks, and why they were not sent yet."""

from __future__ import annotations

from collections.abc import Iterable

from tracker.bits.pageset import Block, PageSet


class Ledger:
    """Pages that were written, and that the destination does not have.

    Until the destination has it, a page that was written is known in one of three places. The
    *sources* report it at the next collection. *Owed* is what a sending did not deliver. *Waiting*
    is what is written again and again: it is not sent before the end, and may be left unprotected,
    so that it is not known whether it is still written.

    :ivar owed: see above
    :ivar waiting: see above
    :ivar left: of the pages that wait, those that are unprotected
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._none = PageSet.empty(blocks)
        self.owed = self.waiting = self.left = self._none

    def take(
        self, found: PageSet, waiting: PageSet | None = None, left: PageSet | None = None
    ) -> PageSet:
        """Begin a round: take all that is to be sent, as of a collection.

        :param found: what the collection found
        :param waiting: of these, what waits from now on; ``None``: nothing
        :param left: of what waits, what was left unprotected
        :return: what was found, what was owed, and what waited until now; the caller's to change
        """
        dirty = found | self.owed
        dirty |= self.waiting
        self.owed = self._none
        self.waiting = self._none if waiting is None else waiting
        self.left = self._none if left is None else left
        return dirty

    def owe(self, pages: PageSet) -> None:
        """Remember pages that were taken, and not delivered."""
        self.owed = self.owed | pages

    def protected(self) -> None:
        """Let nothing wait any more: what was left has been protected, and is in the round."""
        self.waiting = self.left = self._none
