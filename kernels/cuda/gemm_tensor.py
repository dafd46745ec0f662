"""Matrix products on tensor cores: float16, and float32 rounded to TF32, summed in float32 (compute capability 8.0).

A block of 8 warps computes 128 x 128 of C, each warp 64 x 32 as 4 x 4 products of 16 x 8. Tiles of both operands come
to shared memory by 16-byte cp.async, zeros where there is nothing, `STAGES` steps ahead of the products:

    stage 0    stage 1    stage 2    stage 3            a step: 32 float16 or 16 float32 of the depth, 64 bytes
    products   arrived    on its way  on its way        one barrier a step: the stage that was multiplied before it
                                                        is the one that is filled after it

A tile keeps the order that the operand has in memory, so that nothing is transposed:

    k contiguous: 128 rows of 64 bytes, 80 apart        rows contiguous: a k's 128 numbers and 8 more
    8 rows begin at 0 80 32 112 64 16 96 48 mod 128     float16: 272 bytes apart, 8 of them 16 apart mod 128
    so that ldmatrix meets each bank once               (float32: 544 apart: words t * 8 + g, each bank once)

float16 fragments are read by ldmatrix, transposing where k is not contiguous; TF32 ones word by word: with
g = lane // 4, t = lane % 4 the words g * 20 + t, or t * 136 + g, are in 32 different banks.
"""

from numba import cuda
from numba.cuda.types import int32, uint32

from tilewise.kernels.cuda.gemm_tile import batch_offset, put, start_row
from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64, REAL, SUMS, device, kernel
from tilewise.kernels.cuda.product import make_lay_out
from tilewise.kernels.cuda.ptx import (
    at,
    commit_copies,
    copy_async,
    dynamic_shared,
    ldmatrix_x4,
    ldmatrix_x4_transposed,
    load_vector,
    mma_f16,
    mma_tf32,
    register_sums,
    to_tf32,
    wait_copies,
    zero,
)

STAGES = 4
SIZE, THREADS = 128, 256
_ACROSS = SIZE + 8  # pitch of a tile whose rows are contiguous
_OUT = SIZE + 4  # pitch of the sums in shared memory, at the end: 128 rows of 528 bytes fit where the stages were


class TensorTile:
    """The tile for numbers of `width` to 16 bytes. rows, columns: as of product.Tile."""

    rows = columns = SIZE

    def __init__(self, width: int):
        self.width, self.depth = width, 4 * width
        self.along = self.depth + width  # pitch of a tile whose k is contiguous

    def stage(self, by_k: bool) -> int:
        """Numbers of an operand's tile in shared memory."""
        return SIZE * self.along if by_k else self.depth * _ACROSS

    def shared_bytes(self, left_by_k: bool, right_by_k: bool) -> int:
        return STAGES * (self.stage(left_by_k) + self.stage(right_by_k)) * 16 // self.width


HALF, SINGLE = TensorTile(8), TensorTile(4)


def _make_copy(tile: TensorTile, by_k: bool):
    """The device function that begins the copies of one operand's tile at k."""
    width, depth = tile.width, tile.depth
    line = (depth if by_k else SIZE) // width  # vectors in a row of the tile
    pitch = tile.along if by_k else _ACROSS
    each = SIZE * depth // width // THREADS

    @device
    def copy(target, source, first, rows, k, end, stride):
        for i in range(each):
            vector = (cuda.threadIdx.x & 1023) + i * THREADS
            outer, inner = vector // line, vector % line * width
            row, mine = (first + outer, k + inner) if by_k else (first + inner, k + outer)
            inside = row < rows and mine < end
            offset = row * stride + mine if by_k else mine * stride + row
            copy_async(16, at(target, outer * pitch + inner), at(source, offset if inside else 0), 16 if inside else 0)

    return copy


