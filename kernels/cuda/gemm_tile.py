"""Matrix products by tiles on the GPU: one kernel for each tile, way of loading and, for the largest, order of memory.

    C[z] = activation(A[z] B[z] + bias)        A: m x depth, B: depth x n, any of them with rows or columns contiguous

The grid: x counts tiles, rows first, so that blocks at work together share columns of B; y counts parts of the depth,
each of which goes to its own matrix of partial sums, added in order by `add_parts`; z counts the batch.
"""

from numba import cuda
from numba.cuda.types import int32, int64, uint32

from tilewise.kernels.cuda.epilogue import activate
from tilewise.kernels.cuda.launch import ELEMENTS, FLOATS, INT32, INT64, OLDEST, REAL, SUMS, device, kernel
from tilewise.kernels.cuda.launch import INTEGERS as INTEGER_DTYPES
from tilewise.kernels.cuda.memory import at, lanes, narrow, registers, store_vector, widen
from tilewise.kernels.cuda.product import Tile, make_product, make_tile_store
from tilewise.kernels.cuda.product_loaders import copying_loader, strided_loader, vector_loader

# 8 x 8 sums a thread need 16 loads of 4 numbers for 256 products: 64 products to 4 instructions that load, for each k.
BIG = Tile((4, 2), (8, 8), 16, 2)  # 128 x 128, 256 threads of 128 registers: two blocks fill a multiprocessor
TALL = Tile((4, 1), (8, 8), 16, 3)  # 128 x 64, 128 threads
SMALL = Tile((2, 2), (8, 4), 16, 3)  # 64 x 64, 128 threads; float64 fits
TINY = Tile((2, 1), (4, 4), 32, 6)  # 32 x 32, 64 threads: few rows or columns, bound by memory


