"""What the destination has, by its digests: which pages differ from it.

*Of what bytes.* Of those that were sent, which whoever copies has to tell (:meth:`Copies.copied`).
Digests taken when a page is found to differ, before it is copied, would not do: a page is B when it
is looked at, C when it is copied, and B again at the next look, whose digest is the last one's,
while the destination keeps C. Nor does an old copy count while a new one may be on its way: a page
that was found to differ does so until its next copy is told of.

Two pages may have one digest: :mod:`tracker.memory.pagehash` has the odds, and for whom they do not
hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tracker.bits.bitmap import DirtyBitmap
from tracker.errors import BitmapError
from tracker.memory.mapped import Mapped
from tracker.memory.pagehash import Digests, new_seed, selected_digests
from tracker.memory.ram import RamBlock


class Copies:
    """The memory of a process, and digests of its copy elsewhere.

    :ivar seed: of all digests; 0 to 2**64 - 1
    """

    def __init__(self, pid: int, blocks: Sequence[RamBlock], *, copied: bool = True) -> None:
        """Prepare; nothing is opened yet.

        :param copied: whether somebody copies the pages. If nobody does, what was seen at the last
            look stands for the copy: for who only wants to know what changes.
        """
        self._pid = pid
        self._copied = copied
        self._blocks = {block.name: block for block in blocks}
        self.seed = new_seed()
        self._rams: dict[str, Mapped] = {}
        self._digests: dict[str, Digests] = {}
        self._known: dict[str, NDArray[np.bool_]] = {}

    def open(self) -> None:
        """Map all blocks. No copy is known yet.

        :raise OSError: a file cannot be opened or mapped; what was opened is left to :meth:`close`
        :raise RamError: the process holds no descriptor of a file
        """
        for name, block in self._blocks.items():
            self._rams[name] = Mapped(self._pid, block)
            self._digests[name] = np.zeros(block.npages, np.uint64)
            self._known[name] = np.zeros(block.npages, np.bool_)

    def differing(self, name: str, pages: DirtyBitmap) -> DirtyBitmap:
        """Find those of the pages that are not what their copies are, or have none that is known.

        These have none from now on, until :meth:`copied`; or, where nobody copies, what is seen
        now. Holes are not read.

        :param name: of the block
        :raise OSError: its file cannot be asked
        :raise RamError: it became shorter
        """
        if not pages.any():
            return DirtyBitmap.empty(pages.npages)
        ram = self._rams[name]
        data = ram.data().words
        numbers = pages.pages()
        now = np.empty(len(numbers), np.uint64)
        memory, words = ram.memory, pages.words
        selected_digests(memory, ram.block.page_size, words, data, self.seed, now, 0, len(words))
        known = self._known[name]
        found = numbers[(now != self._digests[name][numbers]) | ~known[numbers]]
        if self._copied:
            known[found] = False
        else:
            self._digests[name][numbers] = now
            known[numbers] = True
        return DirtyBitmap.from_pages(pages.npages, found)

    def copied(self, name: str, pages: DirtyBitmap, digests: Digests) -> None:
        """Tell what the destination has; before the next look, or never.

        Told of later, a copy could be taken for one that is on its way by then. A page whose copy
        is not told of counts as different.

        :param name: of the block
        :param pages: that were copied, zeros and holes too
        :param digests: one for each of the pages, in their order, with our :attr:`seed`: of the
            bytes that were sent, or of the destination's copy, *never* of a second look at the
            guest's page (:func:`tracker.memory.pagehash.selected_digests`, of a copy of the whole
            block; :func:`tracker.memory.pagehash.page_digests`, of pages that lie in one row)
        :raise BitmapError: not one digest a page, or pages of another block
        """
        if pages.npages != self._blocks[name].npages:
            reason = f"a bitmap of {pages.npages} pages, of {self._blocks[name].npages}"
            raise BitmapError(reason)
        if len(digests) != pages.count():
            raise BitmapError(f"{len(digests)} digests of {pages.count()} pages")
        mask = pages.mask()
        self._digests[name][mask] = digests
        self._known[name] |= mask

    def close(self) -> None:
        """Let go of the files. May be called again."""
        while self._rams:
            self._rams.popitem()[1].close()
