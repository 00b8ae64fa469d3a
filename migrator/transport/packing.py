"""How content leaves: at what rate, and compressed or not. Used in threads."""

from __future__ import annotations

import re
import threading
import time

import zstandard

from migrator.errors import ConfigError

BURST_S = 0.02
_GROUP = 16  # frames between two decisions: more than the sockets' buffers hold
_LOOK_AGAIN = 16  # groups between two looks at the other way
_LEVEL = 1
_LEVELS = re.compile("[1-9]|1[0-9]")  # not str.isdigit(), which takes more than int() reads


class Pace:
    """Lets bytes pass at a rate, all threads together.

    :param bytes_per_s: ``None``: no limit
    """

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._at = 0.0  # when the last byte that was let pass is due

    def least_s(self, nbytes: int) -> float:
        """How long so many bytes take in the long run, at least."""
        return nbytes / self._bytes_per_s if self._bytes_per_s else 0.0

    def wait_for(self, nbytes: int, stop: threading.Event) -> None:
        """Wait until so many bytes may pass, or until ``stop``."""
        if self._bytes_per_s is None:
            return
        with self._lock:
            now = time.monotonic()
            self._at = max(self._at, now - BURST_S) + nbytes / self._bytes_per_s
            wait_s = self._at - now
        if wait_s > 0:
            stop.wait(wait_s)


def parse_compression(text: str) -> tuple[str, int]:
    """``none``, ``auto``, ``zstd`` or ``zstd:LEVEL`` → which, and the level.

    :raise ConfigError: it is something else
    """
    kind, colon, level = text.partition(":")
    if kind == "zstd" and (not colon or (_LEVELS.fullmatch(level))):
        return kind, int(level or _LEVEL)
    if text in ("none", "auto"):
        return text, _LEVEL
    raise ConfigError(f"expected none, auto, zstd or zstd:1 to zstd:19, not {text!r}")


class Packer:
    """Compresses the content of frames, where that pays. One for each thread.

    ``auto`` measures what a byte of content costs either way, sending included, and takes the
    cheaper one; from time to time it looks at the other again.

    :ivar packed_bytes: content that was compressed
    :param compress: see :func:`parse_compression`
    """

    def __init__(self, compress: str) -> None:
        self._kind, level = parse_compression(compress)
        self._compressor = zstandard.ZstdCompressor(level=level)
        self.packed_bytes = 0
        self._packs = self._kind == "zstd"
        self._cost_s = {False: 0.0, True: 0.0}  # a byte; 0: not measured
        self._frames = self._groups = self._bytes = 0
        self._since = time.monotonic()

    def pack(self, content: memoryview) -> bytes | None:
        """The content, compressed; ``None`` if it is to be sent as it is."""
        if self._kind == "none":
            return None
        if self._kind == "auto":
            self._decide(len(content))
        if not self._packs:
            return None
        packed = self._compressor.compress(content)
        if len(packed) >= len(content):
            return None
        self.packed_bytes += len(content)
        return packed

    def _decide(self, nbytes: int) -> None:
        if self._frames == _GROUP:
            now = time.monotonic()
            self._cost_s[self._packs] = (now - self._since) / max(self._bytes, 1)
            self._since, self._frames, self._bytes = now, 0, 0
            self._groups += 1
            best = self._cost_s[True] < self._cost_s[False]
            unknown = not all(self._cost_s.values())
            self._packs = not self._packs if unknown else best
            if self._groups % _LOOK_AGAIN == 0:
                self._packs = not best
        self._frames += 1
        self._bytes += nbytes

    def begin(self) -> None:
        """A round begins: what was not finished is no measurement."""
        self._since, self._frames, self._bytes = time.monotonic(), 0, 0
