"""Standard output and error of the commands: text that cannot be written is dropped.

A migration does not fail because its terminal is gone or a disk is full. The exit status of a
command is decided before anything about it is printed, and neither a stream that breaks nor a
signal that arrives while it is printed changes it.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PIECE = select.PIPE_BUF  # a pipe that polls as writable takes so many bytes without blocking
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LAST_WORDS_S = 2.0


class Stream(io.RawIOBase):
    """A descriptor to write to, where writing never fails.

    :ivar gone: whether something could not be written
    :ivar error: why, where the kernel said so
    :ivar patience_s: seconds for which a reader that reads nothing is waited for; ``None``: no
        limit
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.gone = False
        self.error: OSError | None = None
        self.patience_s: float | None = None

    def writable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._fd)

    def write(self, data: ReadableBuffer) -> int:
        """Write all of the data, or drop the rest; return the length of all of them."""
        view = memoryview(data)
        left = view
        try:
            while left and self._ready():
                with contextlib.suppress(BlockingIOError):  # another process was faster
                    left = left[os.write(self._fd, left[:_PIECE]) :]
        except OSError as error:
            self.error = error
        self.gone = self.gone or bool(left)
        return view.nbytes

    def _ready(self) -> bool:
        if self.gone and self.patience_s is not None:
            return False
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        patience_ms = None if self.patience_s is None else self.patience_s * 1000
        return bool(poll.poll(patience_ms))


def install() -> None:
    """Replace the standard streams of a command by such that never fail.

    Streams that were replaced already, as by a test, are left alone. A descriptor that was closed
    when the program was started is opened on ``/dev/null``, or a socket would get its number.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(1, sys.__stdout__)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(2, sys.__stderr__)


def _text(fd: int, before: TextIO | None) -> io.TextIOWrapper:
    stream = io.BufferedWriter(Stream(fd))
    encoding = before.encoding if before is not None else "utf-8"
    return io.TextIOWrapper(stream, encoding, errors="backslashreplace", line_buffering=True)


def _raw(stream: TextIO | None) -> Stream | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, Stream) else None


def reader_is_gone(stream: TextIO | None = None) -> bool:
    """Whether something that was printed could not be written.

    :param stream: where; ``None``: on stdout
    """
    raw = _raw(sys.stdout if stream is None else stream)
    return raw is not None and raw.gone


def unwritten() -> str:
    """Why not all that was printed on stdout was written; ``""`` if it was, or nobody wants more.

    It is for commands that do nothing but print. A reader that has ended, as ``head`` does, has
    what it wanted.
    """
    raw = _raw(sys.stdout)
    if raw is None or raw.error is None or raw.error.errno == errno.EPIPE:
        return ""
    return f"stdout: {raw.error.strerror}: not all of it was printed"


@contextlib.contextmanager
def impatient(patience_s: float = 0.1) -> Iterator[None]:
    """Within the block, a reader that reads nothing is waited for only so many seconds, once."""
    streams = [raw for raw in (_raw(sys.stdout), _raw(sys.stderr)) if raw is not None]
    for stream in streams:
        stream.patience_s = patience_s
    try:
        yield
    finally:
        for stream in streams:
            stream.patience_s = None
            stream.gone = False  # it may only have been slow


class Ending:
    """How a command ends: a status that is decided once.

    Until then, SIGINT, SIGTERM and SIGHUP are a :exc:`KeyboardInterrupt`, which an event loop is
    expected to handle itself. After it they only hurry the command, which ends with that status: it
    has two seconds to print its last words, and none after a second signal.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self._hurried = False
        self._heeded = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        self._heed()
        # an interpreter that ends resets its handlers: a signal would then decide the status
        atexit.register(self._heed_no_more)

    def _heed_no_more(self) -> None:
        for number in self._heeded:
            signal.signal(number, signal.SIG_IGN)

    def _heed(self) -> None:
        for number in self._heeded:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.status is None:
            raise KeyboardInterrupt
        if self._hurried:
            self._end_at_once()
        self._hurried = True
        signal.signal(signal.SIGALRM, self._end_at_once)
        signal.setitimer(signal.ITIMER_REAL, _LAST_WORDS_S)

    def _end_at_once(self, *_: object) -> NoReturn:
        assert self.status is not None
        os._exit(self.status)

    def decide(self, status: int) -> None:
        """From now on, the command ends with this status; a second call changes nothing."""
        if self.status is None:
            self.status = status
        self._heed()  # an event loop that heeded signals has set them back to ending the process

    def leave(self, printing: Callable[[], object]) -> NoReturn:
        """Print, and end the command with the status that was decided."""
        assert self.status is not None
        try:
            printing()
        except Exception as error:  # noqa: BLE001 (nothing that is printed changes the status)
            with contextlib.suppress(Exception):
                print(f"could not be printed: {error!r}", file=sys.stderr)
        sys.exit(self.status)
