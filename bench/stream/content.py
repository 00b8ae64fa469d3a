"""Memory to be sent: files that are full of something, and which of their pages are dirty."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tracker.bits.bitmap import DirtyBitmap

PAGE = 4096
_PIECE = 1 << 20
_SEED = 20211205


@dataclass(frozen=True)
class Shape:
    """What is in the memory, and what of it is sent.

    :ivar every: every so many pages one is dirty
    :ivar content: share of the pages that hold anything but zeros
    """

    name: str
    every: int = 1
    content: float = 1.0

    def dirty(self, size: int) -> DirtyBitmap:
        """Pages that are sent, of so many bytes."""
        return DirtyBitmap.from_pages(size // PAGE, np.arange(0, size // PAGE, self.every))


SHAPES = (
    Shape("all"),
    Shape("every 2nd page", every=2),
    Shape("every 8th page", every=8),
    Shape("90 % zeros", content=0.1),
)


def fill(path: Path, size: int, content: float) -> None:
    """Make a file of random pages; those without content are zeros, and there all the same."""
    random = np.random.default_rng(_SEED)
    with path.open("wb") as file:
        for at in range(0, size, _PIECE):
            npages = min(_PIECE, size - at) // PAGE
            pages = random.integers(0, 256, (npages, PAGE), np.uint8)
            pages[random.random(npages) >= content] = 0
            file.write(pages.tobytes())


def fresh(path: Path, size: int) -> int:
    """Make a file that is one hole; return a descriptor of it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.truncate(fd, size)
    return fd


def differing(source: Path, destination: Path, shape: Shape) -> int:
    """Pages of the destination that are not what sending should have made of them.

    Pages that were not dirty have to be what they were: zeros.
    """
    count = 0
    npages = source.stat().st_size // PAGE
    if destination.stat().st_size != npages * PAGE:
        return npages
    with source.open("rb", 0) as ours, destination.open("rb", 0) as theirs:
        first = 0
        while first < npages:
            wanted, found = _pages(ours.read(_PIECE)), _pages(theirs.read(_PIECE))
            clean = (np.arange(first, first + len(wanted)) % shape.every) != 0
            wanted[clean] = 0
            count += int((wanted != found).any(axis=1).sum())
            first += len(wanted)
    return count


def _pages(data: bytes) -> NDArray[np.uint64]:
    return np.frombuffer(bytearray(data), np.uint64).reshape(-1, PAGE // 8)
