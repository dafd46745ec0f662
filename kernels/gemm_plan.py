"""How a product of matrices is shared out on a GPU: batches, tiles, parts of the depth; the same in every backend."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol, TypeVar

from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.device_arrays import DeviceArray
from tilewise.kernels.gemm_matrices import Matrices

# A product with fewer blocks than this splits its depth, if parts of at least that depth remain. A constant, not the
# device's: the order of a sum depends on the shape alone.
ENOUGH_BLOCKS, PART_DEPTH = 256, 256
# A matrix with few vectors has a warp for each row: it needs many rows, or short ones.
MANY_ROWS, SHORT_ROWS = 256, 2048
FEW = 4  # vectors; with more of them, a tile's products hide behind its loads too
MOST_MATRICES = (1 << 16) - 1  # the grid's z
SUM_COLUMNS = 32  # of a block that sums rows: a warp reads neighbouring ones
_SUM_ROWS = 512  # of a part: long enough to be worth a block, short enough to have many
_MOST_PARTS = 1 << 15  # the grid's y is limited


@dataclass(frozen=True, slots=True)
class Batch:
    """The batch of a product as at most three axes: sizes, and strides in elements of both operands."""

    sizes: tuple[int, int, int]
    left: tuple[int, int, int]
    right: tuple[int, int, int]


class Launch(NamedTuple):
    """One product of a batch that a grid has room for."""

    left: Matrices
    right: Matrices
    batch: Batch
    matrices: int
    result: DeviceArray


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


def launches(left: Matrices, right: Matrices, lead: tuple[int, ...], result: DeviceArray) -> Iterator[Launch]:
    """The batch in parts that a grid has room for."""
    return _launches(left, right, batch_axes(left, right, lead), prod(lead), result)


def _launches(left, right, axes, matrices, result) -> Iterator[Launch]:
    if len(axes) > 3 or matrices > MOST_MATRICES:  # one launch for a few steps of the outermost axis
        size, left_stride, right_stride = axes[-1]
        inner = matrices // size
        at_once = 1 if len(axes) > 3 else max(1, MOST_MATRICES // inner)
        for i in range(0, size, at_once):
            some = min(at_once, size - i)
            sides = left.moved(i * left_stride), right.moved(i * right_stride)
            outer = [(some, left_stride, right_stride)] if some > 1 else []
            part = _from(result, i * inner * left.rows * right.columns)
            yield from _launches(*sides, axes[:-1] + outer, inner * some, part)
        return
    fill = [(1, 0, 0)] * (3 - len(axes))
    # a batch along one axis is the outermost of the three
    n0, n1, n2 = fill + axes if len(axes) == 1 else axes + fill
    yield Launch(left, right, Batch(*zip(n0, n1, n2, strict=True)), matrices, result)


def _from(result: DeviceArray, element: int) -> DeviceArray:
    """The result, from an element on."""
    pointer = result.pointer + element * result.dtype.itemsize
    return DeviceArray(result.place, pointer, (result.size - element,), result.dtype, result.owner)


class HasSize(Protocol):
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...


TileType = TypeVar("TileType", bound=HasSize)


def choose_tile(
    m: int, n: int, depth: int, matrices: int, multiprocessors: int, candidates: Sequence[TileType]
) -> TileType:
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


class Few(NamedTuple):
    """A matrix `big` whose k are contiguous, with few vectors, and where the result and the bias have what belongs to a
    row of big and to a vector. number: of them. vectors: of 16 bytes, that each row is taken in.

    across: the rows are contiguous, not the k; vectors of 16 bytes are those of the rows, at one k."""

    big: DeviceArray
    few: DeviceArray
    rows: int
    number: int
    depth: int
    few_stride: int
    few_k: int
    c_row: int
    c_few: int
    bias_row: int
    bias_few: int
    vectors: int
    across: bool = False


def few_vectors(left: Matrices, right: Matrices, most: int = FEW) -> Few | None:
    """The product as one of a matrix with few vectors; None where it is none. With more than FEW, all is in vectors."""
    m, n, depth = left.rows, right.columns, left.columns
    by_rows = n <= most and left.column_stride == 1
    rows = m if by_rows else n
    if not by_rows and not (m <= most and right.row_stride == 1):
        return None
    if left.array.dtype.kind in "iu" or (rows < MANY_ROWS and depth > SHORT_ROWS):
        return None
    few = _few(left, right, by_rows)
    width = 16 // few.big.dtype.itemsize
    vectors = depth // width if few.few_k == 1 and depth % width == 0 else 0
    return few._replace(vectors=vectors) if few.number <= FEW or vectors else None


def few_vectors_across(left: Matrices, right: Matrices) -> Few | None:
    """The same of a matrix of which not the k are contiguous, but what they are not: vectors @ matrix."""
    m, n, depth = left.rows, right.columns, left.columns
    by_rows = n <= FEW and left.row_stride == 1
    if not by_rows and not (m <= FEW and right.column_stride == 1):
        return None
    few = _few(left, right, by_rows)
    width = 16 // few.big.dtype.itemsize
    if few.big.dtype.kind in "iu" or few.rows < MANY_ROWS or few.rows % width or not depth:
        return None
    return few._replace(vectors=few.rows // width, across=True)


def _few(left: Matrices, right: Matrices, by_rows: bool) -> Few:
    m, n, depth = left.rows, right.columns, left.columns
    if by_rows:
        return Few(left.array, right.array, m, n, depth, right.column_stride, right.row_stride, n, 1, 0, 1, 0)
    return Few(right.array, left.array, n, m, depth, left.row_stride, left.column_stride, 1, n, 1, 0, 0)


def sum_rows(sum_part: Callable, add_parts: Callable, sum_dtype: Callable, x: DeviceArray) -> DeviceArray:
    """(batch, rows, columns) -> (batch, columns), in fixed parts of the rows.

    A backend's sum_part(place, grid, x, partial, rows, columns, tiles, batch, part) gives each part's sums, of
    sum_dtype(x.dtype), and its add_parts(partial, result) adds those up.
    """
    batch, rows, columns = x.shape
    result = x.place.empty((batch, columns), x.dtype)
    if result.size == 0:
        return result
    part = max(_SUM_ROWS, ceil_div(rows, _MOST_PARTS))
    parts, tiles = max(1, ceil_div(rows, part)), ceil_div(columns, SUM_COLUMNS)
    partial = x.place.empty((parts, batch, columns), sum_dtype(x.dtype))
    sum_part(x.place, (tiles * batch, parts, 1), x, partial, rows, columns, tiles, batch, part)
    add_parts(partial, result)
    return result
