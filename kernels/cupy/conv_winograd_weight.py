"""3x3 convolution's weight gradient by Winograd in float32 on the GPU; src/conv_winograd_weight.cu says how.

Error: as conv_winograd.py's, a relative 2-norm of about 2e-6; the tests hold it below 1e-5.
"""

from tilewise.kernels import conv_winograd_plan, settings
from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.conv_geometry import Correlation
from tilewise.kernels.conv_winograd_plan import POINTS, tiles_of
from tilewise.kernels.cupy import conv_tensor_weight, conv_winograd, driver
from tilewise.kernels.cupy.conv_sums import WEIGHT
from tilewise.kernels.cupy.conv_winograd import AXES, THREADS, make, tf32_is_faster, whole
from tilewise.kernels.cupy.gemm import multiply
from tilewise.kernels.device_arrays import DeviceArray
from tilewise.kernels.gemm_matrices import Matrices

_SOURCE = "conv_winograd_weight.cu"
_MOST_SUMS = 256 << 20  # bytes of the products' parts, which grow with the images
_grad = make("grad", f"P P {AXES} 4q 7q 7qi", 4, _SOURCE)
_taps = make("taps", f"P {WEIGHT} q q q q", 4, _SOURCE)


def applies(it: Correlation, dtype, ordinal: int) -> bool:
    """Whether it is faster than an implicit product, which may be one of TF32."""
    if conv_winograd_plan.why_not(it, dtype) is not None or not conv_winograd_plan.pays(it):
        return False
    tiling = tiles_of(it, dtype.itemsize)
    parts = ceil_div(it.images * tiling.of_image, tiling.at_once)
    if parts * it.groups * POINTS * whole(it.outputs) * whole(it.channels) * dtype.itemsize > _MOST_SUMS:
        return False
    if not (settings.active().tf32 and tf32_is_faster(it)):
        return True
    return conv_tensor_weight.choose(it, dtype, driver.engine(ordinal))[0] is None


def _factors(it: Correlation, grads, values, sizes: tuple[int, int, int], tiles: int) -> tuple[Matrices, Matrices]:
    matrices, outputs, channels = sizes
    lead = (matrices,)
    if it.channels_last:
        left = Matrices(grads, lead, outputs, tiles, 1, outputs)
        return left, Matrices(values, lead, tiles, channels, channels, 1)
    left = Matrices(grads, lead, outputs, tiles, tiles, 1)
    return left, Matrices(values, lead, tiles, channels, 1, tiles)


def _part_of(sums: DeviceArray, i: int) -> DeviceArray:
    """sums[i]."""
    size = sums.nbytes // sums.shape[0]
    return DeviceArray(sums.place, sums.pointer + i * size, sums.shape[1:], sums.dtype, sums.owner)


def weight_gradient(it: Correlation, grad, x, shape: tuple[int, ...]):
    """conv2d's gradient with respect to a weight of that shape; `it`: its forward correlation.

    Tiles that go one part after the other leave products each, which are added in their order at the end.
    """
    place, tiling, result = x.place, tiles_of(it, x.dtype.itemsize), x.place.empty(shape, x.dtype)
    outputs, channels = whole(it.outputs), whole(it.channels)
    matrices, most = it.groups * POINTS, whole(tiling.at_once)
    grads, values = (place.empty((matrices, most, n), x.dtype) for n in (outputs, channels))
    parts = list(tiling.parts(it.images))
    sums = place.empty((len(parts), matrices, outputs, channels), x.dtype)
    for i, (first, count) in enumerate(parts):
        tiles = whole(count)
        about = first, count, tiles, tiling.rows, tiling.columns, channels, outputs, it.channels_last
        blocks = (ceil_div(it.groups * tiles * n, THREADS) for n in (channels, outputs))
        conv_winograd.transform_input(place, next(blocks), x, values, *it.axes, *it.steps[:4], *it.filters, *about)
        _grad(place, next(blocks), grad, grads, *it.axes, *it.steps[4:], *it.filters, *about)
        left, right = _factors(it, grads, values, (matrices, outputs, channels), tiles)
        multiply(left, right, left.lead, _part_of(sums, i), tf32=False)
    _taps(
        place, ceil_div(it.groups * outputs * channels, THREADS), sums, grad, x, result, *it.axes, *it.steps,
        *it.filters, it.images, channels, outputs, len(parts),
    )  # fmt: skip
    return result
