"""Being told that a file was changed by a system call: ``include/uapi/linux/inotify.h``."""

from __future__ import annotations

IN_MODIFY = 0x00000002
IN_NONBLOCK = 0o4000
IN_CLOEXEC = 0o2000000
