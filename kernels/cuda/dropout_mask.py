"""Dropout on the GPU: one launch, bound by memory; each thread makes the random numbers of its elements by itself.

Each thread takes 16 bytes at a time, whose four elements (float16: eight, float64: two) need one block of Philox4x32-10
(two; half of one): some 80 instructions beside 32 bytes of traffic.
"""

from functools import partial

from numba import cuda
from numba.cuda.types import uint32, uint64

from tilewise.kernels import dropout_mask_plan
from tilewise.kernels.cuda.launch import ELEMENTS, INT64, REAL, device, engine_of, kernel
from tilewise.kernels.cuda.memory import lanes, load_vector, narrow, registers, store_vector, widen

_THREADS = 256
_ROUNDS = 10


@device
def philox(block, seed, call):
    """The four words of a block, uint32: Philox4x32-10 at the counter (block, call) and the key `seed`."""
    half = uint64(32)
    a, b = uint32(block), uint32(uint64(block) >> half)
    c, d = uint32(call), uint32(uint64(call) >> half)
    k, m = uint32(seed), uint32(uint64(seed) >> half)
    for _ in range(_ROUNDS):
        first, second = uint64(0xD2511F53) * uint64(a), uint64(0xCD9E8D57) * uint64(c)
        a, b = uint32(uint32(second >> half) ^ b ^ k), uint32(second)
        c, d = uint32(uint32(first >> half) ^ d ^ m), uint32(first)
        k, m = uint32(k + uint32(0x9E3779B9)), uint32(m + uint32(0xBB67AE85))
    return a, b, c, d


@device
def word(words, i):
    """Number i % 4 of a block."""
    place = i & 3
    low = words[0] if place == 0 else words[1]
    high = words[2] if place == 2 else words[3]
    return low if place < 2 else high


@kernel(threads=_THREADS, promises=("LDG.128", "STG.128"))
def drop(
    x: ELEMENTS, y: ELEMENTS, scale: REAL, threshold: INT64, seed: INT64, call: INT64, count: INT64, vectors: INT64
):  # fmt: skip
    """y[i] = x[i] * (scale or 0), i < count; the first `vectors` of 16 bytes as such, the rest one by one."""
    step = cuda.gridDim.x * _THREADS
    first = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
    width = lanes(x)
    nothing, least = scale - scale, uint32(threshold)
    values, results = registers(x, 8), registers(y, 8)
    for v in range(first, vectors, step):
        load_vector(values, x, v * width)
        words = philox((v * width) >> 2, seed, call)
        for k in range(width):
            i = v * width + k
            if k == 4:
                words = philox(i >> 2, seed, call)
            factor = scale if word(words, i) >= least else nothing
            results[k] = narrow(widen(values[k]) * factor, y)
        store_vector(y, v * width, results)
    for i in range(vectors * width + first, count, step):
        factor = scale if word(philox(i >> 2, seed, call), i) >= least else nothing
        y[i] = narrow(widen(x[i]) * factor, y)


dropout = partial(dropout_mask_plan.dropout, drop, engine_of)
dropout_backward = partial(dropout_mask_plan.dropout_backward, drop, engine_of)
