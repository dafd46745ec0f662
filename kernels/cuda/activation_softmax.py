"""softmax and log_softmax on the GPU, along any axis.

    softmax(x) = exp(x - m) / s,  log_softmax(x) = x - m - log(s),  m = max(x),  s = sum(exp(x - m))

Where the axis is the last, a row lies in one piece. Short rows are read once: a group of lanes, at most a warp, has the
row in its registers. A long row is a block's, which reads it twice (m and s together, then the results; the second time
from a cache). Along another axis neighbouring lanes take neighbouring columns, and a block's threads share the axis.
"""

import math
from functools import partial

from numba import cuda

from tilewise.kernels import softmax_plan
from tilewise.kernels.cuda.activation_softmax_gradient import GRADIENT, by_logarithm
from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64, kernel
from tilewise.kernels.cuda.launch import device as device_function
from tilewise.kernels.cuda.memory import (
    lanes,
    load_vector,
    narrow,
    register_sums,
    registers,
    shared_sums,
    store_vector,
    widen,
    zero,
)  # fmt: skip
from tilewise.kernels.cuda.reduction import block_max, block_sum, group_max, group_sum, maximum
from tilewise.kernels.softmax_plan import SHORT, THREADS

WARPS = THREADS // 32
ROOM = SHORT * 16  # for as many units of float16


@device_function
def _lowest(pointer):
    return type(zero(pointer))(-math.inf)


@device_function
def _rescaled(total, largest, top):
    """A sum of exp(x - largest) as one of exp(x - top), top >= largest; NaN where top is."""
    return total if largest == top else total * math.exp(largest - top)


def _make_short(vector: bool):
    unit = "vectors" if vector else "elements"

    @kernel(threads=THREADS, name=f"softmax_short_rows_of_{unit}", promises=("LDG.128", "STG.128") if vector else ())
    def softmax_short_rows(x: ELEMENTS, y: ELEMENTS, rows: INT64, n: INT32, group: INT32, log: INT32):
        """Rows of n <= SHORT * group units, a unit being 16 bytes or an element; `group` lanes for each."""
        width = lanes(x) if vector else 1
        thread = cuda.threadIdx.x
        lane = thread & (group - 1)
        row = cuda.blockIdx.x * (THREADS // group) + thread // group
        first = row * n
        units = n // width if row < rows else 0
        raw, values = registers(x, 16), register_sums(x, ROOM)
        largest = _lowest(x)
        for k in range(SHORT):
            if lane + k * group < units:
                at = first + (lane + k * group) * width
                if vector:
                    load_vector(raw, x, at)
                else:
                    raw[0] = x[at]
                for i in range(width):
                    values[k * width + i] = widen(raw[i])
                    largest = maximum(largest, values[k * width + i])
        largest = group_max(largest, group)
        total = zero(x)
        for k in range(SHORT):
            if lane + k * group < units:
                for i in range(width):
                    shifted = values[k * width + i] - largest
                    e = math.exp(shifted)
                    total += e
                    values[k * width + i] = shifted if log else e
        total = group_sum(total, group)
        one = type(total)(1)
        scale = one if log else one / total
        shift = math.log(total) if log else zero(x)
        for k in range(SHORT):
            if lane + k * group < units:
                at = first + (lane + k * group) * width
                for i in range(width):
                    raw[i] = narrow(values[k * width + i] * scale - shift, y)
                if vector:
                    store_vector(y, at, raw)
                else:
                    y[at] = raw[0]

    return softmax_short_rows


_short_rows = {vector: _make_short(vector) for vector in (False, True)}


@kernel(threads=THREADS, promises=("LDG.128", "STG.128"))
def softmax_long_rows(x: ELEMENTS, y: ELEMENTS, n: INT64, vectors: INT64, log: INT32):
    """A block a row of n, of which `vectors` of 16 bytes are taken as such.

    Every thread keeps the largest number that it saw and the sum of exp(x - that), and scales the sum where a larger
    one comes (Milakov and Gimelshein 2018).
    """
    width = lanes(x)
    thread = cuda.threadIdx.x
    first = cuda.blockIdx.x * n
    raw, scratch = registers(x, 16), shared_sums(x, 32)
    largest, total = _lowest(x), zero(x)
    for v in range(thread, vectors, THREADS):
        load_vector(raw, x, first + v * width)
        top = largest
        for i in range(width):
            top = maximum(top, widen(raw[i]))
        total = _rescaled(total, largest, top)
        largest = top
        if top != _lowest(x):
            for i in range(width):
                total += math.exp(widen(raw[i]) - top)
    for i in range(vectors * width + thread, n, THREADS):
        value = widen(x[first + i])
        top = maximum(largest, value)
        total = _rescaled(total, largest, top)
        largest = top
        if top != _lowest(x):
            total += math.exp(value - top)
    top = block_max(largest, scratch, WARPS)
    total = block_sum(_rescaled(total, largest, top), scratch, WARPS)
    scale = type(total)(1) / total
    shift = math.log(total)
    for v in range(thread, vectors, THREADS):
        load_vector(raw, x, first + v * width)
        for i in range(width):
            shifted = widen(raw[i]) - top
            raw[i] = narrow(shifted - shift if log else math.exp(shifted) * scale, y)
        store_vector(y, first + v * width, raw)
    for i in range(vectors * width + thread, n, THREADS):
        shifted = widen(x[first + i]) - top
        y[first + i] = narrow(shifted - shift if log else math.exp(shifted) * scale, y)


@kernel(threads=THREADS)
def softmax_columns(x: ELEMENTS, y: ELEMENTS, n: INT64, inner: INT64, tiles: INT32, columns: INT32, log: INT32):
    """Down columns of n elements that are `inner` apart.

    A block takes `columns` of them, with THREADS // columns threads each. Block b has the columns from
    (b % tiles) * columns on, of the (n, inner) matrix b // tiles.
    """
    thread = cuda.threadIdx.x
    group, member = THREADS // columns, thread // columns
    column = cuda.blockIdx.x % tiles * columns + (thread & (columns - 1))
    first = cuda.blockIdx.x // tiles * n * inner + column
    maxima, sums = shared_sums(x, THREADS), shared_sums(x, THREADS)
    largest, total = _lowest(x), zero(x)
    end = n if column < inner else 0
    for k in range(member, end, group):
        value = widen(x[first + k * inner])
        top = maximum(largest, value)
        total = _rescaled(total, largest, top)
        largest = top
        if top != _lowest(x):
            total += math.exp(value - top)
    maxima[thread], sums[thread] = largest, total
    cuda.syncthreads()
    top, total = _lowest(x), zero(x)
    for k in range(thread & (columns - 1), THREADS, columns):
        top = maximum(top, maxima[k])
    for k in range(thread & (columns - 1), THREADS, columns):
        total += _rescaled(sums[k], maxima[k], top)
    scale = type(total)(1) / total
    shift = math.log(total)
    for k in range(member, end, group):
        shifted = widen(x[first + k * inner]) - top
        y[first + k * inner] = narrow(shifted - shift if log else math.exp(shifted) * scale, y)


_KERNELS = by_logarithm(_short_rows, softmax_long_rows, softmax_columns, SHORT)
softmax, log_softmax = (partial(softmax_plan.forward, _KERNELS, log) for log in (False, True))
softmax_backward, log_softmax_backward = (partial(softmax_plan.backward, GRADIENT, log) for log in (False, True))
