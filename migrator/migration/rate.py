"""How fast pages are sent."""

from __future__ import annotations

_UNMEASURED_BYTES_PER_S = 500e6  # nothing but zeros was sent so far
_TELLING_BYTES = 1 << 20  # a smaller sending says nothing about the rate


class Rate:
    """Bytes of pages a second, as of the last sendings.

    :ivar measured: bytes a second; 0 as long as no sending told
    """

    def __init__(self) -> None:
        self.measured = 0.0
        self._bytes = self._seconds = 0.0

    @property
    def bytes_per_s(self) -> float:
        """The rate, or a guess where none was measured."""
        return self.measured or _UNMEASURED_BYTES_PER_S

    def note(self, nbytes: int, seconds: float) -> None:
        """Take a sending into account: each counts half as much as the next, as it may be luck."""
        if nbytes >= _TELLING_BYTES or (nbytes and not self.measured):
            self._bytes, self._seconds = self._bytes / 2 + nbytes, self._seconds / 2 + seconds
            self.measured = self._bytes / self._seconds

    def forget(self) -> None:
        """Let the next sending alone decide; until then the rate stays what it is."""
        self._bytes = self._seconds = 0.0
