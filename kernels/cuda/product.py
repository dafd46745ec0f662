"""The product at the heart of matmul and convolution: one block's tile of C = A B, summed in registers.

A block owns `rows` x `columns` of C. It walks along k in steps of `depth`; at each step both operands' tiles lie in
shared memory, k by k, so that the numbers a thread needs for one k are 16-byte vectors. There are two such buffers:
while one is multiplied, the next step's numbers are on their way from memory to registers, and then into the other.

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
    fetch(kept, operands, place, k, end)                the thread's elements of the step at k, into `kept` registers
    keep(tile, kept, operands, place)                   writes them to shared memory, (k, row) at k * (size + PAD) + row

`operands` is a tuple whose first member is the pointer to the elements; the others are the loader's affair. For the
right operand "row" means column: both sides are loaded alike. Elements beyond the operand are 0; so is every k >= end.

Threads share a step's tile of `size` x depth elements in one of two ways, by what is contiguous in memory:

    rows fastest (row_loader)                        k fastest (depth_loader)
        k   row -->                                      k -->
        |   t0  t1  t2  ...  t127                    row t0  t1  ...  t15
        v   t128 ...         t255                     |  t16 ...      t31
            t0  t1 (its next k)                       v  ...          t255
    a thread has one row and every (threads / size)-th k     one k and every (threads / depth)-th row

so that what belongs to a row, such as a pixel's address, is computed before the loop, by `start`. strided_loader and
vector_loader are for plain matrices, in either order of memory, chosen when they are called.
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
from tilewise.kernels.cuda.ptx import (
    VECTOR_BYTES,
    at,
    lanes,
    load_vector,
    narrow,
    register_sums,
    registers,
    settled,
    shared_sums,
    store_vector,
    widen,
    zero,
)

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
    """start, fetch, keep: see the module. count: elements that a thread fetches at a step."""

    start: Callable
    fetch: Callable
    keep: Callable
    count: int


# ---- the loop over k


def make_product(tile: Tile, left: Loader, right: Loader) -> Callable:
    """The device function (left operands, right operands, first row, first column, begin, end) -> the thread's sums.

    It sums over begin <= k < end. All threads of the block must call it. The sums lie in `register_sums`, row by row of
    the thread's `each`; make_store tells which elements of C they are.
    """
    product = make_product_and_room(tile, left, right)

    @device
    def sums_alone(left_operands, right_operands, first_row, first_column, begin, end):
        return product(left_operands, right_operands, first_row, first_column, begin, end)[0]

    return sums_alone


def make_product_and_room(tile: Tile, left: Loader, right: Loader) -> Callable:
    """The same function -> (sums, shared memory that nobody reads any more), for make_tile_store."""
    start_left, fetch_left, keep_left, left_count = left.start, left.fetch, left.keep, left.count
    start_right, fetch_right, keep_right, right_count = right.start, right.fetch, right.keep, right.count
    step, each_rows, each_columns = tile.depth, *tile.each
    count = each_rows * each_columns
    left_stage, right_stage = step * (tile.rows + PAD), step * (tile.columns + PAD)
    left_room, right_room = 2 * left_stage, 2 * right_stage
    first_element = make_first_element(tile)
    multiply = make_multiply(tile)

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
            fetch_left(left_kept, left_operands, left_place, begin, end)
            fetch_right(right_kept, right_operands, right_place, begin, end)
            keep_left(left_tiles, left_kept, left_operands, left_place)
            keep_right(right_tiles, right_kept, right_operands, right_place)
            cuda.syncthreads()
        stage = 0
        for k in range(begin, end, step):
            further = k + step < end
            if further:
                fetch_left(left_kept, left_operands, left_place, k + step, end)
                fetch_right(right_kept, right_operands, right_place, k + step, end)
            multiply(
                sums, at(left_tiles, stage * left_stage + my_row), at(right_tiles, stage * right_stage + my_column)
            )
            stage = 1 - stage
            if further:  # nobody reads this buffer any more: all have passed the last barrier
                keep_left(at(left_tiles, stage * left_stage), left_kept, left_operands, left_place)
                keep_right(at(right_tiles, stage * right_stage), right_kept, right_operands, right_place)
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


def make_store(tile: Tile, start: Callable, put: Callable, by: str = "rows") -> Callable:
    """The device function (sums, operands, first row, first column) that hands out a thread's sums in fours.

    by "rows": place = start(operands, row) for each row, and put(operands, place, column, values) for four neighbouring
    columns, of which values[0] belongs to `column`. by "columns": the same with the two exchanged. What lies outside of
    the result is theirs to leave out. values: `register_sums`.
    """
    first_element = make_first_element(tile)
    across = by == "columns"
    each_rows, each_columns = tile.each
    outer, inner = (each_columns, each_rows) if across else (each_rows, each_columns)
    row_stride, column_stride = tile.lanes[0] * _BLOCK, tile.lanes[1] * _BLOCK
    outer_stride, inner_stride = (column_stride, row_stride) if across else (row_stride, column_stride)
    outer_step, inner_step = (1, each_columns) if across else (each_columns, 1)
    inner_blocks = inner // _BLOCK

    @device
    def store(sums, operands, first_row, first_column):
        my_row, my_column = first_element(cuda.threadIdx.x & _THREADS)
        line = first_column + my_column if across else first_row + my_row
        position = first_row + my_row if across else first_column + my_column
        values = register_sums(sums, _BLOCK)
        for i in range(outer):
            place = start(operands, line + i // _BLOCK * outer_stride + i % _BLOCK)
            for block in range(inner_blocks):
                for j in range(_BLOCK):
                    values[j] = sums[i * outer_step + (block * _BLOCK + j) * inner_step]
                put(operands, place, position + block * inner_stride, values)

    return store


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
    """As make_store by rows, but through shared memory: (sums, room, operands, first row, first column).

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


