"""The product on tensor cores (compute capability 8.0): float16, and float32 rounded to TF32, summed in float32.

A block computes rows x columns of C; each warp has 32 columns, and 64 or 32 rows, as products of 16 x 8. Tiles of both
operands come to shared memory by 16-byte cp.async, zeros where there is nothing, `STAGES` steps ahead of the products:

    stage 0    stage 1    stage 2    stage 3            a step: 32 float16 or 16 float32 of the depth, 64 bytes
    products   arrived    on its way  on its way        one barrier a step: the stage that was multiplied before it
                                                        is the one that is filled after it

A tile keeps the order that the operand has in memory, so that nothing is transposed:

    k contiguous: rows of 64 bytes, 80 apart            rows contiguous: a k's numbers and 8 more
    8 rows begin at 0 80 32 112 64 16 96 48 mod 128     float16: 272 or 144 bytes apart, 8 of them 16 apart mod 128
    so that ldmatrix meets each bank once               (float32: words t * 8 + g, each bank once)

float16 fragments are read by ldmatrix, transposing where k is not contiguous; TF32 ones word by word: with
g = lane // 4, t = lane % 4 the words g * 20 + t, or t * 136 + g, are in 32 different banks.

What the operands are, the core does not know. A `TensorLoader` brings them, two device functions for one side:

    place = start(operands, first, begin, thread)       once: where the thread's numbers are; any tuple
    place = copy(target, operands, place, k, end)       begins the copies of the step at k; called in the steps' order

`operands` is a tuple whose first member is the pointer to the elements. For the right operand "row" means column.
"""

from collections.abc import Callable
from dataclasses import dataclass

from numba import cuda

from tilewise.kernels.cuda.launch import device
from tilewise.kernels.cuda.memory import at, dynamic_shared, register_sums, zero
from tilewise.kernels.cuda.product import make_lay_out
from tilewise.kernels.cuda.ptx import (
    commit_copies,
    copy_async,
    ldmatrix_x4,
    ldmatrix_x4_transposed,
    mma_f16,
    mma_tf32,
    to_tf32,
    wait_copies,
)

STAGES = 4
GAP = 8  # numbers between the ends of a k's rows, or columns, and the next k's
_OUT_GAP = 4  # the same for the sums, which lie in float32 where the stages were
_WARP_COLUMNS = 32


