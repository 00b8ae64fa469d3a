"""Which pages of a RAM block: one bit a page."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tracker.bits import words as kernels
from tracker.errors import BitmapError


class DirtyBitmap:
    """A set of pages of one RAM block.

    Page i is bit ``i % 64`` of ``words[i // 64]``: ``uint64``, native byte order (little-endian on
    all machines this runs on, so that the words' bytes are the kernel's and QEMU's bitmaps too).
    The bits past the last page are always zero, and bitmaps of different length never meet: every
    operation on two of them checks.

    Whoever writes to :attr:`words` directly answers for the tail.

    :ivar npages: number of pages, 0 or more
    :ivar words: shape ``((npages + 63) // 64,)``
    """

    __slots__ = ("npages", "words")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, npages: int, words: NDArray[np.uint64] | None = None) -> None:
        """Make an empty bitmap, or one on the given words, which are not copied.

        :raise BitmapError: words of another type or length, not contiguous, not writable, or with
            bits set past the last page
        """
        if npages < 0:
            raise BitmapError(f"a bitmap of {npages} pages")
        self.npages = int(npages)
        nwords = (self.npages + 63) // 64
        if words is None:
            words = np.zeros(nwords, dtype=np.uint64)
        elif not isinstance(words, np.ndarray) or words.dtype != np.uint64:
            raise BitmapError(f"words are {getattr(words, 'dtype', type(words))}, not uint64")
        elif words.shape != (nwords,):
            raise BitmapError(f"{npages} pages need {nwords} words, got {words.shape}")
        elif not words.flags.c_contiguous or not words.flags.writeable:
            raise BitmapError("words are not contiguous, or not writable")
        self.words = words
        self._check_tail()

    def _check_tail(self) -> None:
        if self._tail() and int(self.words[-1]) >> self._tail():
            raise BitmapError(f"bits are set past the last of {self.npages} pages")

    def _tail(self) -> int:
        return self.npages % 64

    @classmethod
    def empty(cls, npages: int) -> DirtyBitmap:
        """No page."""
        return cls(npages)

    @classmethod
    def full(cls, npages: int) -> DirtyBitmap:
        """All pages."""
        bitmap = cls(npages)
        bitmap.set_all()
        return bitmap

    @classmethod
    def from_pages(cls, npages: int, pages: NDArray[np.integer] | list[int]) -> DirtyBitmap:
        """These pages, in any order.

        :raise BitmapError: a page outside the block, or numbers that are not integers
        """
        bitmap = cls(npages)
        numbers = np.asarray(pages)
        if numbers.size == 0:
            return bitmap
        if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
            raise BitmapError("page numbers are not a row of integers")
        if int(numbers.min()) < 0 or int(numbers.max()) >= npages:
            raise BitmapError(f"a page outside the {npages} pages of the block")
        starts = np.ascontiguousarray(numbers, dtype=np.int64)
        kernels.set_ranges(bitmap.words, starts, starts + 1, len(starts))
        return bitmap

    def count(self) -> int:
        """Count the pages that are set."""
        return int(kernels.popcount(self.words))

    def any(self) -> bool:
        """Tell whether any page is set."""
        return bool(self.words.any())

    def copy(self) -> DirtyBitmap:
        """Make a bitmap of the same pages that shares nothing with this one."""
        return DirtyBitmap(self.npages, self.words.copy())

    def clear(self) -> None:
        """Leave no page set."""
        self.words[:] = 0

    def set_all(self) -> None:
        """Set every page."""
        self.set_range(0, self.npages)

    def set_range(self, start: int, stop: int) -> None:
        """Set the pages ``start <= page < stop``.

        :raise BitmapError: not a range of this block
        """
        if not 0 <= start <= stop <= self.npages:
            raise BitmapError(f"pages {start} to {stop} of {self.npages}")
        kernels.fill(self.words, int(start), int(stop))

    def set_regions(self, regions: NDArray[np.uint64], n: int, base: int, page_size: int) -> None:
        """Set every page that the first ``n`` regions of a PAGEMAP_SCAN touch.

        See :func:`tracker.bits.words.set_regions`.

        :raise BitmapError: a region outside the block; then nothing is known of the bitmap
        """
        if n and int(regions[:n, 1].max()) > base + self.npages * page_size:
            raise BitmapError(f"a region past the end of {self.npages} pages from {base:#x}")
        kernels.set_regions(self.words, regions, int(n), int(base), int(page_size))

    def runs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First page and number of pages of each maximal run of set pages, in order."""
        return kernels.runs(self.words)

    def pages(self) -> NDArray[np.int64]:
        """Numbers of the pages that are set, in order."""
        return pages_of(self.words)

    def mask(self) -> NDArray[np.bool_]:
        """One bool a page, shape (npages,)."""
        bits = np.unpackbits(self.words.view(np.uint8), count=self.npages, bitorder="little")
        return bits.view(np.bool_)

    def add(self, other: DirtyBitmap) -> int:
        """Set the pages of ``other`` too.

        :return: how many of them were not set before
        """
        self._check_same(other)
        return int(kernels.or_count(self.words, other.words))

    def __ior__(self, other: DirtyBitmap) -> DirtyBitmap:
        self._check_same(other)
        kernels.or_into(self.words, other.words)
        return self

    def __or__(self, other: DirtyBitmap) -> DirtyBitmap:
        union = self.copy()
        union |= other
        return union

    def __and__(self, other: DirtyBitmap) -> DirtyBitmap:
        self._check_same(other)
        return DirtyBitmap(self.npages, self.words & other.words)

    def __sub__(self, other: DirtyBitmap) -> DirtyBitmap:
        self._check_same(other)
        rest = self.copy()
        kernels.minus_into(rest.words, other.words)
        return rest

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirtyBitmap):
            return NotImplemented
        self._check_same(other)
        return bool((self.words == other.words).all())

    def _check_same(self, other: DirtyBitmap) -> None:
        if self.npages != other.npages:
            raise BitmapError(f"a bitmap of {self.npages} pages and one of {other.npages}")

    def __repr__(self) -> str:
        return f"<DirtyBitmap: {self.count()} of {self.npages} pages>"


def pages_of(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Numbers of the bits that are set in the words of a bitmap, in order.

    It takes time for words that are not 0, and little for the others.
    """
    at = np.flatnonzero(words)
    bits = np.unpackbits(words[at].view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    word, bit = np.nonzero(bits)
    return (at[word] * 64 + bit).astype(np.int64, copy=False)
