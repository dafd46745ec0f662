"""The gradients of softmax and log_softmax on the GPU; rows and columns as in activation_softmax.py.

softmax: grad_x = y * (grad - sum(grad * y));  log_softmax: grad_x = grad - exp(y) * sum(grad)
"""

import math

from numba import cuda

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
from tilewise.kernels.cuda.reduction import block_sum, group_sum
from tilewise.kernels.softmax_plan import THREADS, SoftmaxKernels

WARPS = THREADS // 32
SHORT = 4  # units of a row that a lane has in its registers, of both operands
ROOM = SHORT * 16


@device_function
def _term(grad, y, log):
    return grad if log else grad * y


@device_function
def _slope(grad, y, total, log):
    return grad - math.exp(y) * total if log else y * (grad - total)


def _make_short(vector: bool):
    unit = "vectors" if vector else "elements"

    @kernel(
        threads=THREADS, name=f"softmax_backward_short_rows_of_{unit}",
        promises=("LDG.128", "STG.128") if vector else (),
    )  # fmt: skip
    def softmax_backward_short_rows(
        grad: ELEMENTS, y: ELEMENTS, result: ELEMENTS, rows: INT64, n: INT32, group: INT32, log: INT32
    ):
        """Rows of n <= SHORT * group units, a unit being 16 bytes or an element; `group` lanes for each."""
        width = lanes(y) if vector else 1
        thread = cuda.threadIdx.x
        lane = thread & (group - 1)
        row = cuda.blockIdx.x * (THREADS // group) + thread // group
        first = row * n
        units = n // width if row < rows else 0
        raw = registers(y, 16)
        grads, outputs = register_sums(y, ROOM), register_sums(y, ROOM)
        total = zero(y)
        for k in range(SHORT):
            if lane + k * group < units:
                at = first + (lane + k * group) * width
                if vector:
                    load_vector(raw, grad, at)
                else:
                    raw[0] = grad[at]
                for i in range(width):
                    grads[k * width + i] = widen(raw[i])
                if vector:
                    load_vector(raw, y, at)
                else:
                    raw[0] = y[at]
                for i in range(width):
                    outputs[k * width + i] = widen(raw[i])
                    total += _term(grads[k * width + i], outputs[k * width + i], log)
        total = group_sum(total, group)
        for k in range(SHORT):
            if lane + k * group < units:
                at = first + (lane + k * group) * width
                for i in range(width):
                    raw[i] = narrow(_slope(grads[k * width + i], outputs[k * width + i], total, log), y)
                if vector:
                    store_vector(result, at, raw)
                else:
                    result[at] = raw[0]

    return softmax_backward_short_rows


_short_rows = {vector: _make_short(vector) for vector in (False, True)}


@kernel(threads=THREADS, promises=("LDG.128", "STG.128"))
def softmax_backward_long_rows(
    grad: ELEMENTS, y: ELEMENTS, result: ELEMENTS, n: INT64, vectors: INT64, log: INT32
):  # fmt: skip
    """A block a row of n, of which `vectors` of 16 bytes are taken as such."""
    width = lanes(y)
    thread = cuda.threadIdx.x
    first = cuda.blockIdx.x * n
    grads, outputs, scratch = registers(y, 16), registers(y, 16), shared_sums(y, 32)
    total = zero(y)
    for v in range(thread, vectors, THREADS):
        load_vector(grads, grad, first + v * width)
        load_vector(outputs, y, first + v * width)
        for i in range(width):
            total += _term(widen(grads[i]), widen(outputs[i]), log)
    for i in range(vectors * width + thread, n, THREADS):
        total += _term(widen(grad[first + i]), widen(y[first + i]), log)
    total = block_sum(total, scratch, WARPS)
    for v in range(thread, vectors, THREADS):
        load_vector(grads, grad, first + v * width)
        load_vector(outputs, y, first + v * width)
        for i in range(width):
            outputs[i] = narrow(_slope(widen(grads[i]), widen(outputs[i]), total, log), y)
        store_vector(result, first + v * width, outputs)
    for i in range(vectors * width + thread, n, THREADS):
        result[first + i] = narrow(_slope(widen(grad[first + i]), widen(y[first + i]), total, log), y)


@kernel(threads=THREADS)
def softmax_backward_columns(
    grad: ELEMENTS, y: ELEMENTS, result: ELEMENTS, n: INT64, inner: INT64, tiles: INT32, columns: INT32, log: INT32
):
    """Down columns of n elements that are `inner` apart; blocks as in `softmax_columns`."""
    thread = cuda.threadIdx.x
    group, member = THREADS // columns, thread // columns
    column = cuda.blockIdx.x % tiles * columns + (thread & (columns - 1))
    first = cuda.blockIdx.x // tiles * n * inner + column
    sums = shared_sums(y, THREADS)
    total = zero(y)
    end = n if column < inner else 0
    for k in range(member, end, group):
        total += _term(widen(grad[first + k * inner]), widen(y[first + k * inner]), log)
    sums[thread] = total
    cuda.syncthreads()
    total = zero(y)
    for k in range(thread & (columns - 1), THREADS, columns):
        total += sums[k]
    for k in range(member, end, group):
        at = first + k * inner
        result[at] = narrow(_slope(widen(grad[at]), widen(y[at]), total, log), y)


def by_logarithm(short_rows: dict, long_rows, columns, short: int) -> SoftmaxKernels:
    """Kernels whose last argument tells whether they are the logarithm's."""

    def starting(run, log: bool):
        return lambda *arguments: run(*arguments, log)

    logs = (False, True)
    return SoftmaxKernels(
        {(vector, log): starting(run, log) for vector, run in short_rows.items() for log in logs},
        {log: starting(long_rows, log) for log in logs}, {log: starting(columns, log) for log in logs}, short,
    )  # fmt: skip


GRADIENT = by_logarithm(_short_rows, softmax_backward_long_rows, softmax_backward_columns, SHORT)
