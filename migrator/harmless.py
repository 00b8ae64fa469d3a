"""Text from elsewhere, on its way to a terminal, a log or a page.

A peer, a QEMU, a file or its name may hold escape sequences, which a terminal obeys, line ends,
which begin a line that looks like one of ours, and characters that reorder a line. They are shown
as escapes. It is done at the edge, where something is printed: errors and JSON carry the text as it
is.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

# Unicode's Cc, Cs, Zl and Zp, and of Cf what is not seen: marks of direction, joiners, tags
_HARMFUL = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def harmless(text: str, *, newline: str = r"\n") -> str:
    """The text with all that is not shown as itself replaced by Python's escape for it.

    :param newline: what a line end becomes
    """

    def escaped(found: re.Match[str]) -> str:
        character = found[0]
        return newline if character == "\n" else character.encode("unicode_escape").decode()

    return _HARMFUL.sub(escaped, text)


def say(text: str) -> None:
    """Print a line for people, on stderr."""
    print(harmless(text), file=sys.stderr, flush=True)


class Formatter(logging.Formatter):
    """One line for each record, and the lines of a traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record as the format has it."""
        return harmless(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """A traceback, whose lines are kept."""
        return harmless(super().formatException(ei), newline="\n")
