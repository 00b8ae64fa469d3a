"""A mount that is a descriptor and nothing else: ``include/uapi/linux/mount.h``.

Since Linux commits 24dcb3d90a1f ("vfs: syscall: Add fsopen() to prepare for superblock creation")
and 93766fbd2696 ("vfs: syscall: Add fsmount()"), in v5.2.
"""

from __future__ import annotations

FSOPEN_CLOEXEC = 0x00000001
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
FSMOUNT_CLOEXEC = 0x00000001
