"""How long compiled kernels are good for, and where they are kept when numba finds no place.

What numba keeps is loaded as code. It is good for as long as no file has changed whose kernels may
be compiled into it. A service user's read-only system has no place for it: then it is kept among
the temporary files, in a directory that no other user can write to, or put another one in its
place.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


_SHARED = ("bits", "memory")  # directories of the tracker whose kernels others call


def stamp(dispatcher: Any, function: Callable[..., Any]) -> Any:
    """Have kept machine code be good for as long as its sources are what they are.

    Numba itself looks at the file of the kernel only, and so would take machine code that has an
    older version of a kernel of another file in it (numba: ``core/caching.py``,
    ``IndexDataCacheFile``).

    :param dispatcher: what numba made of ``function``, with a cache
    :return: the same
    """
    # without a cache where it is interpreted; another numba may keep its stamp elsewhere
    with contextlib.suppress(AttributeError):
        kept = dispatcher._cache._cache_file
        if hasattr(kept, "_source_stamp"):
            kept._source_stamp = _digest(Path(function.__code__.co_filename).parent)
    return dispatcher


@cache
def _digest(directory: Path) -> str:
    """A digest of all sources that kernels of a directory may have in them."""
    tracker = Path(__file__).parents[1]
    found = sha256()
    for place in sorted({directory, *(tracker / name for name in _SHARED)}):
        for file in sorted(place.glob("*.py")):
            found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()


def fallback_directory() -> Path | None:
    """A directory for compiled kernels below the system's directory for temporary files.

    It is the same one for all processes of a user, so that they compile once; it is made if it is
    not there, with mode 0700.

    :return: ``None`` if there cannot be one, or another user has made it, or could replace it
    """
    try:
        parent = Path(tempfile.gettempdir())
        place = parent / f"qemu-migrator-kernels-{os.geteuid()}"
        place.mkdir(mode=0o700, exist_ok=True)
        above, found = parent.stat(), place.lstat()
    except OSError as error:
        _log.warning("no directory for compiled kernels: %s", error)
        return None
    replaceable = above.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not above.st_mode & stat.S_ISVTX
    if replaceable or above.st_uid not in (0, os.geteuid()):
        _log.warning("compiled kernels are not kept: %s belongs to other users too", parent)
        return None
    if (
        not stat.S_ISDIR(found.st_mode)
        or found.st_uid != os.geteuid()
        or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    ):
        _log.warning("compiled kernels are not kept: %s is not this user's alone", place)
        return None
    return place