@device
def batch_offset(z, n0, n1, s0, s1, s2):
    """Where matrix z of a batch of n2 x n1 x n0 begins, with strides s: 0 where it is broadcast."""
    if n0 * n1 == 1:
        return z * s2
    inner = int64(uint32(z) % uint32(n0 * n1))
    outer = int64(uint32(z) // uint32(n0 * n1))
    return int64(uint32(inner) % uint32(n0)) * s0 + int64(uint32(inner) // uint32(n0)) * s1 + outer * s2


@device
def start_row(operands, row):
    return row * operands[4], row < operands[3]


@device
def put(operands, place, column, values):
    """Writes four sums: to the partial sums, or with bias and activation to the result."""
    c, partial, bias, _, n, to_sums, has_bias, code, slope, vectors = operands
    row, inside = place
    if not inside:
        return
    if to_sums:
        if vectors and column < n:
            for i in range(0, 4, lanes(partial)):
                store_vector(partial, row + column + i, at(values, i))
        else:
            for i in range(4):
                if column + i < n:
                    partial[row + column + i] = values[i]
        return
    results = registers(c, 16)
    for i in range(4):
        if column + i < n:
            value = values[i] + widen(bias[column + i]) if has_bias else values[i]
            results[i] = narrow(activate(value, code, slope), c)
    if vectors and column < n:
        for i in range(0, 4, lanes(c)):
            store_vector(c, row + column + i, at(results, i))
    else:
        for i in range(4):
            if column + i < n:
                c[row + column + i] = results[i]


@device
def put_integers(operands, place, column, values):
    """The same without bias and activation, which are for floats."""
    c, partial, _, _, n, to_sums, _, _, _, _ = operands
    if place[1]:
        for i in range(4):
            if column + i < n:
                if to_sums:
                    partial[place[0] + column + i] = values[i]
                else:
                    c[place[0] + column + i] = narrow(values[i], c)


def _make_matmul(tile: Tile, left, right, name: str, put_sums, blocks_on=None, dtypes=FLOATS):
    copies = ("LDGSTS",) if left.asynchronous or right.asynchronous else ()
    product = make_product(tile, left, right)
    store = make_tile_store(tile, start_row, put_sums)
    tile_rows, tile_columns = tile.rows, tile.columns

    @kernel(
        threads=tile.threads, blocks=tile.blocks, blocks_on=blocks_on, name=f"matmul {tile.name} {name}",
        dtypes=dtypes, least=(8, 0) if copies else OLDEST,
        promises={"float32": ("FFMA", "LDS.128", *copies), "float64": ("DFMA", "LDS.128")},
    )  # fmt: skip
    def matmul(
        a: ELEMENTS, b: ELEMENTS, c: ELEMENTS, partial: SUMS, bias: ELEMENTS,
        m: INT64, n: INT64, depth: INT64, part: INT64, batches: INT64,
        a_row: INT64, a_k: INT64, b_k: INT64, b_column: INT64,
        n0: INT64, n1: INT64, a0: INT64, a1: INT64, a2: INT64, b0: INT64, b1: INT64, b2: INT64,
        to_sums: INT32, has_bias: INT32, code: INT32, vectors: INT32, slope: REAL,
    ):  # fmt: skip
        z = cuda.blockIdx.z
        row_tiles = uint32((m + tile_rows - 1) // tile_rows)
        column_tile = int32(uint32(cuda.blockIdx.x) // row_tiles)
        first_row = (cuda.blockIdx.x - column_tile * int32(row_tiles)) * tile_rows
        first_column = column_tile * tile_columns
        left_operands = (at(a, batch_offset(z, n0, n1, a0, a1, a2)), m, a_row, a_k)
        right_operands = (at(b, batch_offset(z, n0, n1, b0, b1, b2)), n, b_column, b_k)
        begin = cuda.blockIdx.y * part
        sums, room = product(left_operands, right_operands, first_row, first_column, begin, min(begin + part, depth))
        c_matrix = at(c, z * m * n)
        partial_matrix = at(partial, (cuda.blockIdx.y * batches + z) * m * n)
        operands = c_matrix, partial_matrix, bias, m, n, to_sums, has_bias, code, slope, vectors
        store(sums, room, operands, first_row, first_column)

    return matmul


def _both(tile: Tile, loader) -> tuple:
    return loader(tile, tile.rows), loader(tile, tile.columns)


def _copies_or_not(size: int, by_k: bool):
    return vector_loader(BIG, size, by_k) if by_k else copying_loader(BIG, size)


_ORDER = {True: "k", False: "row"}
SINGLE = ("float32",)  # float16 has tensor cores, and float64 too many registers for large tiles
# (tile, vectors) -> kernel; of the largest tile one for each (A, B) of whether k is contiguous, which saves registers
VECTORS = {
    TALL: _make_matmul(  # on 12.0 the registers for three blocks would spill
        TALL, *_both(TALL, vector_loader), "vectors", put, blocks_on={(7, 5): 2, (12, 0): 2}, dtypes=SINGLE
    ),
    SMALL: _make_matmul(SMALL, *_both(SMALL, vector_loader), "vectors", put),
    TINY: _make_matmul(TINY, *_both(TINY, vector_loader), "vectors", put),
}
BIG_VECTORS = {
    (left, right): _make_matmul(
        BIG, vector_loader(BIG, BIG.rows, left), vector_loader(BIG, BIG.columns, right),
        f"vectors {_ORDER[left]} {_ORDER[right]}", put, blocks_on={(7, 5): 1, (8, 0): 1}, dtypes=SINGLE,
    )
    for left in (True, False) for right in (True, False)
}  # fmt: skip
# The same where a matrix whose rows lie side by side comes by cp.async
BIG_COPIES = {
    (left, right): _make_matmul(
        BIG, _copies_or_not(BIG.rows, left), _copies_or_not(BIG.columns, right),
        f"copies {_ORDER[left]} {_ORDER[right]}", put, dtypes=SINGLE,
    )
    for left, right in ((True, False), (False, True), (False, False))
}  # fmt: skip
STRIDED = {
    SMALL: _make_matmul(SMALL, *_both(SMALL, strided_loader), "strided", put, dtypes=("float16", "float32")),
    TINY: _make_matmul(TINY, *_both(TINY, strided_loader), "strided", put),
}
INTEGERS = _make_matmul(  # as TALL, in 64 bits
    SMALL, *_both(SMALL, strided_loader), "integers", put_integers, blocks_on={(12, 0): 2}, dtypes=INTEGER_DTYPES
)

_THREADS = 256


@kernel(threads=_THREADS)
def add_parts(
    partial: SUMS, c: ELEMENTS, bias: ELEMENTS, count: INT64, n: INT64, parts: INT64,
    has_bias: INT32, code: INT32, slope: REAL,
):  # fmt: skip
    """c[i] = activation(sum over p of partial[p, i] + bias[i % n]), in the order of the parts."""
    i = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
    if i < count:
        total = partial[i]
        for p in range(1, parts):
            total += partial[p * count + i]
        if has_bias:
            total += widen(bias[i % n])
        c[i] = narrow(activate(total, code, slope), c)


@kernel(threads=_THREADS, dtypes=INTEGER_DTYPES)
def add_integer_parts(partial: SUMS, c: ELEMENTS, total: SUMS, count: INT64, parts: INT64, to_sums: INT32):
    """The same for integers: into `total`, or narrowed into c."""
    i = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
    if i < count:
        value = partial[i]
        for p in range(1, parts):
            value += partial[p * count + i]
        if to_sums:
            total[i] = value
        else:
            c[i] = narrow(value, c)
