"""How an ioctl number is made: ``include/uapi/asm-generic/ioctl.h``.

The layout below is that of x86, arm64 and riscv. Some old architectures (alpha, mips, powerpc,
sparc) have another; none of them is supported.
"""

from __future__ import annotations

import ctypes

_IOC_NRSHIFT = 0
_IOC_TYPESHIFT = 8
_IOC_SIZESHIFT = 16
_IOC_DIRSHIFT = 30

_IOC_NONE = 0
_IOC_WRITE = 1
_IOC_READ = 2


def ioc(direction: int, kind: int, nr: int, size: int) -> int:
    """``_IOC``: the ioctl number.

    :param direction: 2 bits, whether userland writes (1), reads (2), both (3) or neither (0)
    :param kind: 8 bits, the driver's letter (``type`` in C)
    :param nr: 8 bits
    :param size: 14 bits, bytes of the argument
    :raise ValueError: a part does not fit its field
    """
    for value, bits in ((direction, 2), (kind, 8), (nr, 8), (size, 14)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{value:#x} does not fit in {bits} bits of an ioctl number")
    return (
        direction << _IOC_DIRSHIFT
        | size << _IOC_SIZESHIFT
        | kind << _IOC_TYPESHIFT
        | nr << _IOC_NRSHIFT
    )


def io(kind: int, nr: int) -> int:
    """``_IO``: no argument."""
    return ioc(_IOC_NONE, kind, nr, 0)


def ior(kind: int, nr: int, argument: type[ctypes.Structure]) -> int:
    """``_IOR``: userland reads the argument."""
    return ioc(_IOC_READ, kind, nr, ctypes.sizeof(argument))


def iow(kind: int, nr: int, argument: type[ctypes.Structure]) -> int:
    """``_IOW``: userland writes the argument."""
    return ioc(_IOC_WRITE, kind, nr, ctypes.sizeof(argument))


def iowr(kind: int, nr: int, argument: type[ctypes.Structure]) -> int:
    """``_IOWR``: userland writes the argument and reads it back."""
    return ioc(_IOC_READ | _IOC_WRITE, kind, nr, ctypes.sizeof(argument))
