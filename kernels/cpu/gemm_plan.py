"""Which kernel multiplies matrices of given shapes, and how it is split: worked out once for each of them.

- gemm_vector.py multiplies a vector by a large matrix.
- gemm_in_place.py reads both operands where they lie: small products, and those with few rows.
- gemm_dots.py multiplies rows by rows: a dense layer, a matrix and a vector.
- conv_pointwise.py multiplies few rows by many columns, whose panels the first tile of rows packs on its way. It sums
  in one go where gemm_blocks.py adds up every KC steps: up to there the bits are the same.
- gemm_blocks.py copies blocks into the caches: everything large.
- gemm_parts.py does so for parts of a long sum, where the result is small.
"""

from functools import lru_cache

import numpy as np

from tilewise.kernels.cpu import conv_pointwise, threads
from tilewise.kernels.cpu.gemm_blocks import BLOCK_COLUMNS, BLOCK_ROWS, multiply_blocks
from tilewise.kernels.cpu.gemm_dots import BLOCK, COLUMNS, ROWS, STEP_BYTES, finish, multiply_dots, multiply_stack_dots
from tilewise.kernels.cpu.gemm_in_place import multiply_in_place, multiply_stack_in_place
from tilewise.kernels.cpu.gemm_panels import KC
from tilewise.kernels.cpu.gemm_parts import multiply_parts
from tilewise.kernels.cpu.gemm_vector import COLUMNS as VECTOR_COLUMNS
from tilewise.kernels.cpu.gemm_vector import FEWEST_STEPS, PARTS, STREAMS, multiply_vector
from tilewise.kernels.cpu.simd import MR, NV, VECTOR_BYTES, lane_count

_ONE_START = np.zeros(1, np.int64)
NANOSECONDS_PER_FLOP = 0.01  # a core at 100 GFLOP/s, float32
NANOSECONDS_PER_BYTE = 0.05  # a core reading 20 GB/s

# Bytes of B that may stay in L2 (512 KB in the smallest in use) while the rows of A pass by, unpacked.
IN_CACHE = 256 << 10
# From this many rows and steps on, packing B, which aligns it, pays for itself.
PACKED_ROWS, PACKED_DEPTH = 64, 96
# Rows up to which a large B is read in place, once, and in steps of how many rows.
FEW_ROWS, STEP_ROWS = 16, 16
# Rows (or columns) of one operand up to which dot products beat packing the other. With AVX2 the sums of a tile are
# fewer, and so added up more often, but a result with neither many rows nor many columns uses hardly what is packed.
DOT_ROWS, DOT_COLUMNS, DOT_BOTH = (48, 8, 128) if VECTOR_BYTES == 32 else (96, 8, 0)
# Bytes of one matrix in a stack up to which both are read in place.
IN_STACK = 64 << 10
# Chunks of the result that threads share, if there are that many, and the fewest of one that is worth sharing.
CHUNKS, FEWEST_CHUNKS = 8, 2
# Rows from and up to which, columns from which and steps up to which a wide product is one of a convolution by 1x1
# kernels. Its tiles of 8 rows waste none of 64 or 128, those of 14 every tenth, and B is not copied by itself. With
# AVX2, blocks are faster from 256 steps on.
WIDE_ROWS, WIDE_ROWS_MOST, WIDE_COLUMNS, WIDE_DEPTH = 64, 4096, 2048, 640 if VECTOR_BYTES == 64 else 64
# Bytes of B a chunk that a sum in steps passes by again and again: 2048 pages, which the second table of addresses
# still holds (3072 on Zen 4, 2048 on Ice Lake).
PAGED_BYTES = 8 << 20
# Rows and columns of a result up to which a sum is split into parts, and the fewest steps of a part.
IN_PARTS, PART_DEPTH = 256, 4 * KC


def _work(m, n, depth, itemsize):
    """Nanoseconds, roughly, on one core."""
    flops = 2 * m * n * depth * NANOSECONDS_PER_FLOP * itemsize / 4
    return max(flops, (m * depth + depth * n + m * n) * itemsize * NANOSECONDS_PER_BYTE)


