"""The system calls that the standard library lacks, and the ioctls of dirty tracking.

Every failure is an :class:`OSError` whose ``strerror`` begins with the name of the call.
All of them let other Python threads run meanwhile: ctypes and :func:`fcntl.ioctl` release the
interpreter lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
from collections.abc import Mapping, Sequence
from errno import EFAULT
from typing import TYPE_CHECKING, Any

from tracker.abi import (
    inotify,
    io_uring,
    mount,
    pagemap,
    ptrace,
    uio,
    unistd,
    userfaultfd,
)

if TYPE_CHECKING:  # the injector runs from this module, and must start without numpy
    import numpy as np
    from numpy.typing import NDArray

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.syscall.restype = ctypes.c_long
_libc.process_vm_readv.restype = ctypes.c_ssize_t

_IOV_MAX = 1024  # linux/uio.h: UIO_MAXIOV


def failed(call: str, errno: int) -> OSError:
    """Make the error of a call that ended with ``errno``; its ``strerror`` names the call."""
    return OSError(errno, f"{call}: {os.strerror(errno)}")


def ptrace_request(request: ptrace.Request, tid: int, addr: int = 0, data: int = 0) -> None:
    """ptrace(2), for requests that return nothing but success.

    :raise OSError: ESRCH also means that the thread is not stopped, or not traced by us
    """
    if _libc.ptrace(int(request), tid, addr, data) == -1:
        raise failed(f"ptrace(PTRACE_{request.name})", ctypes.get_errno())


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """pidfd_getfd(2): a copy, close-on-exec, of descriptor ``fd`` of another process.

    Since Linux commit 8649c322f75c ("pid: Implement pidfd_getfd syscall", in v5.6).
    """
    # The number is the same on every architecture that is supported.
    copy = _libc.syscall(
        ctypes.c_long(unistd.X86_64.pidfd_getfd),
        ctypes.c_int(pidfd),
        ctypes.c_int(fd),
        ctypes.c_uint(0),
    )
    if copy == -1:
        raise failed("pidfd_getfd", ctypes.get_errno())
    return int(copy)


def same_file(pid: int, fd: int, other: int) -> bool:
    """kcmp(2): whether two descriptors of a process are one open file.

    :raise OSError: ENOSYS where the kernel was built without it
    """
    number = unistd.X86_64 if os.uname().machine == "x86_64" else unistd.AARCH64
    result = _libc.syscall(
        ctypes.c_long(number.kcmp),
        ctypes.c_int(pid),
        ctypes.c_int(pid),
        ctypes.c_int(unistd.KCMP_FILE),
        ctypes.c_ulong(fd),
        ctypes.c_ulong(other),
    )
    if result == -1:
        raise failed("kcmp", ctypes.get_errno())
    return int(result) == 0


def watch_modifications(fds: Sequence[int]) -> int:
    """inotify_init1(2) and, for each file, inotify_add_watch(2) for IN_MODIFY.

    write(2), fallocate(2) and truncate(2) are modifications, also by way of another descriptor or
    mount; a store through a mapping is none (Linux: ``fsnotify_modify`` in fs/read_write.c,
    fs/open.c and ``notify_change``).

    :return: the inotify descriptor, close-on-exec and non-blocking
    :raise OSError: EMFILE where the user has too many of them
    """
    watcher = _libc.inotify_init1(inotify.IN_NONBLOCK | inotify.IN_CLOEXEC)
    if watcher == -1:
        raise failed("inotify_init1", ctypes.get_errno())
    for fd in fds:
        path = f"/proc/self/fd/{fd}".encode()
        if _libc.inotify_add_watch(watcher, path, inotify.IN_MODIFY) == -1:
            errno = ctypes.get_errno()
            os.close(watcher)
            raise failed("inotify_add_watch", errno)
    return int(watcher)


def was_modified(watcher: int) -> bool:
    """Whether any of the files of :func:`watch_modifications` was, since this was asked last.

    :raise OSError: it does not tell
    """
    modified = False
    with contextlib.suppress(BlockingIOError):
        while os.read(watcher, 65536):  # an overflow is an event as well
            modified = True
    return modified


def uffd_api(fd: int, features: int) -> int:
    """UFFDIO_API: agree on features; must come first on a new userfaultfd.

    :param features: ``UFFD_FEATURE_*`` bits to turn on
    :return: all the features that the kernel has
    :raise OSError: EINVAL if it lacks one of those wanted
    """
    argument = userfaultfd.uffdio_api(api=userfaultfd.UFFD_API, features=features)
    ioctl("UFFDIO_API", fd, userfaultfd.UFFDIO_API, argument)
    return int(argument.features)


def uffd_register(fd: int, start: int, length: int, mode: int) -> int:
    """UFFDIO_REGISTER a range of the process that the userfaultfd was made in.

    :param start: address in that process, a multiple of the page size
    :param length: bytes, a multiple of the page size
    :param mode: ``UFFDIO_REGISTER_MODE_*`` bits
    :return: the ioctls that work on this range, bit ``nr`` for number ``nr``
    :raise OSError: EBUSY if another userfaultfd has some of it; EINVAL if the mapping cannot be
        registered in this mode
    """
    argument = userfaultfd.uffdio_register(
        range=userfaultfd.uffdio_range(start=start, len=length), mode=mode
    )
    ioctl("UFFDIO_REGISTER", fd, userfaultfd.UFFDIO_REGISTER, argument)
    return int(argument.ioctls)


def uffd_unregister(fd: int, start: int, length: int) -> None:
    """UFFDIO_UNREGISTER a range: protection is lifted and waiters are woken.

    :param start: address in the process that the userfaultfd was made in
    :param length: bytes
    """
    argument = userfaultfd.uffdio_range(start=start, len=length)
    ioctl("UFFDIO_UNREGISTER", fd, userfaultfd.UFFDIO_UNREGISTER, argument)


def pagemap_scan(
    fd: int,
    start: int,
    end: int,
    regions: NDArray[np.uint64],
    *,
    flags: int,
    category_mask: int,
    return_mask: int,
    category_inverted: int = 0,
    category_anyof_mask: int = 0,
    max_pages: int = 0,
) -> tuple[int, int]:
    """PAGEMAP_SCAN, once: it ends early when ``regions`` is full or ``max_pages`` are found.

    :param fd: an open ``/proc/PID/pagemap``
    :param start: first address in that process, a multiple of the page size
    :param end: address past the last
    :param regions: filled with start, end and categories: shape (n, 3), C-contiguous
    :param flags: ``PM_SCAN_*`` bits
    :param category_mask: pages are reported that have all of these ``PAGE_IS_*`` bits
    :param return_mask: ``PAGE_IS_*`` bits to tell of each region
    :param category_inverted: ``PAGE_IS_*`` bits to be taken as their opposite when matching
    :param category_anyof_mask: pages are reported that have one of these, if any are given
    :param max_pages: report no more pages than this; 0 means no limit
    :return: how many rows of ``regions`` were filled, and the address where the walk ended
    :raise OSError: EPERM with PM_SCAN_CHECK_WPASYNC on memory that is not registered
    :raise ValueError: ``regions`` is not an array the kernel can fill
    """
    if regions.dtype.kind + str(regions.dtype.itemsize) != "u8" or not regions.dtype.isnative:
        raise ValueError(f"regions must be native uint64, not {regions.dtype}")
    if regions.ndim != 2 or regions.shape[1] != 3:
        raise ValueError(f"regions must have the shape (n, 3), not {regions.shape}")
    if not (regions.flags.c_contiguous and regions.flags.writeable):
        raise ValueError("regions must be C-contiguous and writeable")
    argument = pagemap.pm_scan_arg(
        size=ctypes.sizeof(pagemap.pm_scan_arg),
        flags=flags,
        start=start,
        end=end,
        vec=regions.ctypes.data,
        vec_len=len(regions),
        max_pages=max_pages,
        category_inverted=category_inverted,
        category_mask=category_mask,
        category_anyof_mask=category_anyof_mask,
        return_mask=return_mask,
    )
    nregions = ioctl("PAGEMAP_SCAN", fd, pagemap.PAGEMAP_SCAN, argument)
    return nregions, int(argument.walk_end)


def ioctl(name: str, fd: int, request: int, argument: ctypes.Structure | bytearray) -> int:
    """ioctl(2) whose argument is memory that the kernel may write to.

    :param name: of the request, for the error
    :return: what the call returned
    """
    try:
        return int(fcntl.ioctl(fd, request, argument))
    except OSError as error:
        raise failed(name, error.errno or 0) from None


def fault_in(pid: int, addresses: NDArray[np.uint64]) -> None:
    """Read one byte at each address of a process with process_vm_readv(2), which maps the pages.

    :raise OSError: one of them cannot be read
    """
    import numpy as np

    here = ctypes.create_string_buffer(_IOV_MAX)
    for first in range(0, len(addresses), _IOV_MAX):
        part = addresses[first : first + _IOV_MAX]
        remote = np.ones((len(part), 2), np.uint64)  # struct iovec: address, length
        remote[:, 0] = part
        local = uio.iovec(ctypes.addressof(here), len(part))
        done = _libc.process_vm_readv(
            ctypes.c_int(pid),
            ctypes.byref(local),
            ctypes.c_ulong(1),
            ctypes.c_void_p(remote.ctypes.data),
            ctypes.c_ulong(len(part)),
            ctypes.c_ulong(0),
        )
        if done != len(part):
            raise failed("process_vm_readv", ctypes.get_errno() if done == -1 else EFAULT)


def _call(name: str, *arguments: Any) -> int:
    """syscall(2), of one that libc has no function for."""
    numbers = unistd.AARCH64 if os.uname().machine == "aarch64" else unistd.X86_64
    result = _libc.syscall(ctypes.c_long(getattr(numbers, name)), *arguments)
    if result == -1:
        raise failed(name, ctypes.get_errno())
    return int(result)


def vmsplice(pipe: int, address: int, length: int) -> int:
    """vmsplice(2): put memory of ours into a pipe, without copying it.

    :param pipe: the end that is written to
    :param length: bytes
    :return: bytes that are in the pipe now
    :raise OSError: it cannot be
    """
    vector = uio.iovec(address, length)
    return _call(
        "vmsplice",
        ctypes.c_int(pipe),
        ctypes.byref(vector),
        ctypes.c_ulong(1),
        ctypes.c_uint(0),
    )


def io_uring_setup(entries: int, params: io_uring.io_uring_params) -> int:
    """io_uring_setup(2).

    :param entries: how many requests the submission queue holds
    :param params: wanted; filled in by the kernel
    :return: the ring's descriptor, close-on-exec
    :raise OSError: EPERM where ``kernel.io_uring_disabled`` says so; ENOSYS in kernels without
    """
    return _call("io_uring_setup", ctypes.c_uint(entries), ctypes.byref(params))


def io_uring_enter(ring: int, submit: int, complete: int) -> int:
    """io_uring_enter(2) with IORING_ENTER_GETEVENTS.

    :param submit: how many requests to take from the queue
    :param complete: how many completions to wait for
    :return: how many were taken
    :raise OSError: none could be
    """
    return _call(
        "io_uring_enter",
        ctypes.c_int(ring),
        ctypes.c_uint(submit),
        ctypes.c_uint(complete),
        ctypes.c_uint(io_uring.IORING_ENTER_GETEVENTS),
        ctypes.c_void_p(None),
        ctypes.c_size_t(0),
    )


def io_uring_register_buffers(ring: int, buffers: Sequence[tuple[int, int]]) -> None:
    """io_uring_register(2) with IORING_REGISTER_BUFFERS: pin memory until the ring is closed.

    :param buffers: address and length in bytes of each
    :raise OSError: ENOMEM past RLIMIT_MEMLOCK; EOPNOTSUPP for files that are not in memory
    """
    vectors = (uio.iovec * len(buffers))(*(uio.iovec(*buffer) for buffer in buffers))
    _call(
        "io_uring_register",
        ctypes.c_int(ring),
        ctypes.c_uint(io_uring.IORING_REGISTER_BUFFERS),
        ctypes.byref(vectors),
        ctypes.c_uint(len(buffers)),
    )


def mount_detached(kind: str, options: Mapping[str, str]) -> int:
    """fsopen(2), fsconfig(2) and fsmount(2): a mount that has no place, and ends when it is closed.

    :param kind: of file system
    :return: the mount's descriptor, close-on-exec
    :raise OSError: EPERM without CAP_SYS_ADMIN; ENODEV if the kernel has no such file system
    """
    context = _call("fsopen", ctypes.c_char_p(kind.encode()), ctypes.c_uint(mount.FSOPEN_CLOEXEC))
    try:
        for key, value in options.items():
            _fsconfig(context, mount.FSCONFIG_SET_STRING, key.encode(), value.encode())
        _fsconfig(context, mount.FSCONFIG_CMD_CREATE, None, None)
        return _call(
            "fsmount", ctypes.c_int(context), ctypes.c_uint(mount.FSMOUNT_CLOEXEC), ctypes.c_uint(0)
        )
    finally:
        os.close(context)


def _fsconfig(context: int, command: int, key: bytes | None, value: bytes | None) -> None:
    _call(
        "fsconfig",
        ctypes.c_int(context),
        ctypes.c_uint(command),
        ctypes.c_char_p(key),
        ctypes.c_char_p(value),
        ctypes.c_int(0),
    )


def uffd_writeprotect(fd: int, start: int, length: int, mode: int) -> None:
    """UFFDIO_WRITEPROTECT: protect a range, or lift its protection and wake whoever waits for that.

    :param start: address in the process that the userfaultfd was made in
    :param length: bytes
    :param mode: UFFDIO_WRITEPROTECT_MODE_WP to protect, 0 to lift
    :raise OSError: EAGAIN while the mappings change; ENOENT where nothing is registered
    """
    argument = userfaultfd.uffdio_writeprotect(
        range=userfaultfd.uffdio_range(start=start, len=length), mode=mode
    )
    ioctl("UFFDIO_WRITEPROTECT", fd, userfaultfd.UFFDIO_WRITEPROTECT, argument)
