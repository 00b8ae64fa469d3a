"""Any change, whoever made it: the memory itself is read, and compared with what was copied.

It needs nothing of the kernel, and sees what no page table shows: DMA, other mappings, discards.
Each collection reads everything that holds data.
"""

from __future__ import annotations

from collections.abc import Sequence

from tracker.bits.pageset import PageSet
from tracker.errors import RamError, SourceError
from tracker.memory.copies import Copies
from tracker.memory.ram import RamBlock


class ContentHash:
    """Pages that differ from their copies, by the digests of both.

    :cvar exact: what is reported differs, or nobody has told of a copy
    :ivar copies: to be told of every page that was copied, before the next collection; a page
        counts as written until then
    """

    name = "content-hash"
    exact = True

    def __init__(self, pid: int, blocks: Sequence[RamBlock], *, copied: bool = True) -> None:
        """Prepare; nothing is done yet.

        :param copied: whether somebody copies the pages; if not, they are compared with what they
            were at the last collection, or when this source was started
        """
        self._blocks = tuple(blocks)
        self._copied = copied
        self.copies = Copies(pid, blocks, copied=copied)
        self._started = False

    def start(self) -> None:
        """Map all blocks. No copy is known, so that every page counts as written.

        Where nobody copies, all is read once, and no page counts.

        :raise SourceError: a file cannot be opened or mapped
        """
        try:
            self.copies.open()
            if not self._copied:
                self._look()
        except (OSError, RamError) as error:
            self.stop()
            raise SourceError(self.name, str(error)) from error
        self._started = True

    def collect(self) -> PageSet:
        """Pages that are not what their copies are, or of whose copies nobody has told.

        :raise SourceError: a file cannot be asked
        """
        if not self._started:
            raise SourceError(self.name, "is not started")
        try:
            return self._look()
        except (OSError, RamError) as error:
            raise SourceError(self.name, str(error)) from error

    def _look(self) -> PageSet:
        everything = PageSet.full(self._blocks)
        return PageSet(
            self._blocks, {n: self.copies.differing(n, pages) for n, pages in everything.items()}
        )

    def stop(self) -> None:
        """Let go of the files. May be called again."""
        self.copies.close()
        self._started = False