def _chunk(size, unit, most):
    """Equal chunks of whole units, at most `most` (in elements) each."""
    count = -(-size // most)
    return -(-size // (count * unit)) * unit


def _shared(size, unit, most, work):
    """The same, but two chunks where one would do and there is work for two threads.

    They depend on the problem, never on the threads at hand.
    """
    return _chunk(size, unit, min(most, -(-size // FEWEST_CHUNKS)) if work >= threads.SERIAL_BELOW else most)


def plan(*problem):
    # The plan holds the form of its kernels that the threshold gave.
    return _cached_plan(threads.SERIAL_BELOW, *problem)


@lru_cache(maxsize=4096)
def _cached_plan(_, m, n, depth, a_by_rows, b_by_rows, dtype):
    """How to multiply matrices of these shapes, stored by rows or by columns: run(a, b, c, bias, activation).

    a, b: the memory as a C-contiguous matrix, so transposed where it is stored by columns.
    """
    itemsize = dtype.itemsize
    work = _work(m, n, depth, itemsize)
    if a_by_rows and not b_by_rows and by_dots(m, n):
        return _plan_dots(m, n, depth, dtype)
    if b_by_rows and fits_in_place(m, n, depth, a_by_rows, itemsize):
        return _plan_in_place(m, n, depth, a_by_rows, dtype, work)
    if a_by_rows and n <= DOT_COLUMNS:
        turned = _plan_dots(m, n, depth, dtype)
        return lambda a, b, *rest: turned(a, np.ascontiguousarray(b.T), *rest)
    if a_by_rows and b_by_rows and dtype.kind == "f" and is_wide(m, n, depth, itemsize):
        return _plan_wide(m, n, depth, dtype, work)
    return _plan_blocks(m, n, depth, a_by_rows, b_by_rows, work, itemsize)


def fits_in_place(m, n, depth, a_by_rows, itemsize):
    if m > FEW_ROWS and (n * depth * itemsize > IN_CACHE or (m >= PACKED_ROWS and depth >= PACKED_DEPTH)):
        return False
    # Rows of A whole pages apart share the same few places of L1; columns of A touch a page each.
    return m <= ROWS or depth <= 128 or (a_by_rows and depth * itemsize % 4096 != 0)


def by_dots(m, n):
    """Are rows to be multiplied with rows where they lie?"""
    return m <= DOT_ROWS or n <= DOT_COLUMNS or max(m, n) <= DOT_BOTH


def dot_columns(n, depth, step, itemsize):
    """Rows of B a chunk: equal shares, at most a quarter, and not more than PAGED_BYTES where the sum goes in steps."""
    most = -(-n // 4)
    if step < depth:
        most = min(most, PAGED_BYTES // (depth * itemsize) // COLUMNS * COLUMNS)
    return _chunk(n, COLUMNS, max(4 * BLOCK, most))


def dots(m, n, depth, dtype):
    """The kernel of dot products, and its rows and columns a chunk and step of the sum."""
    itemsize, like, no_bias = dtype.itemsize, np.empty((0, 0), dtype), np.empty(0, dtype)
    step = depth if m <= ROWS or n <= DOT_COLUMNS else STEP_BYTES // itemsize
    work = _work(m, n, depth, itemsize)
    rows = m if n > DOT_COLUMNS and m <= DOT_ROWS else _shared(m, ROWS, 64, work)
    columns = _shared(n, COLUMNS, 4 * BLOCK, work) if n <= 4 * BLOCK else dot_columns(n, depth, step, itemsize)
    return multiply_dots.bound(work, like, like, like, no_bias, 0, 0, 0, 0), (rows, columns, max(step, 1))


def _plan_dots(m, n, depth, dtype):
    product, sizes = dots(m, n, depth, dtype)
    return lambda *args: product(*args, *sizes)


def in_place(m, n, depth, a_by_rows, dtype):
    """The kernel that packs nothing, and its last argument."""
    like, work = np.empty((0, 0), dtype), _work(m, n, depth, dtype.itemsize)
    if m == 1 and n * depth * dtype.itemsize > IN_CACHE and depth >= 2 * FEWEST_STEPS:
        part = _chunk(depth, STREAMS, max(FEWEST_STEPS, -(-depth // PARTS)))
        geometry = np.array((n, depth, _chunk(n, lane_count(dtype.itemsize), VECTOR_COLUMNS), part), np.int64)
        return multiply_vector.bound(work, like, like, like, geometry), geometry
    steps = (depth, 1) if a_by_rows else (1, m)
    step = depth if n * depth * dtype.itemsize <= IN_CACHE else STEP_ROWS
    few = m <= FEW_ROWS
    rows = m if few else _shared(m, MR, 8 * MR, work)
    columns = _shared(n, NV * lane_count(dtype.itemsize), 1024, work) if few else n
    geometry = np.array((m, n, depth, *steps, rows, columns, max(step, 1)), np.int64)
    return multiply_in_place.bound(work, like, like, like, geometry), geometry


def _plan_in_place(m, n, depth, a_by_rows, dtype, work):
    product, geometry = in_place(m, n, depth, a_by_rows, dtype)

    def run(a, b, c, bias, activation):
        product(a, b, c, geometry)
        if bias.size > 0 or activation != 0:
            finish(work, c, bias, activation)

    return run


def is_wide(m, n, depth, itemsize):
    """Is it a product for `_plan_wide`, if floats stored by rows, with neither bias nor activation?

    Only with whole vectors of columns: some left over may be dot products there (conv_pointwise.whole_pixels), with
    bits that no other way gives.
    """
    few = WIDE_ROWS <= m <= WIDE_ROWS_MOST and 4 * m <= n and depth <= WIDE_DEPTH
    return few and n >= WIDE_COLUMNS and n % lane_count(itemsize) == 0


def _plan_wide(m, n, depth, dtype, work):
    """C as one image of n pixels, its channels the rows. A bias is one number a column here, a row there: by blocks."""
    geometry, phase = conv_pointwise.plan(1, 1, depth, (1, n), m, (1, 1), dtype.itemsize, 0)
    product, nothing = conv_pointwise.convolve.sized(work), np.empty(0, dtype)
    blocks = _plan_blocks(m, n, depth, True, True, work, dtype.itemsize)

    def run(a, b, c, bias, activation):
        if bias.size > 0 or activation != 0:  # on blocks still in the caches, not on the whole of C in memory
            blocks(a, b, c, bias, activation)
        else:
            product(b.ravel(), a.ravel(), c.ravel(), nothing, nothing, geometry, phase)

    return run


def product_by_blocks(m, n, depth, a_by_rows, b_by_rows, itemsize):
    """As `plan`, but always copying blocks, so that a column's bits do not depend on how many others there are."""
    work = _work(m, n, depth, itemsize)
    return _plan_blocks(m, n, depth, a_by_rows, b_by_rows, work, itemsize, (_ONE_START, _ONE_START))


def _plan_blocks(m, n, depth, a_by_rows, b_by_rows, work, itemsize, starts=None):
    steps_a = (depth, 1) if a_by_rows else (1, m)
    steps_b = (n, 1) if b_by_rows else (1, depth)
    if starts is None and max(m, n) <= IN_PARTS and depth >= 2 * PART_DEPTH:
        part = _chunk(depth, KC, max(PART_DEPTH, -(-depth // CHUNKS)))
        product = multiply_parts.sized(work)
        return lambda a, b, c, *rest: product(a, *steps_a, b, *steps_b, c, m, n, depth, part, *rest)
    matrices = 1 if starts is None else starts[0].size
    rows, columns = _shared_blocks(m, n, NV * lane_count(itemsize), matrices, work)
    kernel_ = multiply_blocks.sized(work)
    a_starts, b_starts = (_ONE_START, _ONE_START) if starts is None else starts

    def run(a, b, c, bias, activation):
        kernel_(a, a_starts, *steps_a, b, b_starts, *steps_b, c, m, n, depth, rows, columns, bias, activation)

    return run


def _tasks(m, n, rows, columns, matrices):
    return -(-m // rows) * -(-n // columns) * matrices


def _blocks(m, n, panel, matrices):
    """Rows and columns of a task's block: as large as the caches allow, as small as CHUNKS tasks demand.

    Columns are halved first: B is packed by one task each then, and panels divide more evenly than tiles (of 256 rows,
    two tasks of whole tiles have 140 and 116).
    """
    rows, columns = _chunk(m, MR, BLOCK_ROWS), _chunk(n, panel, BLOCK_COLUMNS)
    while _tasks(m, n, rows, columns, matrices) < CHUNKS and max(rows - MR, columns) > 256:
        if 2 * columns > rows:
            columns = _chunk(columns, panel, columns // 2)
        else:
            rows = _chunk(rows, MR, rows // 2)
    return rows, columns


def _shared_blocks(m, n, panel, matrices, work):
    """The same, but smaller ones where there is work for two threads. What is too little for them stays whole."""
    rows, columns = _blocks(m, n, panel, matrices)
    if work < threads.SERIAL_BELOW:
        return rows, columns
    while _tasks(m, n, rows, columns, matrices) < CHUNKS and columns >= 4 * panel:
        columns = _chunk(columns, panel, columns // 2)
    if _tasks(m, n, rows, columns, matrices) < FEWEST_CHUNKS:
        rows = _chunk(rows, MR, -(-rows // 2))
    return rows, columns


def plan_stack(*problem):
    return _cached_plan_stack(threads.SERIAL_BELOW, *problem)


@lru_cache(maxsize=64)
def _cached_plan_stack(_, m, n, depth, a_lead, b_lead, lead, a_by_rows, b_by_rows, dtype):
    """As `_cached_plan`, for stacks of matrices with these leading axes."""
    itemsize = dtype.itemsize
    starts = _starts(a_lead, lead, m * depth), _starts(b_lead, lead, depth * n)
    count = starts[0].size
    work = _work(m, n, depth, itemsize) * count
    together = max(1, -(-count // 32))
    if b_by_rows and max(m, n) * depth * itemsize <= IN_STACK:
        steps, product = (depth, 1) if a_by_rows else (1, m), multiply_stack_in_place.sized(work)
        return lambda a, b, c, *_: product(a, starts[0], *steps, b, starts[1], c, m, n, depth, together)
    if a_by_rows and not b_by_rows and by_dots(m, n):
        product = multiply_stack_dots.sized(work)
        return lambda a, b, c, *_: product(a, starts[0], b, starts[1], c, m, n, depth, together)
    return _plan_blocks(m, n, depth, a_by_rows, b_by_rows, work, itemsize, starts)


def _starts(own, lead, size):
    """Where each matrix of the broadcast stack begins."""
    first = (np.arange(int(np.prod(own)), dtype=np.int64) * size).reshape(own)
    return np.ascontiguousarray(np.broadcast_to(first, lead)).reshape(-1)
