"""Asking the processes that migrate; see :mod:`migrator.control.server` for what they answer."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from migrator.control.server import address, is_stale, opened, own_directory
from migrator.errors import ControlError, EndedSilently
from migrator.report.report import Progress

Answer = dict[str, Any]
_ANSWER_S = 5.0
_ANSWER_BYTES = 1 << 16
_SHOWN_BYTES = 80
_STATUS = {"what", "pid", *(member.name for member in fields(Progress))}


def served() -> list[Path]:
    """Sockets of this user's migrations; those whose processes are gone are removed.

    :raise ControlError: the directory is not this user's own
    """
    directory = own_directory()
    found = []
    with suppress(FileNotFoundError), opened(directory) as fd:
        for name in sorted(os.listdir(fd)):
            if name.startswith(".") or not name.endswith(".sock"):
                continue
            with suppress(FileNotFoundError):  # it has just ended
                if is_stale(fd, name):
                    os.unlink(name, dir_fd=fd)
                else:
                    found.append(directory / name)
    return found


def status(path: Path) -> Answer:
    """Where the migration behind a socket is.

    :raise ControlError: nobody answers
    """
    with _asked(path, "status") as connection:
        answer = next(_lines(path, connection))
    _check(path, answer, _STATUS)
    return answer


def progress(answer: Answer) -> Progress:
    """The part of a status that the migration itself reports."""
    return Progress(**{member.name: answer[member.name] for member in fields(Progress)})


def cancel(path: Path) -> Answer:
    """Cancel a migration, and wait until it has ended; return how it did.

    :raise EndedSilently: the process ended without a word, when it had been told to cancel
    :raise ControlError: nobody answers
    """
    with _asked(path, "cancel") as connection:
        answers = _lines(path, connection)
        _check(path, next(answers), {"cancelling"})
        connection.settimeout(None)  # rolling back takes its time
        try:
            last = next(answers)
        except ControlError as error:
            raise EndedSilently(error.path, error.reason) from error
        _check(path, last, {"ended"})
        ended: Answer = last["ended"]
        return ended


def watch(paths: Sequence[Path]) -> Iterator[tuple[Path, Answer | ControlError]]:
    """What several migrations say, as they say it, until all have ended.

    The last of each is how it ended, or why that is not known.
    """
    said: SimpleQueue[tuple[Path, Answer | ControlError]] = SimpleQueue()

    def listen(path: Path) -> None:
        try:
            with _asked(path, "watch") as connection:
                answers = _lines(path, connection)
                while "ended" not in (answer := next(answers)):
                    _check(path, answer, _STATUS)
                    said.put((path, answer))
                    connection.settimeout(None)
                said.put((path, answer))
        except ControlError as error:
            said.put((path, error))

    for path in paths:
        threading.Thread(target=listen, args=(path,), daemon=True).start()
    left = len(paths)
    while left:
        path, answer = said.get()
        left -= isinstance(answer, ControlError) or "ended" in answer
        yield path, answer


def _asked(path: Path, command: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_ANSWER_S)
    try:
        with opened(path.parent) as fd:
            connection.connect(address(fd, path.name))
        connection.sendall(json.dumps({"command": command}).encode() + b"\n")
    except OSError as error:
        connection.close()
        raise ControlError(str(path), f"no migration answers: {error.strerror or error}") from error
    return connection


def _lines(path: Path, connection: socket.socket) -> Iterator[Answer]:
    """Answers for as long as there are any.

    :raise ControlError: there are none any more
    """
    with connection.makefile("rb") as received:
        while True:
            try:
                line = received.readline(_ANSWER_BYTES)
            except TimeoutError as error:
                raise ControlError(str(path), f"no answer in {_ANSWER_S:g} s") from error
            except OSError as error:
                raise ControlError(str(path), error.strerror or str(error)) from error
            if not line:
                raise ControlError(str(path), "the process ended, and did not say how")
            try:
                answer = json.loads(line)
            except ValueError:
                answer = None
            if not isinstance(answer, dict) or "error" in answer:
                raise ControlError(str(path), f"answered {line[:_SHOWN_BYTES]!r}")
            yield answer


def _check(path: Path, answer: Answer, members: Set[str]) -> None:
    if not answer.keys() >= members:
        raise ControlError(str(path), "what answers is no migration of this version")
