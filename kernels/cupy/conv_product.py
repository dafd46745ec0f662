"""Convolution as an implicit matrix product on the GPU; src/conv_product.cu says how."""

import numpy as np

from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.conv_geometry import Correlation
from tilewise.kernels.conv_plan import choose_tile
from tilewise.kernels.cupy import driver
from tilewise.kernels.cupy.conv_direct import CORRELATION, operands
from tilewise.kernels.cupy.conv_packing import pack_weights
from tilewise.kernels.cupy.gemm_tile import BIG, SMALL, Tile
from tilewise.kernels.cupy.launch import FLOATS, NAMES, Kernel
from tilewise.kernels.cupy.module import OLDEST

_STEP = 16  # of all these tiles
# Few outputs, by whether channels are last: tiles are pixels x outputs then, else outputs x pixels.
LOW = {False: Tile("Flat", 32, 128, 128, 3), True: Tile("Upright", 128, 32, 128, 3)}
_COPIES_FROM = (8, 0)  # the compute capability that has cp.async, without which the large tile's registers do not do
_OLDER = ((8, 0), (8, 6), (8, 9))  # where two large blocks beside each other have too few registers


def _make(tile: Tile, last: bool, whole: bool) -> Kernel:
    large = tile is BIG  # float16 has tensor cores, and float64 too many registers
    flags = ", ".join(str(flag).lower() for flag in (last, whole, large))
    return Kernel(
        "conv_product.cu", f"conv_product<{{T}}, {NAMES}{tile.name}, {flags}>", f"{CORRELATION} q q",
        threads=tile.threads, blocks=tile.resident, blocks_on=dict.fromkeys(_OLDER, 1) if large else {},
        blocks_of_double=tile.resident * 2 // 3,
        least=_COPIES_FROM if large else OLDEST,
        dtypes=("float32",) if large else FLOATS,
        promises=("LDS.128", "LDGSTS", "FFMA") if large else ("LDS.128",),
    )  # fmt: skip


_products = {
    (tile, last, whole): _make(tile, last, whole)
    for last in (False, True) for tile in (BIG, SMALL, LOW[last]) for whole in (False, True)
}  # fmt: skip


def tile_for(it: Correlation, dtype, capability: tuple[int, int]) -> Tile:
    large = BIG if dtype == np.float32 and capability >= _COPIES_FROM else SMALL
    return choose_tile(it, large, SMALL, LOW[it.channels_last])


def correlate(it: Correlation, x, weight, y, bias, extra, code: int, kept=None):
    """y = activation(the correlation + bias + extra); bias and extra may be None."""
    tile, last = tile_for(it, x.dtype, driver.engine(x.place.ordinal).capability), it.channels_last
    outputs, pixels = (tile.columns, tile.rows) if last else (tile.rows, tile.columns)
    packed, padded = pack_weights(it, weight, it.channels)
    whole = it.channels % (_STEP * pixels // tile.threads) == 0  # a thread's k then lie within one tap
    grid = ceil_div(it.pixels, pixels), ceil_div(it.outputs, outputs), it.groups
    given = operands(it, x, packed, y, bias, extra, code)
    _products[tile, last, whole](x.place, grid, *given, it.pixels, padded)
