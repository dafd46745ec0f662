"""Matrix products inside @njit: `matmul` of vectors, matrices and stacks, `linear`, and their gradients; all native.

Which kernel multiplies vectors and matrices follows gemm_plan.py, so that a call gives the same bits as from Python;
of stacks, multiply_stack knows two kernels only. The chunks are those of one thread.
"""

from typing import Any

import numpy as np
from numba.core.errors import TypingError
from numba.cpython.unsafe.tuple import tuple_setitem
from numba.extending import overload, register_jitable

from tilewise.kernels.cpu import gemm as cpu
from tilewise.kernels.cpu import gemm_plan, simd
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES
from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.njit.arguments import WrongShape, check_arrays, check_unsupported, literal
from tilewise.kernels.njit.linking import call_kernel, contiguous, optional, shaped
from tilewise.kernels.shapes import EPILOGUES

lane_count, chunk, blocks_of = simd.lane_count, gemm_plan._chunk, gemm_plan._blocks
fits_in_place, fits_dots, is_wide = gemm_plan.fits_in_place, gemm_plan.by_dots, gemm_plan.is_wide
dot_columns = gemm_plan.dot_columns
for function in (lane_count, chunk, gemm_plan._tasks, blocks_of, fits_in_place, fits_dots, is_wide, dot_columns):
    register_jitable(error_model="numpy")(function)
DOT_ROWS, DOT_COLUMNS, ROWS, BLOCK, STEP_BYTES = (
    gemm_plan.DOT_ROWS, gemm_plan.DOT_COLUMNS, gemm_plan.ROWS, gemm_plan.BLOCK, gemm_plan.STEP_BYTES
)  # fmt: skip
IN_CACHE, FEW_ROWS, STEP_ROWS, IN_STACK = (
    gemm_plan.IN_CACHE, gemm_plan.FEW_ROWS, gemm_plan.STEP_ROWS, gemm_plan.IN_STACK
)  # fmt: skip
FEWEST_STEPS, PARTS, STREAMS, VECTOR_COLUMNS = (
    gemm_plan.FEWEST_STEPS, gemm_plan.PARTS, gemm_plan.STREAMS, gemm_plan.VECTOR_COLUMNS
)  # fmt: skip
IN_PARTS, PART_DEPTH, CHUNKS, KC = gemm_plan.IN_PARTS, gemm_plan.PART_DEPTH, gemm_plan.CHUNKS, gemm_plan.KC
MR, NV, SMALL_BACKWARD = simd.MR, simd.NV, cpu.SMALL_BACKWARD


@kernel(parallel=False)
def by_dots(a, b, c, bias, code):
    """c = activation(a b^T + bias); see gemm_plan.dots."""
    (m, depth), n = a.shape, b.shape[0]
    step = depth if m <= ROWS or n <= DOT_COLUMNS else STEP_BYTES // a.itemsize
    rows = m if n > DOT_COLUMNS and m <= DOT_ROWS else chunk(m, ROWS, 64)
    columns = dot_columns(n, depth, max(step, 1), a.itemsize)
    call_kernel("cpu.gemm_dots.multiply_dots", (a, b, c, bias, code, rows, columns, max(step, 1)))


