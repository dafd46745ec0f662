"""Memory aligned to a vector: scratch for kernels, and large results.

A vector load that straddles two cache lines costs two accesses: with panels at 16-byte alignment the micro-kernel ran
at 118 GFLOP/s, at 64 bytes at 148 (Cascade Lake, one core).
"""

import ctypes
import math
from typing import Any

import numpy as np
from numba import extending, types
from numba.core import cgutils
from numba.np.arrayobj import populate_array

from tilewise.kernels.cpu import recycling
from tilewise.kernels.cpu.simd import _I64

intrinsic: Any = extending.intrinsic  # to a type checker its call does not return

ALIGNMENT = 64  # bytes: a cache line, and the widest vector
# Bytes between the places in a page where NumPy's memory and a result start. malloc gives large blocks 16 bytes behind
# a page's start; a result 48 bytes further on is written where the operand is read next, up to the page, and processors
# that compare these 12 bits first make the load wait: a 3x3 maximum or average with stride 1 took a quarter longer on
# Zen 4 (0.45 ms instead of 0.35 for 8x128x28x28).
APART = 512


# What follows makes arrays in kernels. All of it is emitted, because compiling np.empty, np.zeros and np.arange, with
# what they call, is a part of a kernel's first call that is felt.


@intrinsic
def scratch(typingctx, count, like):
    """An uninitialised, aligned 1-D array of `count` elements of like's dtype, with a vector's length to spare
    behind.
    """
    result = types.Array(like.dtype, 1, "C")

    def codegen(context, builder, signature, args):
        spare = _I64(ALIGNMENT // (like.dtype.bitwidth // 8))
        return _allocated(context, builder, result, [builder.add(args[0], spare)])._getvalue()

    return result(types.intp, like), codegen


@intrinsic
def zeros(typingctx, count, like):
    """`count` zeros of like's dtype."""
    return _zeros_of(like.dtype, count, like)


@intrinsic
def double_zeros(typingctx, count):
    """`count` zeros of float64."""
    return _zeros_of(types.float64, count)


def _zeros_of(element, *arguments):
    """The signature and code of an intrinsic with these arguments, the number of elements first."""
    result = types.Array(element, 1, "C")

    def codegen(context, builder, signature, args):
        array = _allocated(context, builder, result, args[:1])
        cgutils.memset(builder, array.data, builder.mul(args[0], array.itemsize), 0)
        return array._getvalue()

    return result(types.intp, *arguments[1:]), codegen


@intrinsic
def integers(typingctx, count):
    """An uninitialised array of `count` int64."""
    result = types.Array(types.int64, 1, "C")

    def codegen(context, builder, signature, args):
        return _allocated(context, builder, result, args)._getvalue()

    return result(types.intp), codegen


@intrinsic
def integer_table(typingctx, rows, columns):
    """An uninitialised array of (rows, columns) int64."""
    result = types.Array(types.int64, 2, "C")

    def codegen(context, builder, signature, args):
        return _allocated(context, builder, result, args)._getvalue()

    return result(types.intp, types.intp), codegen


@intrinsic
def progression(typingctx, step, count):
    """The int64 i * step, i < count."""
    result = types.Array(types.int64, 1, "C")

    def codegen(context, builder, signature, args):
        step, count = args
        array = _allocated(context, builder, result, [count])
        with cgutils.for_range(builder, count) as loop:
            builder.store(builder.mul(loop.index, step), builder.gep(array.data, [loop.index]))
        return array._getvalue()

    return result(types.intp, types.intp), codegen


def _allocated(context, builder, kind, shape):
    """An array of this type on aligned memory, whose elements are not set; MemoryError where there is none."""
    itemsize = kind.dtype.bitwidth // 8
    strides = [_I64(itemsize)]
    for length in reversed(shape):
        strides.insert(0, builder.mul(strides[0], length))
    memory = context.nrt.meminfo_alloc_aligned(builder, strides[0], ALIGNMENT)
    array = context.make_array(kind)(context, builder)
    populate_array(
        array, builder.bitcast(context.nrt.meminfo_data(builder, memory), array.data.type), itemsize=itemsize,
        meminfo=memory, shape=cgutils.pack_array(builder, shape), strides=cgutils.pack_array(builder, strides[1:]),
    )  # fmt: skip
    return array


@intrinsic
def keep(typingctx, array):
    """Let the array live until here. A pointer into it does not: its last use by name would be the end of it."""

    def codegen(context, builder, signature, args):
        return context.get_dummy_value()

    return types.void(array), codegen


# Results from this size on are aligned; below it, the microsecond that it costs would be felt.
ALIGNED_FROM = 1 << 16


def empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """np.empty for a result; aligned where it is large. (NumPy's own memory starts 16 bytes behind a page's start.)"""
    if math.prod(shape) * dtype.itemsize < ALIGNED_FROM:
        return np.empty(shape, dtype)
    return large(shape, dtype)[0]


def large(shape: tuple[int, ...], dtype) -> tuple[np.ndarray, bool]:
    """(`empty` for a result of some size, whether its memory has been used before)."""
    size = math.prod(shape) * dtype.itemsize
    if size >= recycling.FROM and recycling.AVAILABLE:
        return recycling.empty(shape, dtype, size)
    return _at_alignment(shape, dtype, size), False


def aligned(count: int, dtype) -> np.ndarray:
    """What `scratch` gives, from Python: for what is kept between calls, such as packed weights."""
    size = count * dtype.itemsize + ALIGNMENT
    return _at_alignment((size // dtype.itemsize,), dtype, size)


def _at_alignment(shape: tuple[int, ...], dtype, size: int) -> np.ndarray:
    memory: Any = np.empty(size + ALIGNMENT + APART, np.uint8)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))  # memory.ctypes.data takes longer
    return np.ndarray(shape, dtype, memory, -address % ALIGNMENT + APART)
