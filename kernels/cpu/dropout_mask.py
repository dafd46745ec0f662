"""Dropout in Numba: Philox4x32-10 in vectors, in one pass over the array.

A round multiplies two of a block's four 32-bit words to 64 bits each. A vector holds one word of eight blocks in lanes
of 64 bits, so that such a product is one instruction; the upper half of a lane may hold anything between rounds. Eight
blocks give 32 numbers, which interleaving brings into the elements' order:

    words a b c d of blocks 0 to 7    ->    a0 b0 c0 d0  a1 b1 c1 d1  ...  a7 b7 c7 d7

AVX-512 has such a vector in one register, AVX2 in two, NEON in four.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from tilewise.kernels.cpu import recycling
from tilewise.kernels.cpu.jit import AS_WRITTEN, device, kernel
from tilewise.kernels.cpu.scratch import empty
from tilewise.kernels.cpu.simd import _I32, _I64, address

BLOCKS = 8  # of a vector
STEP = 4 * BLOCKS  # elements
CHUNK = 16384  # elements in one unit of parallel work, a multiple of STEP
ROUNDS = 10
MULTIPLIERS, WEYL, LOW = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 2**32 - 1
_NANOSECONDS = 0.5  # an element, serially


class _Numbers:
    """Vectors of random numbers at the builder's position."""

    kind = ir.VectorType(_I64, BLOCKS)

    def __init__(self, builder):
        self.builder = builder

    def constant(self, *values: int):
        return ir.Constant(self.kind, list(values * (BLOCKS // len(values))))

    def splat(self, value, kind=None):
        kind = kind or self.kind
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, value, _I32(0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, kind.count), None))

    def low(self, value):
        return self.builder.and_(value, self.constant(LOW))

    def high(self, value):
        return self.builder.lshr(value, self.constant(32))

    def philox(self, block, seed, call):
        """The four words of the blocks from `block` on, each in the lower half of its lanes."""
        builder = self.builder
        counter = builder.add(self.splat(block), self.constant(*range(BLOCKS)))
        call, keys = self.splat(call), [seed, builder.lshr(seed, _I64(32))]
        words: tuple[Any, ...] = (  # a type checker would follow them through ten rounds for minutes
            counter,
            self.high(counter),
            call,
            self.high(call),
        )
        for _ in range(ROUNDS):
            a, b, c, d = words
            first, second = (
                builder.mul(self.low(word), self.constant(m)) for word, m in zip((a, c), MULTIPLIERS, strict=True)
            )
            # of a key's sums the lower 32 bits count, and a carry into the others does no harm
            b, d = (builder.xor(word, self.splat(key)) for word, key in zip((b, d), keys, strict=True))
            words = (builder.xor(self.high(second), b), second, builder.xor(self.high(first), d), first)
            keys = [builder.add(key, _I64(weyl)) for key, weyl in zip(keys, WEYL, strict=True)]
        return words

    def in_order(self, words):
        """The numbers as two vectors of STEP // 2."""
        builder, numbers = self.builder, ir.VectorType(_I32, BLOCKS)
        ab, cd = (
            builder.or_(self.low(even), builder.shl(odd, self.constant(32))) for even, odd in (words[:2], words[2:])
        )
        for start in (0, BLOCKS // 2):
            order = [i for block in range(start, start + BLOCKS // 2) for i in (block, BLOCKS + block)]
            pairs = builder.shuffle_vector(ab, cd, ir.Constant(numbers, order))
            yield builder.bitcast(pairs, ir.VectorType(_I32, STEP // 2))


@intrinsic
def _drop_step(typingctx, x, y, block, seed, call, threshold, scale):
    """y[i] = x[i] * (scale where number i of the blocks from `block` on is not below threshold, else 0), i < STEP."""
    count = STEP // 2

    def codegen(context, builder, signature, args):
        x, y, block, seed, call, threshold, scale = args
        emit = _Numbers(builder)
        vector, itemsize = ir.VectorType(scale.type, count), signature.args[0].dtype.bitwidth // 8
        least = emit.splat(builder.trunc(threshold, _I32), ir.VectorType(_I32, count))
        factor, nothing = emit.splat(scale, vector), ir.Constant(vector, None)
        for i, numbers in enumerate(emit.in_order(emit.philox(block, seed, call))):
            source, target = (
                builder.bitcast(builder.gep(pointer, [_I64(i * count)]), vector.as_pointer()) for pointer in (x, y)
            )
            kept = builder.icmp_unsigned(">=", numbers, least)
            product = builder.fmul(builder.load(source, align=itemsize), builder.select(kept, factor, nothing))
            builder.store(product, target, align=itemsize)
        return context.get_dummy_value()

    words = (types.int64,) * 4
    return types.void(x, y, *words, x.dtype), codegen


@device(fastmath=AS_WRITTEN)
def philox(block, seed, call):
    """The four words of a block, one by one: what `_drop_step` does for eight."""
    low, half = np.uint64(LOW), np.uint64(32)
    counter, key, number = np.uint64(block), np.uint64(seed), np.uint64(call)
    a, b, c, d = counter & low, counter >> half, number & low, number >> half
    k, m = key & low, key >> half
    for _ in range(ROUNDS):
        first, second = np.uint64(MULTIPLIERS[0]) * a, np.uint64(MULTIPLIERS[1]) * c
        a, b, c, d = (second >> half) ^ b ^ k, second & low, (first >> half) ^ d ^ m, first & low
        k, m = (k + np.uint64(WEYL[0])) & low, (m + np.uint64(WEYL[1])) & low
    return a, b, c, d


@device(fastmath=AS_WRITTEN)
def _drop_run(x, y, block, threshold, scale, seed, call):
    kept = x.dtype.type(scale)
    steps = x.size // STEP
    for i in range(steps):
        _drop_step(address(x, i * STEP), address(y, i * STEP), block + i * BLOCKS, seed, call, threshold, kept)
    for i in range(steps * STEP, x.size):
        number = philox(block + i // 4, seed, call)[i % 4]
        y[i] = x[i] * (kept if number >= np.uint64(threshold) else x.dtype.type(0))


@kernel(fastmath=AS_WRITTEN)
def drop(x, y, threshold, scale, seed, call):
    for chunk in prange((x.size + CHUNK - 1) // CHUNK):
        start = np.int64(chunk) * CHUNK
        stop = min(start + CHUNK, x.size)
        _drop_run(x[start:stop], y[start:stop], start // 4, threshold, scale, seed, call)


def prepare_dropout(shapes, dtype, *, threshold, scale):
    """`dropout` for one signature; called with x, seed, call and where to put the result."""
    (shape,) = shapes
    like, size = np.empty(0, dtype), math.prod(shape)
    kernel = drop.bound(size * _NANOSECONDS, like, like, threshold, scale, 0, 0)
    new = empty if size * dtype.itemsize >= recycling.FROM else np.empty

    def run(x, seed, call, out=None):
        y = new(shape, dtype) if out is None else out
        kernel(x.ravel(), y.ravel(), threshold, scale, seed, call)
        return y

    return run


def dropout(x, *, threshold, scale, seed, call):
    return prepare_dropout((x.shape,), x.dtype, threshold=threshold, scale=scale)(x, seed, call)


def dropout_backward(grad, *, threshold, scale, seed, call):
    """The same for the gradient: nothing of the mask was kept."""
    return dropout(grad, threshold=threshold, scale=scale, seed=seed, call=call)
