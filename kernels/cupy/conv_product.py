"""Convolution as an implicit matrix product on the GPU; src/conv_product.cu says how."""

import numpy as np

from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.conv_geometry import Correlation
from tilewise.kernels.conv_plan import choose_tile, made_of
from tilewise.kernels.cupy import driver
from tilewise.kernels.cupy.conv_direct import CORRELATION, operands
from tilewise.kernels.cupy.copying import copy_strided
from tilewise.kernels.cupy.gemm_tile import BIG, SMALL, Tile
from tilewise.kernels.cupy.launch import FLOATS, NAMES, Kernel
from tilewise.kernels.cupy.module import OLDEST
from tilewise.kernels.device_arrays import DeviceArray

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


def _packed(it: Correlation, weight, width: int):
    """(the weights as (group, row and column of the tap, channel, output), outputs padded to whole vectors)."""
    padded = ceil_div(it.outputs, width) * width
    kh, kw = it.rows.taps, it.columns.taps
    item, place = weight.dtype.itemsize, weight.place
    shape = it.groups, kh, kw, it.channels, it.outputs
    steps = it.group_step, it.rows.tap_step * it.width, it.columns.tap_step, it.channel_step, it.output_step
    first = (it.rows.first_tap * it.width + it.columns.first_tap) * item
    source = DeviceArray(
        place, weight.pointer + first, shape, weight.dtype, weight.owner, tuple(s * item for s in steps)
    )

    def write(packed):
        if source.size:
            copy_strided(source, DeviceArray(place, packed.pointer, shape, weight.dtype, packed.owner, packed.strides))

    return made_of(weight, "gemm", (*shape[:-1], padded), weight.dtype, write), padded


def correlate(it: Correlation, x, weight, y, bias, extra, code: int, kept=None):
    """y = activation(the correlation + bias + extra); bias and extra may be None."""
    tile, last = tile_for(it, x.dtype, driver.engine(x.place.ordinal).capability), it.channels_last
    outputs, pixels = (tile.columns, tile.rows) if last else (tile.rows, tile.columns)
    packed, padded = _packed(it, weight, 16 // x.dtype.itemsize)
    whole = it.channels % (_STEP * pixels // tile.threads) == 0  # a thread's k then lie within one tap
    grid = ceil_div(it.pixels, pixels), ceil_div(it.outputs, outputs), it.groups
    given = operands(it, x, packed, y, bias, extra, code)
    _products[tile, last, whole](x.place, grid, *given, it.pixels, padded)
