"""The weight gradient on tensor cores as an implicit matrix product; src/conv_tensor_weight.cu and conv_wgmma_weight.cu
say how."""

from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.conv_geometry import Correlation, image_steps
from tilewise.kernels.conv_plan import TILED_PIXELS, choose_weight_tile, split
from tilewise.kernels.cupy import conv_tensor, conv_wgmma
from tilewise.kernels.cupy.conv_packing import in_vectors, whole_vectors
from tilewise.kernels.cupy.conv_sums import WEIGHT, add_parts, new_parts, operands
from tilewise.kernels.cupy.conv_tensor import Choice, first_way, tiles_of
from tilewise.kernels.cupy.gemm_plan import TOO_LITTLE
from tilewise.kernels.cupy.gemm_tensor import AMPERE, DTYPES, TensorTile
from tilewise.kernels.cupy.gemm_wgmma import WgmmaTile
from tilewise.kernels.cupy.launch import Kernel

_kernels: dict[tuple[str, TensorTile | WgmmaTile], Kernel] = {
    (way, tile): conv_tensor.make("conv_tensor_weight", way, tile, (False, False), (), f"{WEIGHT} q q q")
    for way in DTYPES for tile in tiles_of(way, False)
}  # fmt: skip
_kernels.update((("wgmma", tile), kernel) for tile, kernel in conv_wgmma.WEIGHT_GRADIENTS.items())


def _tile(it: Correlation, way: str, dtype, engine) -> TensorTile | WgmmaTile | str:
    """For this way, or why there is none."""
    reason = conv_tensor.why_not_way(way, dtype, engine, it.pixels, it.channels, it.outputs)
    if reason:
        return reason
    if way == "wgmma":
        columns = it.taps * whole_vectors(it.channels, dtype)
        return conv_wgmma.choose_tile(it.outputs, columns, it.groups, engine, ceil_div(it.pixels, TILED_PIXELS))
    tiles = tiles_of(way, False)
    if engine.capability < AMPERE:
        return tiles[-1]
    tile = choose_weight_tile(it, *tiles[:2])
    return tile or (tiles[2] if len(tiles) > 2 else TOO_LITTLE)


def choose(it: Correlation, dtype, engine) -> tuple[Choice | None, dict[str, str]]:
    """As conv_tensor.choose, for the weight's gradient of this forward correlation."""
    return first_way(it, dtype, engine, _tile)


def weight_gradient(it: Correlation, grad, x, shape: tuple[int, ...], kept: dict, choice: Choice):
    """conv2d's gradient with respect to a weight of that shape; `it`: its forward correlation. kept: of grad."""
    way, tile = choice
    if "vectors" not in kept:
        kept["vectors"] = in_vectors(grad, it.layout, it.groups)
    grads, padded_outputs = kept["vectors"]
    image, channels = in_vectors(x, it.layout, it.groups)
    columns = it.taps * channels
    tiles = ceil_div(it.outputs, tile.rows) * ceil_div(columns, tile.columns)
    many, per_part = split(it.pixels, tiles * it.groups, TILED_PIXELS)
    parts = new_parts(grad.place, many, it.groups * it.outputs * columns, grad.dtype)
    steps = image_steps(image.shape, "NHWC") + image_steps(grads.shape, "NHWC")
    given = operands(it, grads, image, parts, steps, channels)
    _kernels[way, tile](grad.place, (tiles, it.groups, many), *given, it.pixels, per_part, padded_outputs)
    return add_parts(parts, grad.place.empty(shape, grad.dtype), it.taps, it.channels, channels)