def _make_half_loads(left_by_k: bool, right_by_k: bool):
    """Fragments by ldmatrix; see ptx.mma_f16 for which numbers they hold."""
    along = HALF.along

    @device
    def load_left(tile, row, k, lane):
        if left_by_k:
            return ldmatrix_x4(at(tile, (row + lane % 16) * along + k + lane // 16 * 8))
        return ldmatrix_x4_transposed(at(tile, (k + lane // 16 * 8 + lane % 8) * _ACROSS + row + lane // 8 % 2 * 8))

    @device
    def load_right(tile, column, k, lane):
        if right_by_k:
            return ldmatrix_x4(at(tile, (column + lane // 16 * 8 + lane % 8) * along + k + lane // 8 % 2 * 8))
        return ldmatrix_x4_transposed(at(tile, (k + lane % 16) * _ACROSS + column + lane // 16 * 8))

    return load_left, load_right


def _make_single_loads(left_by_k: bool, right_by_k: bool):
    """Fragments word by word, rounded to TF32; see ptx.mma_tf32."""
    along = SINGLE.along
    left_row, left_k = (along, 1) if left_by_k else (1, _ACROSS)
    right_row, right_k = (along, 1) if right_by_k else (1, _ACROSS)

    @device
    def load_left(tile, row, k, lane):
        first = (row + lane // 4) * left_row + (k + lane % 4) * left_k
        return (
            to_tf32(tile[first]), to_tf32(tile[first + 8 * left_row]),
            to_tf32(tile[first + 4 * left_k]), to_tf32(tile[first + 8 * left_row + 4 * left_k]),
        )  # fmt: skip

    @device
    def load_right(tile, column, k, lane):
        first = (column + lane // 4) * right_row + (k + lane % 4) * right_k
        return (
            to_tf32(tile[first]), to_tf32(tile[first + 4 * right_k]),
            to_tf32(tile[first + 8 * right_row]), to_tf32(tile[first + 8 * right_row + 4 * right_k]),
        )  # fmt: skip

    return load_left, load_right


def _make_multiply(tile: TensorTile, mma, loads):
    """The device function that adds a step's products to the sums: 16 of them for every half of the step."""
    load_left, load_right = loads
    depth = 2 * tile.width

    @device
    def accumulate(sums, first, left, right):
        d = mma(left, right, (sums[first], sums[first + 1], sums[first + 2], sums[first + 3]))
        sums[first], sums[first + 1], sums[first + 2], sums[first + 3] = d[0], d[1], d[2], d[3]

    @device
    def multiply(sums, left, right, row, column, lane):
        for half in range(2):
            k = half * depth
            b = load_right(right, column, k, lane)
            c = load_right(right, column + 16, k, lane)
            for i in range(4):
                a = load_left(left, row + i * 16, k, lane)
                accumulate(sums, i * 16, a, (b[0], b[1]))
                accumulate(sums, i * 16 + 4, a, (b[2], b[3]))
                accumulate(sums, i * 16 + 8, a, (c[0], c[1]))
                accumulate(sums, i * 16 + 12, a, (c[2], c[3]))

    return multiply


# a lane's 64 sums of its warp's 64 x 32, four of each product of 16 x 8
_lay_out = make_lay_out([
    (i * 16 + e // 2 * 8) * _OUT + j * 8 + e % 2 for i in range(4) for j in range(4) for e in range(4)
])  # fmt: skip


@device
def _store(room, operands, first_row, first_column):
    """The block's sums from shared memory to the result, four by four, a row by 32 neighbouring threads."""
    values = register_sums(room, 4)
    thread = cuda.threadIdx.x & 1023
    for vector in range(thread, SIZE * SIZE // 4, THREADS):
        row, column = vector // 32, vector % 32 * 4
        load_vector(values, room, row * _OUT + column)
        put(operands, start_row(operands, first_row + row), first_column + column, values)


def _make_matmul(tile: TensorTile, name: str, mma, make_loads, left_by_k: bool, right_by_k: bool):
    copy_left, copy_right = _make_copy(tile, left_by_k), _make_copy(tile, right_by_k)
    multiply = _make_multiply(tile, mma, make_loads(left_by_k, right_by_k))
    left_stage, right_stage, step = tile.stage(left_by_k), tile.stage(right_by_k), tile.depth
    ahead = STAGES - 1
    in_flight = STAGES - 2
    orders = f"{'k' if left_by_k else 'row'} {'k' if right_by_k else 'row'}"

    @kernel(threads=THREADS, blocks=2, name=f"matmul tensor {name} {orders}")
    def matmul(
        a: ELEMENTS, b: ELEMENTS, c: ELEMENTS, partial: SUMS, bias: ELEMENTS,
        m: INT64, n: INT64, depth: INT64, part: INT64, batches: INT64,
        a_row: INT64, a_k: INT64, b_k: INT64, b_column: INT64,
        n0: INT64, n1: INT64, a0: INT64, a1: INT64, a2: INT64, b0: INT64, b1: INT64, b2: INT64,
        to_sums: INT32, has_bias: INT32, code: INT32, vectors: INT32, slope: REAL,
    ):  # fmt: skip
        z = cuda.blockIdx.z
        row_tiles = uint32((m + 127) // 128)
        column_tile = int32(uint32(cuda.blockIdx.x) // row_tiles)
        first_row = (cuda.blockIdx.x - column_tile * int32(row_tiles)) * SIZE
        first_column = column_tile * SIZE
        left = at(a, batch_offset(z, n0, n1, a0, a1, a2))
        right = at(b, batch_offset(z, n0, n1, b0, b1, b2))
        left_stride, right_stride = a_row if left_by_k else a_k, b_column if right_by_k else b_k
        left_tiles = dynamic_shared(a)
        right_tiles = at(left_tiles, STAGES * left_stage)
        begin = cuda.blockIdx.y * part
        end = min(begin + part, depth)
        sums = register_sums(a, 64)
        for i in range(64):
            sums[i] = zero(a)
        thread = cuda.threadIdx.x & 1023
        lane, warp = thread % 32, thread // 32
        row, column = warp % 2 * 64, warp // 2 * 32
        for s in range(ahead):
            k = begin + s * step
            if k < end:
                copy_left(at(left_tiles, s * left_stage), left, first_row, m, k, end, left_stride)
                copy_right(at(right_tiles, s * right_stage), right, first_column, n, k, end, right_stride)
            commit_copies()
        stage = 0
        for k in range(begin, end, step):
            wait_copies(in_flight)
            cuda.syncthreads()  # this stage has arrived for all, and the one before it is free
            further, free = k + ahead * step, (stage + ahead) % STAGES
            if further < end:
                copy_left(at(left_tiles, free * left_stage), left, first_row, m, further, end, left_stride)
                copy_right(at(right_tiles, free * right_stage), right, first_column, n, further, end, right_stride)
            commit_copies()
            multiply(sums, at(left_tiles, stage * left_stage), at(right_tiles, stage * right_stage), row, column, lane)
            stage = (stage + 1) % STAGES
        wait_copies(0)
        partial_matrix = at(partial, (cuda.blockIdx.y * batches + z) * m * n)
        cuda.syncthreads()
        room = dynamic_shared(partial)
        _lay_out(at(room, (row + lane // 4) * _OUT + column + lane % 4 * 2), sums)
        cuda.syncthreads()
        operands = at(c, z * m * n), partial_matrix, bias, m, n, to_sums, has_bias, code, slope, vectors
        _store(room, operands, first_row, first_column)

    return matmul


def _orders(tile: TensorTile, name: str, mma, make_loads) -> dict:
    """(is A's k contiguous, is B's) -> kernel."""
    both = (True, False)
    return {(p, q): _make_matmul(tile, name, mma, make_loads, p, q) for p in both for q in both}


FLOAT16 = _orders(HALF, "f16", mma_f16, _make_half_loads)
TF32 = _orders(SINGLE, "tf32", mma_tf32, _make_single_loads)
