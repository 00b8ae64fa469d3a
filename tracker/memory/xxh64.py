"""XXH64 of 64-bit words, for compiled kernels: one input, or four of one length side by side.

The algorithm is Yann Collet's, from the *XXH64 algorithm description* in the specification of
xxHash (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md). Here every input is a whole
number of 8-byte words, so that the steps for the last 4 bytes and the last single bytes are left
out. The words are ``uint64`` in native byte order, which has to be little-endian.

Nearly all the time goes into :data:`four_stripes`. A stripe is 32 bytes, 8 for each of four
accumulators, which are one vector register; but the next stripe has to wait until this one is
added, rotated and multiplied. So four inputs take turns, where a processor is slow to multiply
64-bit lanes (AVX-512DQ on some) or does it in parts (AVX2). Numba would not make vectors of it by
itself: LLVM is told to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from tracker.bits.words import Words, kernel

PRIME_1 = np.uint64(0x9E3779B185EBCA87)
PRIME_2 = np.uint64(0xC2B2AE3D27D4EB4F)
PRIME_3 = np.uint64(0x165667B19E3779F9)
PRIME_4 = np.uint64(0x85EBCA77C2B2AE63)
PRIME_5 = np.uint64(0x27D4EB2F165667C5)
ZERO = np.uint64(0)

four_stripes: Callable[[Words, NDArray[np.int64], int, Words], None]
"""``four_stripes(words, starts, nstripes, lanes)``: step 2, for four inputs.

``starts`` says where in ``words`` each begins; ``lanes``, shape ``(16,)``, holds the four
accumulators of each, and gets them back. Nothing is checked.
"""

_numba: Any = numba
_cgutils: Any = cgutils
_intrinsic: Any = intrinsic
_types: Any = types


def _use_machine_code() -> None:
    global four_stripes

    int64 = ir.IntType(64)
    vector = ir.VectorType(int64, 4)

    def all_lanes(number: int | np.uint64) -> Any:
        return ir.Constant(vector, [int(number)] * 4)

    def stripes(context: Any, words: Any, starts: Any, nstripes: Any, lanes: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            def data(i: int) -> Any:
                return context.make_array(signature.args[i])(context, builder, args[i]).data

            def vector_at(pointer: Any, index: Any) -> Any:
                return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())

            inputs, places, registers = [], [], []
            for i in range(4):
                start = builder.load(builder.gep(data(1), [int64(i)]))
                inputs.append(builder.gep(data(0), [start]))
                places.append(vector_at(data(3), int64(4 * i)))
                registers.append(_cgutils.alloca_once(builder, vector))
                builder.store(builder.load(places[i], align=8), registers[i])
            with _cgutils.for_range(builder, args[2]) as loop:
                index = builder.mul(loop.index, int64(4))
                for pointer, register in zip(inputs, registers, strict=True):
                    word = builder.load(vector_at(pointer, index), align=8)
                    product = builder.mul(word, all_lanes(PRIME_2))
                    sum_ = builder.add(builder.load(register), product)
                    high = builder.shl(sum_, all_lanes(31))
                    rotated = builder.or_(high, builder.lshr(sum_, all_lanes(64 - 31)))
                    builder.store(builder.mul(rotated, all_lanes(PRIME_1)), register)
            for place, register in zip(places, registers, strict=True):
                builder.store(builder.load(register), place, align=8)
            return context.get_dummy_value()

        return _types.void(words, starts, _types.int64, lanes), generate

    four_stripes = _intrinsic(stripes)


def _use_python() -> None:
    global four_stripes

    def stripes(words: Words, starts: NDArray[np.int64], nstripes: int, lanes: Words) -> None:
        at = (starts[:, np.newaxis] + np.arange(4)).ravel()
        for i in range(nstripes):
            lanes[:] = round_(lanes, words[at + 4 * i])

    four_stripes = stripes


@kernel
def rotate(word: Any, by: int) -> Any:
    """``word``, a ``uint64`` or an array of them, ``by`` bits to the left, 1 to 63."""
    return (word << np.uint64(by)) | (word >> np.uint64(64 - by))


@kernel
def round_(accumulator: Any, word: Any) -> Any:
    """One word into one accumulator."""
    return rotate(accumulator + word * PRIME_2, 31) * PRIME_1


@kernel
def converge(a: np.uint64, b: np.uint64, c: np.uint64, d: np.uint64) -> Any:
    """Step 3: one of four accumulators."""
    sum_ = rotate(a, 1) + rotate(b, 7) + rotate(c, 12) + rotate(d, 18)
    for accumulator in (a, b, c, d):
        sum_ = (sum_ ^ round_(ZERO, accumulator)) * PRIME_1 + PRIME_4
    return sum_


@kernel
def avalanche(sum_: np.uint64) -> Any:
    """Step 6: the digest."""
    sum_ = (sum_ ^ (sum_ >> np.uint64(33))) * PRIME_2
    sum_ = (sum_ ^ (sum_ >> np.uint64(29))) * PRIME_3
    return sum_ ^ (sum_ >> np.uint64(32))


@kernel
def digest(words: Words, start: int, stop: int, seed: np.uint64) -> Any:
    """XXH64 of the bytes of ``words[start:stop]``, which the caller has checked."""
    i = start
    if stop - start >= 4:
        a, b, c, d = seed + PRIME_1 + PRIME_2, seed + PRIME_2, seed, seed - PRIME_1
        while i + 4 <= stop:
            a, b = round_(a, words[i]), round_(b, words[i + 1])
            c, d = round_(c, words[i + 2]), round_(d, words[i + 3])
            i += 4
        sum_ = converge(a, b, c, d)
    else:
        sum_ = seed + PRIME_5
    sum_ += np.uint64(8 * (stop - start))
    while i < stop:
        sum_ = rotate(sum_ ^ round_(ZERO, words[i]), 27) * PRIME_1 + PRIME_4
        i += 1
    return avalanche(sum_)


@kernel
def four_digests(
    words: Words,
    starts: NDArray[np.int64],
    nwords: int,
    seed: np.uint64,
    slots: NDArray[np.int64],
    digests: Words,
) -> None:
    """``digests[slots[i]] = digest(words, starts[i], starts[i] + nwords, seed)`` for i < 4.

    :param nwords: a multiple of 4, not 0; all indices are the caller's to check
    """
    lanes = np.empty(16, np.uint64)
    for i in range(4):
        lanes[4 * i], lanes[4 * i + 1] = seed + PRIME_1 + PRIME_2, seed + PRIME_2
        lanes[4 * i + 2], lanes[4 * i + 3] = seed, seed - PRIME_1
    four_stripes(words, starts, nwords // 4, lanes)
    for i in range(4):
        sum_ = converge(lanes[4 * i], lanes[4 * i + 1], lanes[4 * i + 2], lanes[4 * i + 3])
        digests[slots[i]] = avalanche(sum_ + np.uint64(8 * nwords))


if _numba.config.DISABLE_JIT:
    _use_python()
else:
    _use_machine_code()