# ---- loaders


def row_loader(tile: Tile, size: int, start: Callable, element: Callable) -> Loader:
    """Rows fastest. start(operands, row) -> place, once; element(operands, place, k) -> the element, asked for k < end.

    size: rows (or columns) of the operand's tile. Both are device functions, and 0 outside of the operand is theirs to
    give. Every tile of the grid is asked for, also the part of it that lies outside.
    """
    threads, pitch = tile.threads, size + PAD
    together = threads // size  # k that are fetched at a time
    count = tile.depth // together
    start_row = start
    assert threads % size == 0
    assert tile.depth % together == 0

    @device
    def start_thread(operands, first, thread):
        return start_row(operands, first + thread % size), thread // size, thread // size * pitch + thread % size

    @device
    def fetch(kept, operands, place, k, end):
        for i in range(count):
            mine = k + place[1] + i * together
            kept[i] = element(operands, place[0], mine) if mine < end else narrow(zero(kept), kept)

    @device
    def keep(target, kept, operands, place):
        for i in range(count):
            target[place[2] + i * together * pitch] = widen(kept[i])

    return Loader(start_thread, fetch, keep, count)


def depth_loader(tile: Tile, size: int, start: Callable, element: Callable) -> Loader:
    """k fastest; otherwise as row_loader. `start` is called for each of the thread's rows, and gives tuples of a type.

    (The places of all its rows are kept in registers: few of them, or few numbers each.)
    """
    step, pitch = tile.depth, size + PAD
    together = tile.threads // step  # rows that are fetched at a time
    count = size // together
    assert tile.threads % step == 0
    assert size % together == 0
    starts = _start_rows(start, together, count)

    @device
    def start_thread(operands, first, thread):
        k, row = thread % step, thread // step
        return starts(operands, first + row), k, k * pitch + row

    @device
    def fetch(kept, operands, place, k, end):
        mine = k + place[1]
        places = place[0]
        for i in range(count):
            kept[i] = element(operands, places[i], mine) if mine < end else narrow(zero(kept), kept)

    @device
    def keep(target, kept, operands, place):
        for i in range(count):
            target[place[2] + i * together] = widen(kept[i])

    return Loader(start_thread, fetch, keep, count)


def _start_rows(start: Callable, apart: int, count: int) -> Callable:
    """The device function (operands, row) -> the places of `count` rows, a power of two, that are `apart`."""
    if count == 1:
        return device(lambda operands, row: (start(operands, row),))
    half = count // 2
    first_half, distance = _start_rows(start, apart, half), half * apart
    return device(lambda operands, row: first_half(operands, row) + first_half(operands, row + distance))


