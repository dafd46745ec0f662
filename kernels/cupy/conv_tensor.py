"""Convolution on tensor cores as an implicit matrix product; src/conv_tensor.cuh, conv_tensor.cu and conv_wgmma.cu say
how."""

from typing import NamedTuple

from tilewise.kernels import settings
from tilewise.kernels.activation_plan import LEAKY_SLOPE
from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.conv_geometry import Correlation, image_steps
from tilewise.kernels.conv_plan import MOST_BLOCKS, choose_tensor_tile
from tilewise.kernels.cupy import conv_wgmma, gemm_tensor
from tilewise.kernels.cupy.conv_direct import CORRELATION, operands
from tilewise.kernels.cupy.conv_packing import in_vectors, pack_weights, whole_vectors
from tilewise.kernels.cupy.gemm_plan import NAMES_OF_WAYS, TOO_LITTLE, why_not
from tilewise.kernels.cupy.gemm_tensor import AMPERE, DTYPES, LARGE, LITTLE, MEDIUM, TensorTile
from tilewise.kernels.cupy.gemm_wgmma import WgmmaTile
from tilewise.kernels.cupy.launch import Kernel

# Few outputs, by whether channels are last: tiles are pixels x outputs then, else outputs x pixels; and the same for
# three products, which take more registers.
NARROW = {False: TensorTile("Flat", 64, 128, 128, 3), True: TensorTile("Upright", 128, 64, 128, 3)}
NARROW_PAIR = {False: TensorTile("FlatPair", 64, 128, 128, 2), True: TensorTile("UprightPair", 128, 64, 128, 2)}
# By wgmma x comes with its channels last, also in a 1x1 convolution. That pays in NCHW where more outputs use it:
# predicted from the bytes a second of one GPU, and the FLOPs of both ways.
_WORTH_TURNING = 512
FEW_CHANNELS = "its channels or outputs, filled up to whole vectors of 16 bytes, would be zeros for too great a part"


def make(
    name: str, way: str, tile: TensorTile, by_k: tuple[bool, bool], last: tuple, parameters: str, kernel: str = ""
) -> Kernel:
    """The kernel of a source of that name, with the same one or another; see gemm_tensor.make."""
    loads = "LDSM" if way in ("half", "bfloat") else "LDS"
    return gemm_tensor.make(f"{name}.cu", kernel or name, way, tile, by_k, last, parameters, ("STG.128", loads))


def tiles_of(way: str, last: bool) -> tuple[TensorTile, ...]:
    """From the largest on. Three products are for what has work enough."""
    return (MEDIUM, NARROW_PAIR[last]) if way == "split" else (LARGE, NARROW[last], LITTLE)


_kernels: dict[tuple[str, TensorTile | WgmmaTile, bool], Kernel] = {
    (way, tile, last): make("conv_tensor", way, tile, (last, not last), (last,), f"{CORRELATION} q q")
    for way in DTYPES for last in (False, True) for tile in tiles_of(way, last)
}  # fmt: skip
# NCHW of one tap, whose x needs no other order
_pointwise: dict[tuple[str, TensorTile | WgmmaTile], Kernel] = {
    (way, tile): make("conv_tensor", way, tile, (False, False), (), "P P P PPir q q q q q", "conv_pointwise")
    for way in DTYPES for tile in tiles_of(way, False)[:2]
}  # fmt: skip
_kernels.update((("wgmma", *which), kernel) for which, kernel in conv_wgmma.CONVOLUTIONS.items())


class Choice(NamedTuple):
    """A way to multiply, gemm_tensor.py's or "wgmma", and the tile."""

    way: str
    tile: TensorTile | WgmmaTile


def by_pixels(way: str, it: Correlation) -> bool:
    """Whether the product is one of pixels x outputs, and not of outputs x pixels."""
    return it.channels_last or way == "wgmma"


