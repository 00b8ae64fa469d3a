"""A recording of which pages a VM wrote, and when; made by ``migrator record``.

A file of this format (version 1; numbers little-endian):

- 8 bytes: ``QMTRACE1``
- frames, each of a ``u32`` with the length of its payload, a ``u32`` with the CRC-32 of it, and the
  payload, compressed by zstd:

  1. JSON, an object with the members of :class:`Header`
  2. for each block the pages that held data at the beginning, and of these the ones full of zeros
  3. each one record: an ``f64``, the time since the beginning in seconds; then for each block the
     pages that were written since the record before

A set of pages is a ``u32`` with its length and so many bytes: page numbers as a Roaring bitmap in
its portable format (https://github.com/RoaringBitmap/RoaringFormatSpec). Blocks are in the order of
the header. A recorder that is killed leaves a last frame that is not whole: what was before it is
good.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import zstandard
from numpy.typing import NDArray
from pyroaring import BitMap

from migrator.errors import TraceError
from tracker.bits.bitmap import DirtyBitmap
from tracker.bits.pageset import PageSet

MAGIC = b"QMTRACE1"
_FRAME = struct.Struct("<II")
_TIME = struct.Struct("<d")
_LENGTH = struct.Struct("<I")
_LARGEST_PAYLOAD = 1 << 31
_MOST_PAGES = 1 << 32  # what a Roaring bitmap holds

Pages = NDArray[np.uint32]


@dataclass(frozen=True)
class Block:
    """A block of RAM; see :class:`tracker.memory.ram.RamBlock`."""

    name: str
    size: int
    page_size: int

    @property
    def npages(self) -> int:
        """Pages in the block."""
        return self.size // self.page_size


@dataclass(frozen=True)
class Header:
    """What was recorded.

    :ivar blocks: all RAM that was tracked
    :ivar interval_s: how often it was meant to be looked at
    :ivar tracker: name of the source of CPU writes
    :ivar qemu: version of QEMU
    :ivar notes: what could not be seen, a sentence an item
    """

    blocks: tuple[Block, ...]
    interval_s: float
    tracker: str
    qemu: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """What was written in one interval.

    :ivar until_s: its end, since the recording began
    :ivar written: page numbers, by block
    """

    until_s: float
    written: Mapping[str, BitMap]


@dataclass(frozen=True)
class Trace:
    """A recording that was read.

    :ivar data: pages that held data at the beginning
    :ivar zeros: of these, the ones full of zeros
    :ivar whole: whether its last frame is
    """

    header: Header
    data: PageSet
    zeros: PageSet
    records: tuple[Record, ...]
    whole: bool = True

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.records[-1].until_s if self.records else 0.0


class Writer:
    """Writes a trace, record by record.

    :param file: empty
    :raise OSError: it cannot be written; likewise the methods
    """

    def __init__(
        self,
        file: BinaryIO,
        header: Header,
        data: PageSet,
        zeros: PageSet,
    ) -> None:
        self._file = file
        self._names = [block.name for block in header.blocks]
        self._packer = zstandard.ZstdCompressor()
        file.write(MAGIC)
        self._frame(json.dumps(asdict(header)).encode())
        self._frame(b"".join(_packed(s[name]) for name in self._names for s in (data, zeros)))

    def append(self, until_s: float, written: PageSet) -> None:
        """Add a record; see :class:`Record`."""
        sets = (_packed(written[name]) for name in self._names)
        self._frame(_TIME.pack(until_s) + b"".join(sets))

    def _frame(self, content: bytes) -> None:
        payload = self._packer.compress(content)
        # in one piece, so that little else than a full disk can cut it
        self._file.write(_FRAME.pack(len(payload), zlib.crc32(payload)) + payload)
        self._file.flush()


def read(path: Path) -> Trace:
    """Read a trace.

    :raise TraceError: it is none, is of another version, or is damaged
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TraceError(path, error.strerror or str(error)) from error
    if content[: len(MAGIC)] != MAGIC:
        other = content[: len(MAGIC) - 1] == MAGIC[:-1]
        raise TraceError(path, "of another version" if other else "not a trace")
    try:
        return _parsed(content)
    except (ValueError, KeyError, TypeError, struct.error, zstandard.ZstdError) as error:
        raise TraceError(path, str(error) or type(error).__name__) from error