@dataclass(frozen=True, slots=True)
class TensorTile:
    """width: numbers of 16 bytes, 8 (float16) or 4 (TF32). warps: rows x columns of them; high: products of 16 rows in
    a warp. blocks: so many shall fit a multiprocessor."""

    width: int
    warps: tuple[int, int]
    high: int
    blocks: int

    @property
    def rows(self) -> int:
        return self.warps[0] * self.high * 16

    @property
    def columns(self) -> int:
        return self.warps[1] * _WARP_COLUMNS

    @property
    def threads(self) -> int:
        return 32 * self.warps[0] * self.warps[1]

    @property
    def depth(self) -> int:
        """Of a step."""
        return 4 * self.width

    @property
    def along(self) -> int:
        """Pitch of a tile whose k is contiguous."""
        return self.depth + self.width

    @property
    def name(self) -> str:
        return f"{'f16' if self.width == 8 else 'tf32'} {self.rows}x{self.columns}"

    @property
    def dtype(self) -> str:
        return "float16" if self.width == 8 else "float32"

    def stage(self, size: int, by_k: bool) -> int:
        """Numbers of an operand's tile in shared memory."""
        return size * self.along if by_k else self.depth * (size + GAP)

    def shared_bytes(self, left_by_k: bool, right_by_k: bool) -> int:
        """Of dynamic shared memory: the stages; the sums lie in the same place."""
        numbers = self.stage(self.rows, left_by_k) + self.stage(self.columns, right_by_k)
        short, long = sorted((self.rows, self.columns))
        return max(STAGES * numbers * 16 // self.width, 4 * long * (short + _OUT_GAP), 4 * short * (long + _OUT_GAP))


# The large one reads each operand least often; the narrow one is for 64 columns; the small one makes more blocks.
LARGE, NARROW, SMALL = (
    {w: TensorTile(w, *t) for w in (8, 4)} for t in (((2, 4), 4, 2), ((2, 2), 4, 3), ((2, 2), 2, 4))
)


@dataclass(frozen=True, slots=True)
class TensorLoader:
    """start, copy: see the module. by_k: whether k is contiguous in the tile."""

    start: Callable
    copy: Callable
    by_k: bool


def matrix_loader(tile: TensorTile, size: int, by_k: bool) -> TensorLoader:
    """A matrix: operands (pointer, rows, stride of what is not contiguous)."""
    width, depth, threads = tile.width, tile.depth, tile.threads
    line = (depth if by_k else size) // width  # vectors in a row of the tile
    pitch = tile.along if by_k else size + GAP
    each = size * depth // width // threads

    @device
    def start(operands, first, begin, thread):
        return thread, first

    @device
    def copy(target, operands, place, k, end):
        source, rows, stride = operands
        thread, first = place
        for i in range(each):
            vector = thread + i * threads
            outer, inner = vector // line, vector % line * width
            row, mine = (first + outer, k + inner) if by_k else (first + inner, k + outer)
            inside = row < rows and mine < end
            offset = row * stride + mine if by_k else mine * stride + row
            copy_async(16, at(target, outer * pitch + inner), at(source, offset if inside else 0), 16 if inside else 0)
        return place

    return TensorLoader(start, copy, by_k)


def _make_half_loads(tile: TensorTile, left_by_k: bool, right_by_k: bool):
    """Fragments by ldmatrix; see ptx.mma_f16 for which numbers they hold."""
    along, left_pitch, right_pitch = tile.along, tile.rows + GAP, tile.columns + GAP

    @device
    def load_left(numbers, row, k, lane):
        if left_by_k:
            return ldmatrix_x4(at(numbers, (row + lane % 16) * along + k + lane // 16 * 8))
        return ldmatrix_x4_transposed(
            at(numbers, (k + lane // 16 * 8 + lane % 8) * left_pitch + row + lane // 8 % 2 * 8)
        )

    @device
    def load_right(numbers, column, k, lane):
        if right_by_k:
            return ldmatrix_x4(at(numbers, (column + lane // 16 * 8 + lane % 8) * along + k + lane // 8 % 2 * 8))
        return ldmatrix_x4_transposed(at(numbers, (k + lane % 16) * right_pitch + column + lane // 16 * 8))

    return load_left, load_right


def _make_single_loads(tile: TensorTile, left_by_k: bool, right_by_k: bool):
    """Fragments word by word, rounded to TF32; see ptx.mma_tf32."""
    left_row, left_k = (tile.along, 1) if left_by_k else (1, tile.rows + GAP)
    right_row, right_k = (tile.along, 1) if right_by_k else (1, tile.columns + GAP)

    @device
    def load_left(numbers, row, k, lane):
        first = (row + lane // 4) * left_row + (k + lane % 4) * left_k
        return (
            to_tf32(numbers[first]), to_tf32(numbers[first + 8 * left_row]),
            to_tf32(numbers[first + 4 * left_k]), to_tf32(numbers[first + 8 * left_row + 4 * left_k]),
        )  # fmt: skip

    @device
    def load_right(numbers, column, k, lane):
        first = (column + lane // 4) * right_row + (k + lane % 4) * right_k
        return (
            to_tf32(numbers[first]), to_tf32(numbers[first + 4 * right_k]),
            to_tf32(numbers[first + 8 * right_row]), to_tf32(numbers[first + 8 * right_row + 4 * right_k]),
        )  # fmt: skip

    return load_left, load_right


def _make_multiply(tile: TensorTile, left_by_k: bool, right_by_k: bool):
    """The device function that adds a step's products to the sums: 4 x high of them for each half of the step."""
    make_loads, mma = (_make_half_loads, mma_f16) if tile.width == 8 else (_make_single_loads, mma_tf32)
    load_left, load_right = make_loads(tile, left_by_k, right_by_k)
    depth, high = 2 * tile.width, tile.high

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
            for i in range(high):
                a = load_left(left, row + i * 16, k, lane)
                accumulate(sums, i * 16, a, (b[0], b[1]))
                accumulate(sums, i * 16 + 4, a, (b[2], b[3]))
                accumulate(sums, i * 16 + 8, a, (c[0], c[1]))
                accumulate(sums, i * 16 + 12, a, (c[2], c[3]))

    return multiply


def make_tensor_product(tile: TensorTile, left: TensorLoader, right: TensorLoader) -> Callable:
    """The device function (left operands, right operands, first row, first column, begin, end) -> sums.

    It sums over begin <= k < end. All threads of the block must call it; afterwards nobody reads shared memory any more
    once they have met at a barrier. For the order of the sums see make_deposit.
    """
    start_left, copy_left, start_right, copy_right = left.start, left.copy, right.start, right.copy
    left_stage, right_stage = tile.stage(tile.rows, left.by_k), tile.stage(tile.columns, right.by_k)
    step, count, last_thread = tile.depth, 16 * tile.high, tile.threads - 1
    warp_rows, high = tile.warps[0], 16 * tile.high
    ahead, in_flight = STAGES - 1, STAGES - 2
    all_left = STAGES * left_stage
    multiply = _make_multiply(tile, left.by_k, right.by_k)

    @device
    def product(left_operands, right_operands, first_row, first_column, begin, end):
        left_tiles = dynamic_shared(left_operands[0])
        right_tiles = at(left_tiles, all_left)
        sums = register_sums(left_operands[0], count)
        for i in range(count):
            sums[i] = zero(left_operands[0])
        thread = cuda.threadIdx.x & last_thread
        lane, warp = thread % 32, thread // 32
        row, column = warp % warp_rows * high, warp // warp_rows * 32
        left_place = start_left(left_operands, first_row, begin, thread)
        right_place = start_right(right_operands, first_column, begin, thread)
        for s in range(ahead):
            k = begin + s * step
            if k < end:
                left_place = copy_left(at(left_tiles, s * left_stage), left_operands, left_place, k, end)
                right_place = copy_right(at(right_tiles, s * right_stage), right_operands, right_place, k, end)
            commit_copies()
        stage = 0
        for k in range(begin, end, step):
            wait_copies(in_flight)
            cuda.syncthreads()  # this stage has arrived for all, and the one before it is free
            further, free = k + ahead * step, (stage + ahead) % STAGES
            if further < end:
                left_place = copy_left(at(left_tiles, free * left_stage), left_operands, left_place, further, end)
                right_place = copy_right(at(right_tiles, free * right_stage), right_operands, right_place, further, end)
            commit_copies()
            multiply(sums, at(left_tiles, stage * left_stage), at(right_tiles, stage * right_stage), row, column, lane)
            stage = (stage + 1) % STAGES
        return sums  # what is still to be waited for is empty groups

    return product


def make_deposit(tile: TensorTile, by_columns: bool = False) -> tuple[Callable, int]:
    """(the device function (room, sums) that lays the block's sums out as a matrix in shared memory, its pitch).

    by_columns: each column's rows side by side, instead of each row's columns. All threads must have met at a barrier
    before, and must do so after it.
    """
    high, warp_rows, last_thread = tile.high, tile.warps[0], tile.threads - 1
    pitch = (tile.rows if by_columns else tile.columns) + _OUT_GAP
    row_step, column_step = (1, pitch) if by_columns else (pitch, 1)
    # a lane's sums, four of each product of 16 x 8
    lay_out = make_lay_out([
        (i * 16 + e // 2 * 8) * row_step + (j * 8 + e % 2) * column_step
        for i in range(high) for j in range(4) for e in range(4)
    ])  # fmt: skip
    warp_high = 16 * high

    @device
    def deposit(room, sums):
        thread = cuda.threadIdx.x & last_thread
        lane, warp = thread % 32, thread // 32
        row, column = warp % warp_rows * warp_high + lane // 4, warp // warp_rows * 32 + lane % 4 * 2
        lay_out(at(room, row * row_step + column * column_step), sums)

    return deposit, pitch
