"""Where compiled kernels are kept when numba finds no place: a service user's read-only system.

What numba keeps is loaded as code. A directory for it is used only if no other user can write to
it, or put another one in its place.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path

_log = logging.getLogger(__name__)


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