def why_not_way(way: str, dtype, engine, depth: int, *channels: int) -> str | None:
    """Why a convolution is not multiplied this way, if not. depth: of its sums. channels: of a group, that come in
    vectors."""
    if reason := why_not(way, engine.capability, depth, True, settings.active().tf32):
        return reason
    wasted = any(n == 1 or (way == "split" and 2 * whole_vectors(n, dtype) > 3 * n) for n in channels)
    return FEW_CHANNELS if wasted else None


def is_pointwise(it: Correlation, dtype) -> bool:
    """Whether x in NCHW is a matrix of channels x pixels for each image and group, in whole vectors."""
    axes = it.rows, it.columns
    same = all(a.taps == a.stride == a.step == 1 and a.first == a.origin == 0 and a.count == a.size for a in axes)
    area = it.rows.count * it.columns.count
    return same and not it.channels_last and area == whole_vectors(area, dtype) and it.images * it.groups <= MOST_BLOCKS


def _tile(it: Correlation, way: str, dtype, engine) -> TensorTile | WgmmaTile | str:
    """For this way, or why there is none."""
    if reason := why_not_way(way, dtype, engine, it.taps * it.channels, it.channels):
        return reason
    if way == "wgmma":
        if is_pointwise(it, dtype) and it.outputs <= _WORTH_TURNING:
            return "x would have to be turned, which costs more than it saves"
        return conv_wgmma.choose_tile(it.pixels, it.outputs, it.groups, engine)
    tiles = tiles_of(way, it.channels_last)
    if engine.capability < AMPERE:
        return tiles[-1]
    tile = choose_tensor_tile(it, engine.multiprocessors, *tiles[:2])
    return tile or (tiles[2] if len(tiles) > 2 else TOO_LITTLE)


def first_way(it: Correlation, dtype, engine, tile_for) -> tuple[Choice | None, dict[str, str]]:
    reasons = {}
    for way, of in (*(("wgmma", name) for name in conv_wgmma.DTYPES), *DTYPES.items()):
        if of == dtype.name:
            tile = tile_for(it, way, dtype, engine)
            if not isinstance(tile, str):
                return Choice(way, tile), reasons
            reasons[NAMES_OF_WAYS[way]] = tile
    return None, reasons


def choose(it: Correlation, dtype, engine) -> tuple[Choice | None, dict[str, str]]:
    """(the first way that can compute it, or None; why not those before it)."""
    return first_way(it, dtype, engine, _tile)


def _by_image(it: Correlation, x, weight, y, epilogue: tuple, choice: Choice):
    packed, padded = pack_weights(it, weight, it.channels)
    tile, area = choice.tile, it.rows.count * it.columns.count
    grid = ceil_div(area, tile.columns), ceil_div(it.outputs, tile.rows), it.images * it.groups
    _pointwise[choice](x.place, grid, x, packed, y, *epilogue, area, it.groups, it.outputs, it.channels, padded)


def correlate(it: Correlation, x, weight, y, bias, extra, code: int, kept: dict, choice: Choice):
    """y = activation(the correlation + bias + extra); bias and extra may be None. kept: for this x."""
    if (choice in _pointwise) and is_pointwise(it, x.dtype):
        _by_image(it, x, weight, y, (bias, extra, code, LEAKY_SLOPE), choice)
        return
    if "vectors" not in kept:
        kept["vectors"] = in_vectors(x, it.layout, it.groups)
    image, channels = kept["vectors"]
    packed, padded = pack_weights(it, weight, channels)
    tile, last = choice.tile, it.channels_last
    outputs, pixels = (tile.columns, tile.rows) if by_pixels(choice.way, it) else (tile.rows, tile.columns)
    grid = ceil_div(it.pixels, pixels), ceil_div(it.outputs, outputs), it.groups
    steps = image_steps(image.shape, "NHWC")
    given = operands(it, image, packed, y, bias, extra, code, steps, channels)
    _kernels[choice.way, tile, last](x.place, grid, *given, it.pixels, padded)
