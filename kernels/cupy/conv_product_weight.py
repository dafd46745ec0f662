"""The weight gradient as an implicit matrix product on the GPU; src/conv_product_weight.cu says how."""

from math import prod

from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.conv_geometry import Correlation
from tilewise.kernels.conv_plan import TILED_PIXELS, split
from tilewise.kernels.cupy.conv_sums import WEIGHT, add_parts, new_parts, operands
from tilewise.kernels.cupy.gemm_tile import SMALL, Tile
from tilewise.kernels.cupy.launch import NAMES, Kernel

NARROW = Tile("Narrow", 32, 64, 128, 2)  # for float64


def _make(tile: Tile, last: bool) -> Kernel:
    dtypes = ("float64",) if tile is NARROW else ("float16", "bfloat16", "float32")
    return Kernel(
        "conv_product_weight.cu", f"conv_product_weight<{{T}}, {NAMES}{tile.name}, {str(last).lower()}>",
        f"{WEIGHT} q q", threads=tile.threads, blocks=2, dtypes=dtypes, promises=("LDS.128",),
    )  # fmt: skip


_kernels = {(tile, last): _make(tile, last) for tile in (SMALL, NARROW) for last in (False, True)}


def applies(it: Correlation) -> bool:
    """Whether places in an image fit 32 bits."""
    return it.narrow and max(prod(it.shape_x[1:]), prod(it.shape_y[1:])) < 1 << 31


def weight_gradient(it: Correlation, grad, x, shape: tuple[int, ...]):
    """conv2d's gradient with respect to a weight of that shape; `it`: its forward correlation."""
    columns = it.channels * it.taps
    tile = NARROW if grad.dtype.itemsize == 8 else SMALL
    tiles = ceil_div(it.outputs, tile.rows) * ceil_div(columns, tile.columns)
    many, per_part = split(it.pixels, tiles * it.groups, TILED_PIXELS)
    parts = new_parts(grad.place, many, prod(shape), grad.dtype)
    grid = tiles, it.groups, many
    _kernels[tile, it.channels_last](grad.place, grid, *operands(it, grad, x, parts), it.pixels, per_part)
    result = grad.place.empty(shape, grad.dtype)
    return add_parts(parts, result, it.taps, it.channels) if it.channels_last else add_parts(parts, result)