def _parsed(content: bytes) -> Trace:
    frames, end = _frames(content)
    if len(frames) < 2:
        raise ValueError("it ends before its first record")
    header = _header(frames[0])
    names = [(block.name, block.npages) for block in header.blocks]
    first = _Sets(frames[1])
    data, zeros = {}, {}
    for name, npages in names:
        data[name], zeros[name] = (first.bitmap(npages) for _ in range(2))
    first.end()
    records: list[Record] = []
    for frame in frames[2:]:
        (until_s,) = _TIME.unpack_from(frame)
        if not math.isfinite(until_s) or until_s <= (records[-1].until_s if records else 0.0):
            raise ValueError(f"a record at {until_s} s is not after the one before")
        sets = _Sets(frame[_TIME.size :])
        records.append(Record(until_s, {name: sets.pages(npages) for name, npages in names}))
        sets.end()
    blocks = header.blocks
    whole = end == len(content)
    return Trace(header, PageSet(blocks, data), PageSet(blocks, zeros), tuple(records), whole)


def _frames(content: bytes) -> tuple[list[bytes], int]:
    """All whole frames, and where the last of them ends."""
    unpacker = zstandard.ZstdDecompressor()
    frames, at = [], len(MAGIC)
    while at + _FRAME.size <= len(content):
        length, checksum = _FRAME.unpack_from(content, at)
        payload = content[at + _FRAME.size : at + _FRAME.size + length]
        if len(payload) < length:
            break
        if zlib.crc32(payload) != checksum:
            raise ValueError(f"damaged at byte {at}")
        if not 0 <= zstandard.frame_content_size(payload) <= _LARGEST_PAYLOAD:
            raise ValueError(f"a frame of unlikely size at byte {at}")
        frames.append(unpacker.decompress(payload))
        at += _FRAME.size + length
    return frames, at


def _header(frame: bytes) -> Header:
    said = json.loads(frame)
    blocks = tuple(
        Block(str(b["name"]), int(b["size"]), int(b["page_size"])) for b in said["blocks"]
    )
    for block in blocks:
        if block.page_size <= 0 or block.size % block.page_size or block.npages <= 0:
            raise ValueError(f"block {block.name!r} is of no whole pages")
        if block.npages > _MOST_PAGES:
            raise ValueError(f"block {block.name!r} has too many pages")
    if not blocks or len({block.name for block in blocks}) < len(blocks):
        raise ValueError("no blocks, or two of one name")
    notes = tuple(str(note) for note in said["notes"])
    return Header(blocks, float(said["interval_s"]), str(said["tracker"]), str(said["qemu"]), notes)


class _Sets:
    """The sets of pages of one frame, in order."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def pages(self, npages: int) -> BitMap:
        (length,) = _LENGTH.unpack_from(self._content, self._at)
        self._at += _LENGTH.size + length
        if self._at > len(self._content):
            raise ValueError("a set of pages that is cut off")
        found = BitMap.deserialize(self._content[self._at - length : self._at])
        if found and found.max() >= npages:
            raise ValueError(f"a page outside the {npages} of its block")
        return found

    def bitmap(self, npages: int) -> DirtyBitmap:
        return as_bitmap(npages, self.pages(npages))

    def end(self) -> None:
        if self._at != len(self._content):
            raise ValueError("more than its blocks in a frame")


def _packed(pages: DirtyBitmap) -> bytes:
    found = BitMap(pages.pages().astype(np.uint32))
    found.run_optimize()
    content = found.serialize()
    return _LENGTH.pack(len(content)) + content


def as_bitmap(npages: int, pages: BitMap) -> DirtyBitmap:
    """The same pages, one bit each."""
    return DirtyBitmap.from_pages(npages, numbers(pages))


def numbers(pages: BitMap) -> Pages:
    """The same pages, in order."""
    return np.asarray(pages.to_array(), np.uint32)


def united(sets: Iterable[BitMap]) -> BitMap:
    """The pages that are in any of them."""
    found: Iterator[BitMap] = iter(sets)
    union = next(found, BitMap()).copy()
    for other in found:
        union |= other
    return union