@kernel(parallel=False)
def in_place(a, a_by_rows, b, c, bias, code):
    """c = activation(a b + bias), packing nothing; see gemm_plan.in_place."""
    (m, n), depth = c.shape, b.shape[0]
    if m == 1 and n * depth * c.itemsize > IN_CACHE and depth >= 2 * FEWEST_STEPS:
        part = chunk(depth, STREAMS, max(FEWEST_STEPS, -(-depth // PARTS)))
        geometry = np.array((n, depth, chunk(n, lane_count(c.itemsize), VECTOR_COLUMNS), part))
        call_kernel("cpu.gemm_vector.multiply_vector", (a, b, c, geometry))
    else:
        steps = (depth, 1) if a_by_rows else (1, m)
        step = depth if n * depth * c.itemsize <= IN_CACHE else STEP_ROWS
        rows = chunk(m, MR, 8 * MR)
        columns = n if m > FEW_ROWS else chunk(n, NV * lane_count(c.itemsize), 1024)
        geometry = np.array((m, n, depth, steps[0], steps[1], rows, columns, max(step, 1)))
        call_kernel("cpu.gemm_in_place.multiply_in_place", (a, b, c, geometry))
    if bias.size > 0 or code != 0:
        call_kernel("cpu.gemm_dots.finish", (c, bias, code))


@kernel(parallel=False)
def by_blocks(a, a_starts, a_by_rows, b, b_starts, b_by_rows, c, m, n, depth, bias, code):
    """c = activation(a b + bias), copying blocks; see gemm_plan._plan_blocks."""
    a_row, a_column = (depth, 1) if a_by_rows else (1, m)
    b_row, b_column = (n, 1) if b_by_rows else (1, depth)
    if a_starts.size == 1 and max(m, n) <= IN_PARTS and depth >= 2 * PART_DEPTH:
        part = chunk(depth, KC, max(PART_DEPTH, -(-depth // CHUNKS)))
        call_kernel(
            "cpu.gemm_parts.multiply_parts",
            (a, a_row, a_column, b, b_row, b_column, c, m, n, depth, part, bias, code),
        )
        return
    rows, columns = blocks_of(m, n, NV * lane_count(c.itemsize), a_starts.size)
    call_kernel(
        "cpu.gemm_blocks.multiply_blocks",
        (a, a_starts, a_row, a_column, b, b_starts, b_row, b_column, c, m, n, depth, rows, columns, bias, code),
    )


@kernel(parallel=False)
def wide(a, b, c):
    """c = a b, as a convolution of one image by 1x1 kernels; see gemm_plan._plan_wide."""
    (m, n), depth, one, nothing = c.shape, b.shape[0], np.int64(1), np.empty(0, c.dtype)
    image, weight, result = shaped(b, (1, depth, 1, n)), shaped(a, (m, depth, 1, 1)), shaped(c, (1, m, 1, n))
    call_kernel("njit.conv.pointwise", (image, weight, result, nothing, nothing, (one, one), one, 0))


@kernel(parallel=False)
def multiply(a, a_by_rows, b, b_by_rows, c, bias, code):
    """c = activation(a b + bias); see gemm_plan.plan. a and b as they lie: transposed where not by rows."""
    m, n = c.shape
    depth = a.shape[1] if a_by_rows else a.shape[0]
    if m == 0 or n == 0:
        return
    if a_by_rows and not b_by_rows and fits_dots(m, n):
        call_kernel("njit.gemm.by_dots", (a, b, c, bias, code))
    elif b_by_rows and fits_in_place(m, n, depth, a_by_rows, c.itemsize):
        call_kernel("njit.gemm.in_place", (a, a_by_rows, b, c, bias, code))
    elif a_by_rows and n <= DOT_COLUMNS:
        turned = np.empty((n, depth), b.dtype)
        for j in range(n):
            for k in range(depth):
                turned[j, k] = b[k, j]
        call_kernel("njit.gemm.by_dots", (a, turned, c, bias, code))
    elif a_by_rows and b_by_rows and bias.size == 0 and code == 0 and is_wide(m, n, depth, c.itemsize):
        call_kernel("njit.gemm.wide", (a, b, c))
    else:
        start = np.zeros(1, np.int64)
        call_kernel(
            "njit.gemm.by_blocks", (a, start, a_by_rows, b, start, b_by_rows, c, m, n, depth, bias, code)
        )  # fmt: skip


@device(allocates=True)
def _starts(own, lead, size):
    """Where each matrix of a stack with leading axes `lead` begins, if its own are `own` and it is broadcast."""
    count = 1
    for extent in lead:
        count *= extent
    starts = np.zeros(count, np.int64)
    for number in range(count):
        rest, step, start = number, size, 0
        for back in range(1, lead.size + 1):
            extent = lead[lead.size - back]
            place = rest % extent
            rest //= extent
            if back <= own.size:
                if own[own.size - back] > 1:
                    start += place * step
                step *= own[own.size - back]
        starts[number] = start
    return starts


@kernel(parallel=False)
def multiply_stack(a, a_lead, b, b_lead, c, lead, m, n, depth):
    """Many products c = a b of matrices by rows, one below the other; see gemm_plan.plan_stack."""
    a_starts, b_starts = _starts(a_lead, lead, m * depth), _starts(b_lead, lead, depth * n)
    count = a_starts.size
    if max(m, n) * depth * c.itemsize <= IN_STACK:
        together = max(1, -(-count // 32))
        call_kernel(
            "cpu.gemm_in_place.multiply_stack_in_place", (a, a_starts, depth, 1, b, b_starts, c, m, n, depth, together)
        )
        return
    no_bias = np.empty(0, c.dtype)
    call_kernel("njit.gemm.by_blocks", (a, a_starts, True, b, b_starts, True, c, m, n, depth, no_bias, 0))


def stored(matrix) -> Any:
    """(a matrix's memory as a contiguous one, whether that is by rows)."""
    raise NotImplementedError("for compiled code only")


@overload(stored)
def _overload_stored(matrix):
    if matrix.layout == "F":
        return lambda matrix: (contiguous(matrix.T), False)
    return lambda matrix: (contiguous(matrix), True)


def _product_of_matrices(a, b, out=None):
    if a.shape[1] != b.shape[0]:
        raise WrongShape(
            "matmul: a's last axis is {} but b's second to last is {} (a {}, b {})",
            a.shape[1], b.shape[0], a.shape, b.shape,
        )  # fmt: skip
    c = np.empty((a.shape[0], b.shape[1]), a.dtype)
    left, by_rows = stored(a)
    right, also_by_rows = stored(b)
    call_kernel("njit.gemm.multiply", (left, by_rows, right, also_by_rows, c, np.empty(0, a.dtype), 0))
    return c


def _product_of_vectors(a_rank: int, b_rank: int):
    """At least one operand is a vector, none a stack."""

    def implementation(a, b, out=None):
        depth = a.shape[a_rank - 1]
        if depth != b.shape[0]:
            raise WrongShape(
                "matmul: a's last axis is {} but b has {} (a {}, b {})", depth, b.shape[0], a.shape, b.shape
            )
        rows, columns = contiguous(a), contiguous(b)
        left = shaped(rows, (1 if a_rank == 1 else a.shape[0], depth))
        right = shaped(columns, (depth, 1 if b_rank == 1 else b.shape[b_rank - 1]))
        c = np.empty((left.shape[0], right.shape[1]), a.dtype)
        call_kernel("njit.gemm.multiply", (left, True, right, True, c, np.empty(0, a.dtype), 0))
        if a_rank == b_rank:
            return c[0, 0]
        return shaped(c, (c.size,))

    return implementation


@device(raises=True)
def _broadcast(a_lead, b_lead, lead):
    """Fill in the leading axes of the result."""
    for back in range(1, lead.size + 1):
        one = a_lead[a_lead.size - back] if back <= a_lead.size else 1
        other = b_lead[b_lead.size - back] if back <= b_lead.size else 1
        if one != other and one != 1 and other != 1:
            raise WrongShape("matmul: the leading axes {} and {} do not broadcast", one, other)
        lead[lead.size - back] = other if one == 1 else one


def _product_of_stacks(a_rank: int, b_rank: int):
    rank = max(a_rank, b_rank)
    zeros = (0,) * rank

    def implementation(a, b, out=None):
        m, depth, n = a.shape[a_rank - 2], a.shape[a_rank - 1], b.shape[b_rank - 1]
        if depth != b.shape[b_rank - 2]:
            raise WrongShape(
                "matmul: a's last axis is {} but b's second to last is {} (a {}, b {})",
                depth, b.shape[b_rank - 2], a.shape, b.shape,
            )  # fmt: skip
        a_lead, b_lead = np.array(a.shape)[: a_rank - 2], np.array(b.shape)[: b_rank - 2]
        lead = np.empty(rank - 2, np.int64)
        _broadcast(a_lead, b_lead, lead)
        shape = zeros
        for i in range(rank - 2):
            shape = tuple_setitem(shape, i, lead[i])
        shape = tuple_setitem(tuple_setitem(shape, rank - 2, m), rank - 1, n)
        c = np.empty(shape, a.dtype)
        if c.size == 0:
            return c
        matrices = c.size // (m * n)
        if depth == 0:
            c[:] = 0
            return c
        left = shaped(contiguous(a), (a.size // depth, depth))
        right = shaped(contiguous(b), (b.size // n, n))
        flat = shaped(c, (matrices * m, n))
        if b_rank == 2:  # one right operand for the whole stack: a single tall product
            call_kernel("njit.gemm.multiply", (left, True, right, True, flat, np.empty(0, a.dtype), 0))
        else:
            call_kernel("njit.gemm.multiply_stack", (left, a_lead, right, b_lead, flat, lead, m, n, depth))
        return c

    return implementation


def matmul(a, b, out=None):
    check_arrays("matmul", a=a, b=b)
    check_unsupported("matmul", out=out)
    if 0 in (a.ndim, b.ndim):
        raise TypingError(f"matmul: a and b must have at least 1 dimension, got {a.ndim} and {b.ndim}")
    if a.ndim == b.ndim == 2:
        return _product_of_matrices
    if max(a.ndim, b.ndim) <= 2:
        return _product_of_vectors(a.ndim, b.ndim)
    if min(a.ndim, b.ndim) == 1:
        raise TypingError(
            "matmul: inside @njit, a stack times a vector is not supported; give the vector a second axis"
        )
    return _product_of_stacks(a.ndim, b.ndim)


def linear(x, weight, bias=None, activation=None, out=None):
    check_arrays("linear", {"weight": (2,), "bias": (1,)}, x=x, weight=weight, bias_=bias)
    check_unsupported("linear", out=out)
    code = ACTIVATION_CODES[literal("linear", "activation", activation, *EPILOGUES)]
    if x.ndim == 0:
        raise TypingError("linear: x must have at least 1 dimension, got 0")
    last = x.ndim - 1

    def implementation(x, weight, bias=None, activation=None, out=None):
        outputs, depth = weight.shape
        shift = optional(bias, x)
        if x.shape[last] != depth:
            raise WrongShape(
                "linear: weight expects {} features but x has {} (x {}, weight {})",
                depth, x.shape[last], x.shape, weight.shape,
            )  # fmt: skip
        if shift.size != outputs and bias is not None:
            raise WrongShape(
                "linear: bias must have shape ({},), one value per output channel, got ({},)", outputs, shift.size
            )
        y = np.empty(tuple_setitem(x.shape, last, outputs), x.dtype)
        rows = y.size // max(outputs, 1)
        flat, result = shaped(contiguous(x), (rows, depth)), shaped(y, (rows, outputs))
        right, transposed = stored(weight)
        call_kernel("njit.gemm.multiply", (flat, True, right, not transposed, result, shift, code))
        return y

    return implementation


@kernel(parallel=False)
def linear_gradients(grad, x, weight, grad_x, grad_weight, grad_bias):
    """Of rows; small ones in one go, as the Python call does."""
    in_cache = max(weight.size, x.size) * x.itemsize <= IN_CACHE
    if in_cache and 0 < grad.size * x.shape[1] <= SMALL_BACKWARD:
        call_kernel(
            "cpu.gemm_in_place.small_linear_backward", (grad, x, weight, grad_x, grad_weight, grad_bias, 1, 1, 1)
        )  # fmt: skip
        return
    no_bias = np.empty(0, x.dtype)
    call_kernel("njit.gemm.multiply", (grad, True, weight, True, grad_x, no_bias, 0))
    call_kernel("njit.gemm.multiply", (grad, False, x, True, grad_weight, no_bias, 0))
    call_kernel("cpu.gemm_in_place.column_sums", (grad, grad_bias))


def linear_backward(grad, x, weight, needs=("x", "weight", "bias")):
    check_arrays("linear_backward", {"weight": (2,)}, grad=grad, x=x, weight=weight)
    if needs != ("x", "weight", "bias"):
        raise TypingError("linear_backward: needs is not supported inside @njit; leave it out: all three are computed")
    if x.ndim == 0 or grad.ndim != x.ndim:
        raise TypingError(f"linear_backward: grad must have as many dimensions as x, {x.ndim}, got {grad.ndim}")
    last = x.ndim - 1

    def implementation(grad, x, weight, needs=("x", "weight", "bias")):
        outputs, depth = weight.shape
        if x.shape[last] != depth or grad.shape != tuple_setitem(x.shape, last, outputs):
            raise WrongShape(
                "linear_backward: grad {} does not fit x {} and weight {}", grad.shape, x.shape, weight.shape
            )
        grad_x, grad_weight = np.empty(x.shape, x.dtype), np.empty((outputs, depth), x.dtype)
        grad_bias = np.empty(outputs, x.dtype)
        rows = x.size // max(depth, 1)
        slopes, values = shaped(contiguous(grad), (rows, outputs)), shaped(contiguous(x), (rows, depth))
        results = shaped(grad_x, (rows, depth)), grad_weight, grad_bias
        call_kernel("njit.gemm.linear_gradients", (slopes, values, contiguous(weight), *results))
        return grad_x, grad_weight, grad_bias

    return implementation
