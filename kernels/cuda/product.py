"""The product at the heart of matmul and convolution: one block's tile of C = A B, summed in registers.

A block owns `rows` x `columns` of C. It walks along k in steps of `depth`; at each step both operands' tiles lie in
shared memory, k by k, so that the numbers a thread needs for one k are 16-byte vectors. There are two such buffers:
while one is multiplied, the next step's numbers are on their way to the other: through registers, or by cp.async.

                       columns (right operand's tile, depth x columns)        C's tile, shared out
                  k  +---------------------------------------------+          +----+----+----+----+
                     +---------------------------------------------+          | w0 | w1 |    a warp: lanes 4 x 8,
       rows, k       |                                             |          +----+----+
      +---+---+      | +---- 4 ----+  ...  +---- 4 ----+           |          | w2 | w3 |    each with 4 x 4 blocks
      |   |   |      | | 4 x 4 of  |       | the same  |           |          +----+----+    of its tile, so that
      | k fastest    | | a thread  |       | thread's  |           |          | ..      |    neighbouring lanes read
      |   |   |      | +-----------+       +-----------+           |                         neighbouring vectors
      +---+---+

What the operands are, the core does not know: a `Loader` brings them, three device functions for one side.

    place = start(operands, first, thread)              once: where the thread's elements are; any tuple
    fetch(tile, kept, operands, place, k, end)          sends for the thread's elements of the step at k: into `kept`
                                                        registers, or to shared memory where the loader is asynchronous
    keep(tile, kept, operands, place)                   writes registers to shared memory

In shared memory (k, row) is at k * (size + PAD) + row. `operands` is a tuple whose first member is the pointer to the
elements; the others are the loader's affair. For the right operand "row" means column: both sides are loaded alike.
Elements beyond the operand are 0; so is every k >= end.

product_loaders.py has those for plain matrices, in either order of memory; convolutions have their own.

What an asynchronous loader saves, in the loop over k of the 128 x 128 tile of float32 (`make gpu-compile`, nvdisasm):

                                                              sm_80                      sm_90
    both operands through registers                  151 registers, one block    128 registers, 1268 instructions
    the right one by cp.async                        128 registers, two blocks   128 registers, 1242 instructions
    both (where neither has its k contiguous)        126 registers, two blocks   127 registers, 1190 instructions

of which 1024 are FFMA and 64 LDS.128 each time; none spills.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product as product_of

from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.types import int32

from tilewise.kernels.cuda.launch import device
from tilewise.kernels.cuda.memory import (
    VECTOR_BYTES,
    at,
    lanes,
    load_vector,
    register_sums,
    registers,
    shared_sums,
    zero,
)
from tilewise.kernels.cuda.ptx import commit_copies, wait_copies

# A tile's rows in shared memory are apart by this more than their length: a thread that stores one row's neighbouring
# k then meets another in a bank at most once, and rows stay aligned to 16 bytes.
PAD = 4
_INT = ir.IntType(32)
_THREADS = 1023  # a thread's number has these bits
_BLOCK = 4  # a thread's rows and columns come in blocks of so many


@dataclass(frozen=True, slots=True)
class Tile:
    """warps, lanes, each: rows x columns of warps in a block, of lanes in a warp, of sums in a thread."""

    warps: tuple[int, int]
    each: tuple[int, int]
    depth: int
    blocks: int  # so many shall fit a multiprocessor: the limit of a thread's registers
    lanes: tuple[int, int] = (4, 8)

    @property
    def rows(self) -> int:
        return self.warps[0] * self.lanes[0] * self.each[0]

    @property
    def columns(self) -> int:
        return self.warps[1] * self.lanes[1] * self.each[1]

    @property
    def threads(self) -> int:
        return 32 * self.warps[0] * self.warps[1]

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth}"


@dataclass(frozen=True, slots=True)
class Loader:
    """start, fetch, keep: see the module. count: elements that a thread has in registers at a step."""

    start: Callable
    fetch: Callable
    keep: Callable
    count: int
    asynchronous: bool = False


# ---- the loop over k


@device
def commit():
    commit_copies()


@device
def wait():
    wait_copies(0)


@device
def nothing():
    """In their place where no loader is asynchronous: compute capability 7.5 has no such copies."""


def make_product(tile: Tile, left: Loader, right: Loader) -> Callable:
    """The device function (left operands, right operands, first row, first column, begin, end) -> (sums, room).

    It sums over begin <= k < end. All threads of the block must call it. The sums lie in `register_sums`, row by row of
    the thread's `each`; room is shared memory that nobody reads any more, for make_tile_store.
    """
    start_left, fetch_left, keep_left, left_count = left.start, left.fetch, left.keep, left.count
    start_right, fetch_right, keep_right, right_count = right.start, right.fetch, right.keep, right.count
    step, each_rows, each_columns = tile.depth, *tile.each
    count = each_rows * each_columns
    left_stage, right_stage = step * (tile.rows + PAD), step * (tile.columns + PAD)
    left_room, right_room = 2 * left_stage, 2 * right_stage
    first_element = make_first_element(tile)
    multiply = make_multiply(tile)
    begun, arrived = (commit, wait) if left.asynchronous or right.asynchronous else (nothing, nothing)

    @device
    def product(left_operands, right_operands, first_row, first_column, begin, end):
        thread = cuda.threadIdx.x & _THREADS  # not negative, as the compiler now knows: divisions become shifts
        left_tiles = shared_sums(left_operands[0], left_room)
        right_tiles = shared_sums(right_operands[0], right_room)
        left_kept = registers(left_operands[0], left_count)
        right_kept = registers(right_operands[0], right_count)
        sums = register_sums(left_operands[0], count)
        for i in range(count):
            sums[i] = zero(left_operands[0])
        my_row, my_column = first_element(thread)
        left_place = start_left(left_operands, first_row, thread)
        right_place = start_right(right_operands, first_column, thread)
        if begin < end:
            fetch_left(left_tiles, left_kept, left_operands, left_place, begin, end)
            fetch_right(right_tiles, right_kept, right_operands, right_place, begin, end)
            begun()
            keep_left(left_tiles, left_kept, left_operands, left_place)
            keep_right(right_tiles, right_kept, right_operands, right_place)
            arrived()
            cuda.syncthreads()
        stage = 0
        for k in range(begin, end, step):
            further, other = k + step < end, 1 - stage
            left_target, right_target = at(left_tiles, other * left_stage), at(right_tiles, other * right_stage)
            if further:  # nobody reads the other buffers any more: all have passed the last barrier
                fetch_left(left_target, left_kept, left_operands, left_place, k + step, end)
                fetch_right(right_target, right_kept, right_operands, right_place, k + step, end)
                begun()
            multiply(
                sums, at(left_tiles, stage * left_stage + my_row), at(right_tiles, stage * right_stage + my_column)
            )
            if further:
                keep_left(left_target, left_kept, left_operands, left_place)
                keep_right(right_target, right_kept, right_operands, right_place)
                arrived()
            stage = other
            cuda.syncthreads()
        return sums, left_tiles

    return product


def make_first_element(tile: Tile) -> Callable:
    """The device function thread -> the row and column, within the tile, of the first of its sums."""
    warp_columns, (lane_rows, lane_columns) = tile.warps[1], tile.lanes
    warp_height, warp_width = lane_rows * tile.each[0], lane_columns * tile.each[1]

    @device
    def first_element(thread):
        warp, lane = thread // 32, thread % 32
        row = warp // warp_columns * warp_height + lane // lane_columns * _BLOCK
        column = warp % warp_columns * warp_width + lane % lane_columns * _BLOCK
        return int32(row), int32(column)

    return first_element


def make_multiply(tile: Tile) -> Callable:
    """The intrinsic (sums, left, right) that adds a step's products, from the thread's places in both tiles.

        for k in range(depth):
            a, b = each[0] numbers of left's row k, each[1] of right's, in vectors of 16 bytes
            sums[i, j] += a[i] * b[j]

    It is written out here, since NVVM unrolls the loop over i and j alone, and the loads have to run ahead of the
    products; Numba takes ten times as long to compile it from Python.
    """
    each_rows, each_columns = tile.each

    @intrinsic
    def multiply(typingctx, sums, left, right):
        real = isinstance(sums.dtype, types.Float)

        def codegen(context, builder, signature, args):
            totals, left_tile, right_tile = args
            places = [builder.gep(totals, [_INT(i)]) for i in range(each_rows * each_columns)]
            values = [builder.load(place) for place in places]
            times, plus = (builder.fmul, builder.fadd) if real else (builder.mul, builder.add)
            for k in range(tile.depth):
                a = _load_blocks(builder, left_tile, k * (tile.rows + PAD), each_rows, tile.lanes[0])
                b = _load_blocks(builder, right_tile, k * (tile.columns + PAD), each_columns, tile.lanes[1])
                for i, j in product_of(range(each_rows), range(each_columns)):
                    n = i * each_columns + j
                    values[n] = plus(values[n], times(a[i], b[j]))
            for place, value in zip(places, values, strict=True):
                builder.store(value, place)
            return context.get_dummy_value()

        return types.void(sums, left, right), codegen

    return multiply


def _load_blocks(builder, tile, first: int, each: int, apart: int) -> list:
    """A thread's `each` numbers from a row of a tile: blocks of four, `apart` blocks apart."""
    element = tile.type.pointee
    width = VECTOR_BYTES // (8 if element in (ir.DoubleType(), ir.IntType(64)) else 4)
    vector = ir.VectorType(element, width)
    numbers = []
    for n in range(0, each, width):
        place = builder.gep(tile, [_INT(first + n // _BLOCK * _BLOCK * apart + n % _BLOCK)])
        loaded = builder.load(builder.bitcast(place, vector.as_pointer()))
        loaded.align = VECTOR_BYTES
        numbers += [builder.extract_element(loaded, _INT(i)) for i in range(width)]
    return numbers


# ---- where the sums go


def make_lay_out(offsets: list[int]) -> Callable:
    """The intrinsic (target, sums): target[offsets[i]] = sums[i].

    Written out, since an index that NVVM does not find constant would put the sums into memory for the whole kernel.
    """

    @intrinsic
    def lay_out(typingctx, target, sums):
        def codegen(context, builder, signature, args):
            for i, offset in enumerate(offsets):
                value = builder.load(builder.gep(args[1], [_INT(i)]))
                builder.store(value, builder.gep(args[0], [_INT(offset)]))
            return context.get_dummy_value()

        return types.void(target, sums), codegen

    return lay_out


def make_tile_store(tile: Tile, start: Callable, put: Callable) -> Callable:
    """The device function (sums, room, operands, first row, first column) that hands out the block's sums in fours.

    place = start(operands, row) for each row, and put(operands, place, column, values) for four neighbouring columns,
    of which values[0] belongs to `column`. What lies outside of the result is theirs to leave out.

    Warps side by side lay their rows of sums there, and the whole block takes them out again, a row's neighbouring
    columns by neighbouring threads: full lines of memory are written. `put` is in the code once, not once for each sum,
    so that it may be long.
    """
    warp_height, columns, threads = tile.lanes[0] * tile.each[0], tile.columns, tile.threads
    pitch, vectors = columns + PAD, columns // _BLOCK
    lay_out = make_lay_out([
        (i // _BLOCK * tile.lanes[0] * _BLOCK + i % _BLOCK) * pitch + j // _BLOCK * tile.lanes[1] * _BLOCK + j % _BLOCK
        for i in range(tile.each[0]) for j in range(tile.each[1])
    ])  # fmt: skip
    passes = tile.warps[0]
    first_element = make_first_element(tile)
    assert warp_height * pitch <= 2 * tile.depth * (tile.rows + PAD)

    @device
    def store(sums, room, operands, first_row, first_column):
        thread = cuda.threadIdx.x & _THREADS
        my_row, my_column = first_element(thread)
        values = register_sums(sums, _BLOCK)
        for strip in range(passes):
            if my_row // warp_height == strip:
                lay_out(at(room, my_row % warp_height * pitch + my_column), sums)
            cuda.syncthreads()
            for vector in range(thread, warp_height * vectors, threads):
                row, column = vector // vectors, vector % vectors * _BLOCK
                for j in range(0, _BLOCK, lanes(sums)):
                    load_vector(at(values, j), room, row * pitch + column + j)
                place = start(operands, first_row + strip * warp_height + row)
                put(operands, place, first_column + column, values)
            cuda.syncthreads()

    return store
