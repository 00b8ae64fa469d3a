"""Everything that can go wrong while tracking, one tree::

    TrackerError
    ├── InjectionError          a system call could not be run inside the process
    │   ├── UnsupportedMachine  no register layout for this architecture
    │   └── TargetGone          the process ended meanwhile
    ├── RamError                guest RAM is not what tracking needs
    │   ├── NotShared           private memory, or no file behind it
    │   └── MapChanged          a mapping moved, shrank or went away
    ├── BitmapError             bitmaps of different shapes, or a dirty tail
    └── SourceError             a dirty source could not start or report
        └── NotTracking         the kernel does not do what the source relies on

Errors carry what they are about as attributes, never only in their text.
System calls that fail raise :class:`OSError`, whose ``strerror`` names the call.
"""

from __future__ import annotations


class TrackerError(Exception):
    """Base of all errors of this package."""


class InjectionError(TrackerError):
    """A system call could not be run inside another process.

    :ivar pid: the process
    :ivar reason: what happened, without the process
    """

    def __init__(self, pid: int, reason: str) -> None:
        super().__init__(f"process {pid}: {reason}")
        self.pid = pid
        self.reason = reason


class UnsupportedMachine(InjectionError):
    """There is no register layout for this architecture."""


class TargetGone(InjectionError):
    """The process ended while a call was being run inside it."""


class RamError(TrackerError):
    """Guest RAM is not what tracking or moving it needs.

    :ivar block: name of the RAM block
    """

    def __init__(self, block: str, reason: str) -> None:
        super().__init__(f"RAM block {block!r}: {reason}")
        self.block = block
        self.reason = reason


class NotShared(RamError):
    """The block is private memory, or has no file behind it."""


class MapChanged(RamError):
    """The block's mapping in QEMU is not where it was when tracking began."""


class BitmapError(TrackerError, ValueError):
    """Bitmaps of different shapes were combined, or bits are set past the last page."""


class SourceError(TrackerError):
    """A dirty source could not be started, or could not report.

    Nothing may be concluded about any page that the source covers.

    :ivar source: name of the source
    """

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"dirty source {source!r}: {reason}")
        self.source = source
        self.reason = reason


class NotTracking(SourceError):
    """The kernel was asked for a behaviour the source relies on, and shows another."""
