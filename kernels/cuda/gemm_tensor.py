"""Matrix products on tensor cores: float16, and float32 rounded to TF32. See tensor_product.py for the product."""

from numba import cuda
from numba.cuda.types import int32, uint32

from tilewise.kernels.cuda.epilogue import activate
from tilewise.kernels.cuda.gemm_tile import batch_offset
from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64, REAL, SUMS, device, kernel
from tilewise.kernels.cuda.memory import (
    at,
    dynamic_shared,
    load_vector,
    narrow,
    register_sums,
    registers,
    store_vector,
    widen,
)
from tilewise.kernels.cuda.tensor_product import (
    LARGE,
    SMALL,
    TensorTile,
    make_deposit,
    make_tensor_product,
    matrix_loader,
)


def _make_put(width: int):
    """The device function that writes `width` sums, 16 bytes of the result: as gemm_tile.put, which writes four."""

    @device
    def put(operands, row, column, values):
        c, partial, bias, _, n, to_sums, has_bias, code, slope, vectors = operands
        if to_sums:
            if vectors:
                for i in range(0, width, 4):
                    store_vector(partial, row + column + i, at(values, i))
            else:
                for i in range(width):
                    if column + i < n:
                        partial[row + column + i] = values[i]
            return
        results = registers(c, width)
        for i in range(width):
            if column + i < n:
                value = values[i] + widen(bias[column + i]) if has_bias else values[i]
                results[i] = narrow(activate(value, code, slope), c)
        if vectors:
            store_vector(c, row + column, results)
        else:
            for i in range(width):
                if column + i < n:
                    c[row + column + i] = results[i]

    return put


def _make_matmul(tile: TensorTile, left_by_k: bool, right_by_k: bool):
    left_loader, right_loader = (
        matrix_loader(tile, size, by_k) for size, by_k in ((tile.rows, left_by_k), (tile.columns, right_by_k))
    )
    product = make_tensor_product(tile, left_loader, right_loader)
    deposit, pitch = make_deposit(tile)
    tile_rows, tile_columns, threads = tile.rows, tile.columns, tile.threads
    last_thread, width, line = threads - 1, tile.width, tile.columns // tile.width
    put = _make_put(width)
    orders = f"{'k' if left_by_k else 'row'} {'k' if right_by_k else 'row'}"

    @kernel(
        threads=threads, blocks=tile.blocks, name=f"matmul tensor {tile.name} {orders}", dtypes=(tile.dtype,),
        least=(8, 0), promises=("HMMA", "LDGSTS", "STG.128"),
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
        left = at(a, batch_offset(z, n0, n1, a0, a1, a2)), m, a_row if left_by_k else a_k
        right = at(b, batch_offset(z, n0, n1, b0, b1, b2)), n, b_column if right_by_k else b_k
        begin = cuda.blockIdx.y * part
        sums = product(left, right, first_row, first_column, begin, min(begin + part, depth))
        partial_matrix = at(partial, (cuda.blockIdx.y * batches + z) * m * n)
        cuda.syncthreads()
        room = dynamic_shared(partial)
        deposit(room, sums)
        cuda.syncthreads()
        operands = at(c, z * m * n), partial_matrix, bias, m, n, to_sums, has_bias, code, slope, vectors
        values = register_sums(room, width)
        # 16 bytes of the result each, a row by neighbouring threads
        for vector in range(cuda.threadIdx.x & last_thread, tile_rows * line, threads):
            row, column = vector // line, vector % line * width
            if first_row + row < m and first_column + column < n:
                for i in range(0, width, 4):
                    load_vector(at(values, i), room, row * pitch + column + i)
                put(operands, (first_row + row) * n, first_column + column, values)

    return matmul


_BOTH = (True, False)
# tile -> {(is A's k contiguous, is B's): kernel}
MATMULS = {
    tile: {(p, q): _make_matmul(tile, p, q) for p in _BOTH for q in _BOTH}
    for width in (8, 4) for tile in (LARGE[width], SMALL[width])
}  # fmt: skip
