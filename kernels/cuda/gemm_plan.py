"""Which kernel computes a product: by dtype, shape, and the device's number of multiprocessors."""

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from tilewise.kernels import settings
from tilewise.kernels.cuda.epilogue import LEAKY_SLOPE, NONE
from tilewise.kernels.cuda.gemm_few import FEW, ROWS, multiply_few
from tilewise.kernels.cuda.gemm_tensor import MATMULS
from tilewise.kernels.cuda.gemm_tile import (
    BIG,
    BIG_COPIES,
    BIG_VECTORS,
    INTEGERS,
    SMALL,
    STRIDED,
    TALL,
    TINY,
    VECTORS,
    add_integer_parts,
    add_parts,
)
from tilewise.kernels.cuda.launch import ceil_div, sum_dtype
from tilewise.kernels.cuda.memory import VECTOR_BYTES
from tilewise.kernels.cuda.tensor_product import LARGE as TENSOR_LARGE
from tilewise.kernels.cuda.tensor_product import SMALL as TENSOR_SMALL
from tilewise.kernels.cuda.tensor_product import TensorTile
from tilewise.kernels.device_arrays import DeviceArray

# A product with fewer blocks than this splits its depth, if parts of at least that depth remain. A constant, not the
# device's: the order of a sum depends on the shape alone.
ENOUGH_BLOCKS, PART_DEPTH = 256, 256
# A matrix with few vectors has a warp for each row: it needs many rows, or short ones.
MANY_ROWS, SHORT_ROWS = 256, 2048
MOST_MATRICES = (1 << 16) - 1  # the grid's z


@dataclass(frozen=True, slots=True)
class Matrices:
    """A batch of rows x columns matrices, in row-major order but for the matrix itself, whose strides are given."""

    array: DeviceArray
    lead: tuple[int, ...]
    rows: int
    columns: int
    row_stride: int
    column_stride: int

    def transposed(self) -> "Matrices":
        return replace(
            self, rows=self.columns, columns=self.rows, row_stride=self.column_stride, column_stride=self.row_stride
        )

    def aligned(self) -> bool:
        """Whether its contiguous rows (or columns) consist of whole vectors of 16 bytes, where the first one begins."""
        width = 16 // self.array.dtype.itemsize
        along = self.columns if self.column_stride == 1 else self.rows
        size = self.rows * self.columns
        return along % width == 0 and size % width == 0


@dataclass(frozen=True, slots=True)
class Batch:
    """The batch of a product as at most three axes: sizes, and strides in elements of both operands."""

    sizes: tuple[int, int, int]
    left: tuple[int, int, int]
    right: tuple[int, int, int]


