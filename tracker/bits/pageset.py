"""Pages of several RAM blocks at once: what a dirty source reports, and a round sends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from tracker.bits.bitmap import DirtyBitmap
from tracker.errors import BitmapError


class Block(Protocol):
    """What a page set has to know of a RAM block; see :class:`tracker.memory.ram.RamBlock`."""

    @property
    def name(self) -> str:
        """Name, unique among the blocks."""

    @property
    def npages(self) -> int:
        """Number of pages."""

    @property
    def page_size(self) -> int:
        """Bytes of a page."""


class PageSet(Mapping[str, DirtyBitmap]):
    """A set of pages of some RAM blocks: a bitmap for each block, by the block's name.

    It always has a bitmap for each of its blocks, so that a block cannot be forgotten. Two sets
    that are combined must be of the same blocks.

    :ivar blocks: the blocks, in the order of iteration
    """

    __slots__ = ("_bitmaps", "blocks")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, blocks: Iterable[Block], bitmaps: Mapping[str, DirtyBitmap]) -> None:
        """Make a set of these bitmaps, which are not copied.

        :raise BitmapError: a block has no bitmap, or one of another number of pages, or there is a
            bitmap of no block
        """
        self.blocks = tuple(blocks)
        names = [block.name for block in self.blocks]
        if missing := [name for name in names if name not in bitmaps]:
            raise BitmapError(f"says nothing about {sorted(missing)}")
        if unknown := [name for name in bitmaps if name not in names]:
            raise BitmapError(f"reports blocks that are not known: {sorted(unknown)}")
        self._bitmaps = {name: bitmaps[name] for name in names}
        for block in self.blocks:
            npages = self._bitmaps[block.name].npages
            if npages != block.npages:
                raise BitmapError(f"has {npages} pages of {block.name!r}, not {block.npages}")

    @classmethod
    def empty(cls, blocks: Iterable[Block]) -> PageSet:
        """No page of these blocks."""
        blocks = tuple(blocks)
        return cls(blocks, {block.name: DirtyBitmap.empty(block.npages) for block in blocks})

    @classmethod
    def full(cls, blocks: Iterable[Block]) -> PageSet:
        """All pages of these blocks."""
        blocks = tuple(blocks)
        return cls(blocks, {block.name: DirtyBitmap.full(block.npages) for block in blocks})

    def __getitem__(self, name: str) -> DirtyBitmap:
        return self._bitmaps[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bitmaps)

    def __len__(self) -> int:
        """Count the blocks; for the pages see :meth:`count`."""
        return len(self._bitmaps)

    def of(self, blocks: Iterable[Block]) -> PageSet:
        """Make the set of its pages of some of its blocks; it shares their bitmaps."""
        blocks = tuple(blocks)
        return PageSet(blocks, {block.name: self[block.name] for block in blocks})

    def count(self) -> int:
        """Count the pages, of whatever size."""
        return sum(bitmap.count() for bitmap in self._bitmaps.values())

    def nbytes(self) -> int:
        """Add up the sizes of the pages, in bytes."""
        return sum(self._bitmaps[b.name].count() * b.page_size for b in self.blocks)

    def measure(self) -> tuple[int, int]:
        """Count the pages, and add up their sizes in bytes: both in one pass."""
        counts = [(self._bitmaps[b.name].count(), b.page_size) for b in self.blocks]
        return sum(n for n, _ in counts), sum(n * size for n, size in counts)

    def any(self) -> bool:
        """Tell whether there is a page."""
        return any(bitmap.any() for bitmap in self._bitmaps.values())

    def copy(self) -> PageSet:
        """Make a set of the same pages that shares nothing with this one."""
        return self.each(DirtyBitmap.copy)

    def each(self, change: Callable[[DirtyBitmap], DirtyBitmap]) -> PageSet:
        """Make the set of what ``change`` makes of each block's bitmap."""
        return PageSet(self.blocks, {name: change(pages) for name, pages in self.items()})

    def __or__(self, other: PageSet) -> PageSet:
        union = self.copy()
        union |= other
        return union

    def __ior__(self, other: PageSet) -> PageSet:
        self._check_same(other)
        for name, pages in self._bitmaps.items():
            pages |= other[name]
        return self

    def __and__(self, other: PageSet) -> PageSet:
        self._check_same(other)
        return PageSet(self.blocks, {name: p & other[name] for name, p in self.items()})

    def __sub__(self, other: PageSet) -> PageSet:
        self._check_same(other)
        return PageSet(self.blocks, {name: p - other[name] for name, p in self.items()})

    def _check_same(self, other: PageSet) -> None:
        if self.keys() != other.keys():
            raise BitmapError(f"pages of {sorted(self)} and of {sorted(other)}")

    def __repr__(self) -> str:
        return f"<PageSet: {self._bitmaps}>"