def strided_loader(tile: Tile, size: int) -> Loader:
    """A matrix in either order: operands (pointer, rows, stride of rows, stride of k).

    Where the stride of k is 1, k is fastest among the threads, else rows are. What a thread finds beyond the last row
    is any number: it meets only sums that belong to no element.
    """
    threads, step, pitch = tile.threads, tile.depth, size + PAD
    count = size * step // threads
    assert max(threads, size) % min(threads, size) == 0
    assert count <= 32

    @device
    def start(operands, first, thread):
        pointer, rows, row_stride, k_stride = operands
        room = int32(min(rows - first, size))
        if k_stride == 1:
            row, k = thread // step, thread % step
            inside = settled(_mask(count, room - row, threads // step))
        else:
            row, k, inside = thread % size, thread // size, int32(-1)
        at_row = row if k_stride == 1 else min(row, room - 1)
        mine = at(pointer, (first + at_row) * row_stride + k * k_stride)
        return settled(mine), inside, int32(k), int32(k * pitch + row)

    @device
    def fetch(kept, operands, place, k, end):
        mine, inside, first_k, _ = place
        _, _, row_stride, k_stride = operands
        k_step = 0 if k_stride == 1 else threads // size
        apart = threads // step * row_stride if k_stride == 1 else k_step * k_stride
        begin = k * k_stride
        if k + step <= end:
            for i in range(count):
                if inside >> i & 1:
                    kept[i] = mine[begin + i * apart]
        else:
            inside &= _mask(count, int32(end - k) - first_k, k_step)
            for i in range(count):
                kept[i] = mine[begin + i * apart] if inside >> i & 1 else narrow(zero(kept), kept)

    @device
    def keep(target, kept, operands, place):
        apart = threads // step if operands[3] == 1 else threads // size * pitch
        for i in range(count):
            target[place[3] + i * apart] = widen(kept[i])

    return Loader(start, fetch, keep, count)


def vector_loader(tile: Tile, size: int, k_fastest: bool | None = None) -> Loader:
    """As strided_loader, 16 bytes at a time.

    The pointer, the stride that is not 1, and the length of what is contiguous are multiples of 16 bytes. Where it is
    known when the kernel is made whether the stride of k is the one that is 1 (k_fastest), it takes fewer registers.
    """
    threads, step, pitch = tile.threads, tile.depth, size + PAD
    count = size * step // threads
    known = k_fastest is not None
    constant = bool(k_fastest)

    @device
    def start(operands, first, thread):
        pointer, rows, row_stride, k_stride = operands
        width = lanes(pointer)
        room = int32(min(rows - first, size))
        if constant if known else k_stride == 1:
            row, k = thread // (step // width), thread % (step // width) * width
            mine = at(pointer, (first + row) * row_stride + k)
            inside = settled(_mask(count // width, room - row, threads * width // step))
        else:
            row, k = thread % (size // width) * width, thread // (size // width)
            mine = at(pointer, first + min(row, room - width) + k * k_stride)
            inside = int32(-1)
        return settled(mine), inside, int32(k), int32(k * pitch + row)

    @device
    def fetch(kept, operands, place, k, end):
        mine, inside, first_k, _ = place
        _, _, row_stride, k_stride = operands
        width = lanes(operands[0])
        by_k = constant if known else k_stride == 1
        k_step = 0 if by_k else threads * width // size
        begin = k if by_k else k * k_stride
        apart = threads * width // step * row_stride if by_k else k_step * k_stride
        if k + step <= end:
            for i in range(count // width):
                if inside >> i & 1:
                    load_vector(at(kept, i * width), mine, begin + i * apart)
        else:
            inside &= _mask(count // width, int32(end - k) - first_k, k_step)
            for i in range(count // width):
                if inside >> i & 1:
                    load_vector(at(kept, i * width), mine, begin + i * apart)
                else:
                    for j in range(width):
                        kept[i * width + j] = narrow(zero(kept), kept)

    @device
    def keep(target, kept, operands, place):
        width = lanes(operands[0])
        wide = register_sums(kept, count)
        for i in range(count):
            wide[i] = widen(kept[i])
        if constant if known else operands[3] == 1:
            for i in range(count // width):
                for j in range(width):
                    target[place[3] + i * (threads * width // step) + j * pitch] = wide[i * width + j]
        else:
            for i in range(count // width):
                for j in range(0, width, lanes(wide)):
                    store_vector(target, place[3] + i * (threads * width // size) * pitch + j, at(wide, i * width + j))

    return Loader(start, fetch, keep, count)


@device
def _mask(count, room, apart):
    """A bit for each i < count: whether i * apart < room. One register holds what is inside of a matrix."""
    mask = 0
    for i in range(count):
        mask |= (i * apart < room) << i
    return int32(mask)