def batch_axes(left: Matrices, right: Matrices, lead: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(size, left stride, right stride) of the batch's axes, innermost first; axes that lie together are one."""
    axes: list[tuple[int, int, int]] = []
    steps = [m.rows * m.columns for m in (left, right)]
    for i, size in enumerate(reversed(lead)):
        strides = []
        for side, matrices in enumerate((left, right)):
            own = matrices.lead[-1 - i] if i < len(matrices.lead) else 1
            strides.append(steps[side] if own > 1 else 0)
            steps[side] *= own
        if size == 1:
            continue
        if axes and all(s == n * axes[-1][0] for s, n in zip(strides, axes[-1][1:], strict=True)):
            axes[-1] = (axes[-1][0] * size, *axes[-1][1:])
        else:
            axes.append((size, *strides))
    return axes


def choose_tile(m: int, n: int, depth: int, matrices: int, multiprocessors: int, candidates: tuple):
    """The largest tile of which the product fills more than half, and which occupies the device."""
    parts = max(1, depth // PART_DEPTH)
    for tile in candidates:
        blocks = ceil_div(m, tile.rows) * ceil_div(n, tile.columns) * matrices
        if 2 * m > tile.rows and 2 * n > tile.columns and min(blocks * parts, ENOUGH_BLOCKS) >= multiprocessors:
            return tile
    return candidates[-1]


def split(depth: int, blocks: int) -> tuple[int, int]:
    """(parts, depth of each): a multiple of 32, so that every step but the last is whole."""
    parts = max(1, min(ceil_div(ENOUGH_BLOCKS, blocks), depth // PART_DEPTH))
    each = max(32, ceil_div(ceil_div(depth, parts), 32) * 32)
    return max(1, ceil_div(depth, each)), each


def multiply(left: Matrices, right: Matrices, lead: tuple, result: DeviceArray, bias=None, code=NONE):
    """result = activation(left @ right + bias), batch by batch."""
    _multiply(left, right, batch_axes(left, right, lead), prod(lead), result, bias, code)


def _multiply(left, right, axes, matrices, result, bias, code):
    if len(axes) > 3 or matrices > MOST_MATRICES:  # one launch for a few steps of the outermost axis
        size, left_stride, right_stride = axes[-1]
        inner = matrices // size
        at_once = 1 if len(axes) > 3 else max(1, MOST_MATRICES // inner)
        for i in range(0, size, at_once):
            some = min(at_once, size - i)
            sides = _shifted(left, i * left_stride), _shifted(right, i * right_stride)
            outer = [(some, left_stride, right_stride)] if some > 1 else []
            part = _from(result, i * inner * left.rows * right.columns)
            _multiply(*sides, axes[:-1] + outer, inner * some, part, bias, code)
        return
    fill = [(1, 0, 0)] * (3 - len(axes))
    # a batch along one axis is the outermost of the three
    n0, n1, n2 = fill + axes if len(axes) == 1 else axes + fill
    _launch(left, right, Batch(*zip(n0, n1, n2, strict=True)), matrices, result, bias, code)


def _shifted(matrices: Matrices, elements: int) -> Matrices:
    a = matrices.array
    moved = DeviceArray(a.place, a.pointer + elements * a.dtype.itemsize, a.shape, a.dtype, a.owner)
    return replace(matrices, array=moved)


def _from(result: DeviceArray, element: int) -> DeviceArray:
    """The result, from an element on."""
    pointer = result.pointer + element * result.dtype.itemsize
    return DeviceArray(result.place, pointer, (result.size - element,), result.dtype, result.owner)


def choose(left: Matrices, right: Matrices, matrices: int, tf32: bool):
    """(kernel, tile) for a product."""
    dtype, engine = left.array.dtype, left.array.place.engine
    size = left.rows, right.columns, left.columns, matrices, engine.multiprocessors
    orders = left.column_stride == 1, right.row_stride == 1  # is k contiguous
    if dtype.kind != "f":
        return INTEGERS, SMALL
    aligned = left.aligned() and right.aligned()
    half = dtype.itemsize == 2
    if aligned and engine.capability >= (8, 0) and (half or (tf32 and dtype == np.float32)):
        width = VECTOR_BYTES // dtype.itemsize
        tile = choose_tile(*size, (TENSOR_LARGE[width], TENSOR_SMALL[width]))
        return MATMULS[tile][orders], tile
    if not aligned:
        tile = choose_tile(*size, (TINY,) if dtype == np.float64 else (SMALL, TINY))  # in 64 bits SMALL would spill
        return STRIDED[tile], tile
    tile = choose_tile(*size, (BIG, TALL, SMALL, TINY) if dtype == np.float32 else (SMALL, TINY))
    if tile is not BIG:
        return VECTORS[tile], tile
    copies = BIG_COPIES.get(orders) if engine.capability >= (8, 0) else None
    return copies or BIG_VECTORS[orders], tile


def _few(left: Matrices, right: Matrices, bias, result, code) -> bool:
    """Whether it was a product of a matrix, whose k are contiguous, with few vectors; then it is computed."""
    m, n, depth = left.rows, right.columns, left.columns
    by_rows = n <= FEW and left.column_stride == 1
    rows, count = (m, n) if by_rows else (n, m)
    if not by_rows and not (m <= FEW and right.row_stride == 1):
        return False
    if left.array.dtype.kind != "f" or (rows < MANY_ROWS and depth > SHORT_ROWS):
        return False
    if by_rows:
        big, few, strides, to, of_bias = left, right, (right.column_stride, right.row_stride), (n, 1), (0, 1)
    else:
        big, few, strides, to, of_bias = right, left, (left.row_stride, left.column_stride), (1, n), (1, 0)
    width = 16 // big.array.dtype.itemsize
    whole = strides[1] == 1 and depth % width == 0
    multiply_few(
        result.place, ceil_div(rows, ROWS), big.array, few.array, result, bias, rows, count, depth,
        *strides, *to, *of_bias, depth // width if whole else 0, bias is not None, code, LEAKY_SLOPE,
    )  # fmt: skip
    return True


def _launch(left: Matrices, right: Matrices, batch: Batch, matrices: int, result, bias, code):
    if matrices == 1 and _few(left, right, bias, result, code):
        return
    kernel, tile = choose(left, right, matrices, settings.active().tf32)
    k_contiguous = left.column_stride == 1, right.row_stride == 1
    shared = tile.shared_bytes(*k_contiguous) if isinstance(tile, TensorTile) else 0
    m, n, depth = left.rows, right.columns, left.columns
    dtype, place = left.array.dtype, left.array.place
    blocks = ceil_div(m, tile.rows) * ceil_div(n, tile.columns)
    parts, part = split(depth, blocks * matrices)
    widened = result.dtype != dtype  # bytes: the sums are the result
    partial = result if widened else None
    if parts > 1:
        partial = place.empty((parts, matrices, m, n), sum_dtype(dtype))
    target = partial if partial is not None else result
    # 16 bytes at a time: a thread of `tile` writes four neighbouring numbers, or as many as 16 bytes hold
    together = tile.width if isinstance(tile, TensorTile) else 4
    vectors = dtype.kind == "f" and n % together == 0 and together * target.dtype.itemsize >= VECTOR_BYTES
    to_sums = parts > 1 or widened
    kernel(
        place, (blocks, parts, matrices),
        left.array, right.array, None if widened else result, partial, bias, m, n, depth, part, matrices,
        left.row_stride, left.column_stride, right.row_stride, right.column_stride,
        *batch.sizes[:2], *batch.left, *batch.right,
        to_sums, bias is not None, code, vectors, LEAKY_SLOPE if dtype.kind == "f" else 0, shared=shared,
    )  # fmt: skip
    if parts > 1:
        _add_parts(partial, result, bias, code, m * n * matrices, n, parts, dtype)


def _add_parts(partial, result, bias, code, count, n, parts, dtype):
    place, blocks = partial.place, ceil_div(count, 256)
    if dtype.kind == "f":
        has_bias = bias is not None
        add_parts(
            place, blocks, partial, result, bias, count, n, parts, has_bias, code, LEAKY_SLOPE, dtype=dtype
        )  # fmt: skip
    else:
        widened = result.dtype != dtype
        c, total = (None, result) if widened else (result, None)
        add_integer_parts(place, blocks, partial, c, total, count, parts, widened, dtype=dtype)
