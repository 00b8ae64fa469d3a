"""What the kernels call that is not Python: two processor instructions, libc, and an address.

Compiled kernels call these directly; with ``NUMBA_DISABLE_JIT=1`` the same names are plain Python
and ctypes functions, so that a kernel's source runs either way. The libc functions take and return
what ``man 2`` says; a pointer is the ``.ctypes`` attribute of an array::

    memcpy(dst, src, nbytes)                     memcmp(a, b, nbytes) -> int
    madvise(start, nbytes, advice) -> int        lseek(fd, offset, whence) -> int
    pwrite(fd, buffer, nbytes, offset) -> int    writev(fd, iovecs, count) -> int
    read(fd, buffer, nbytes) -> int              ioctl(fd, request, argument) -> int
    ppoll(pollfds, n, timespec, sigset) -> int   clock_gettime(clock, timespec) -> int
    errno() -> int, of this thread's last failure
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

PUNCH_HOLE = 2 | 1
"""include/uapi/linux/falloc.h: FALLOC_FL_PUNCH_HOLE, which demands FALLOC_FL_KEEP_SIZE."""

MADV_POPULATE_WRITE = 23
"""include/uapi/asm-generic/mman-common.h, since Linux 5.14: fault pages in as by writing them.

Memory that cannot be had is an errno (EFAULT, ENOMEM) here, where a plain write would be SIGBUS.
"""

trailing_zeros: Callable[[np.uint64], int]
"""Index of the lowest set bit; 64 if there is none."""
bit_count: Callable[[np.uint64], int]
"""Number of set bits."""
words_at: Callable[[np.uint64, int], NDArray[np.uint64]]
"""``words_at(address, nwords)``: an array of words that lie there. Nothing is checked."""
memcpy: Callable[..., int]
memcmp: Callable[..., int]
madvise: Callable[..., int]
lseek: Callable[..., int]
pwrite: Callable[..., int]
fallocate: Callable[..., int]
writev: Callable[..., int]
read: Callable[..., int]
ioctl: Callable[..., int]
ppoll: Callable[..., int]
clock_gettime: Callable[..., int]
errno: Callable[[], int]

_numba: Any = numba  # its own types, which came late and differ by version, do not fit here
_intrinsic: Any = intrinsic
_types: Any = types


def _use_machine_code() -> None:
    global trailing_zeros, bit_count, words_at, memcpy, memcmp, madvise, lseek, pwrite, fallocate
    global writev, read, ioctl, ppoll, clock_gettime, errno

    def cttz(typing_context: Any, word: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.cttz(args[0], context.get_constant(_types.boolean, False))

        return _types.int64(_types.uint64), generate

    def ctpop(typing_context: Any, word: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.ctpop(args[0])

        return _types.int64(_types.uint64), generate

    def to_pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], ir.IntType(64).as_pointer())

        return _types.CPointer(_types.uint64)(_types.uint64), generate

    trailing_zeros = _intrinsic(cttz)
    bit_count = _intrinsic(ctpop)
    pointer_to = _intrinsic(to_pointer)
    carray = _numba.carray

    @_numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def read_words_at(address: np.uint64, nwords: int) -> NDArray[np.uint64]:
        return carray(pointer_to(address), nwords)  # type: ignore[no-any-return]

    words_at = read_words_at

    pointer, size = _types.voidptr, _types.uintp
    int32, int64, ssize = _types.int32, _types.int64, _types.intp
    function = _types.ExternalFunction
    memcpy = function("memcpy", pointer(pointer, pointer, size))
    memcmp = function("memcmp", int32(pointer, pointer, size))
    madvise = function("madvise", int32(pointer, size, int32))
    lseek = function("lseek", int64(int32, int64, int32))
    pwrite = function("pwrite", ssize(int32, pointer, size, int64))
    fallocate = function("fallocate", int32(int32, int32, int64, int64))
    writev = function("writev", ssize(int32, pointer, int32))
    read = function("read", ssize(int32, pointer, size))
    ioctl = function("ioctl", int32(int32, size, pointer))
    ppoll = function("ppoll", int32(pointer, size, pointer, pointer))
    clock_gettime = function("clock_gettime", int32(int32, pointer))

    errno_location = function("__errno_location", _types.CPointer(int32)())

    @_numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def read_errno() -> int:
        return carray(errno_location(), 1)[0]  # type: ignore[no-any-return]

    errno = read_errno


def _use_python() -> None:
    global trailing_zeros, bit_count, words_at, memcpy, memcmp, madvise, lseek, pwrite, fallocate
    global writev, read, ioctl, ppoll, clock_gettime, errno

    trailing_zeros = lambda word: ((int(word) & -int(word)).bit_length() - 1) % 65  # noqa: E731
    bit_count = lambda word: int(word).bit_count()  # noqa: E731

    def read_words_at(address: np.uint64, nwords: int) -> NDArray[np.uint64]:
        return np.ctypeslib.as_array((ctypes.c_uint64 * nwords).from_address(int(address)))

    words_at = read_words_at

    libc = ctypes.CDLL(None, use_errno=True)

    def function(name: str, result: Any, *arguments: Any) -> Callable[..., int]:
        call = libc[name]
        call.restype, call.argtypes = result, arguments
        return call

    pointer, size, ssize = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_ssize_t
    int32, int64 = ctypes.c_int32, ctypes.c_int64
    memcpy = function("memcpy", pointer, pointer, pointer, size)
    memcmp = function("memcmp", int32, pointer, pointer, size)
    madvise = function("madvise", int32, pointer, size, int32)
    lseek = function("lseek", int64, int32, int64, int32)
    pwrite = function("pwrite", ssize, int32, pointer, size, int64)
    fallocate = function("fallocate", int32, int32, int32, int64, int64)
    writev = function("writev", ssize, int32, pointer, int32)
    read = function("read", ssize, int32, pointer, size)
    ioctl = function("ioctl", int32, int32, size, pointer)
    ppoll = function("ppoll", int32, pointer, size, pointer, pointer)
    clock_gettime = function("clock_gettime", int32, int32, pointer)
    errno = ctypes.get_errno


if _numba.config.DISABLE_JIT:
    _use_python()
else:
    _use_machine_code()
