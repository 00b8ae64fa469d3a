"""A helper process: a function of this project, called in a Python of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def start(
    call: partial[Any],
    *,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | None = subprocess.DEVNULL,
    stderr: int | None = subprocess.DEVNULL,
    site: bool = True,
    session: bool = True,
    fds: Iterable[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a Python that calls a function, and ends with what it returns.

    It is isolated (``-I``): neither the environment nor the current directory decides what it
    imports. This project is found where it is, behind the standard library.

    :param call: a function of a module of this project, and positional arguments, each a number, a
        string, or ``None``
    :param stdin: a descriptor, or a constant of :mod:`subprocess`; likewise ``stdout``, ``stderr``.
        ``None``: the same as here
    :param site: whether it may import what is installed. Without, it starts sooner: site-packages
        are left out, with everything that their ``.pth`` files import.
    :param session: let it lead a session: no Ctrl-C and no hangup of the terminal reach it, and
        its own children can be ended with it
    :param fds: descriptors that it inherits, with the same numbers
    :raise OSError: it cannot be started
    """
    isolation = ["-I"] if site else ["-I", "-S"]
    return subprocess.Popen(
        [sys.executable, *isolation, "-c", program(call), _ROOT],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=session,
        pass_fds=tuple(fds),
    )


def program(call: partial[Any]) -> str:
    """The program that such a process runs; its argument is where this project is."""
    module, name = call.func.__module__, call.func.__name__
    return (
        "import sys\n"
        "sys.path.append(sys.argv[1])\n"
        f"from {module} import {name}\n"
        f"sys.exit({name}(*{call.args!r}))\n"
    )
