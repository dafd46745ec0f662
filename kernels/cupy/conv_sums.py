"""The gradients of bias and weight, as sums over pixels, on the GPU; src/conv_sums.cu says how."""

from math import prod

from tilewise.kernels.channel_plan import ceil_div, unit_width
from tilewise.kernels.conv_geometry import Correlation, pixels
from tilewise.kernels.conv_plan import split
from tilewise.kernels.cupy.gemm_sums import sum_rows
from tilewise.kernels.cupy.launch import Kernel, blocks_of, sum_dtype

_SOURCE = "conv_sums.cu"
# grad, x, parts, both axes, steps of x and grad, Filters
WEIGHT = "P P P 10q 10q 4q 4q 7q"

_sum_parts = Kernel(_SOURCE, "conv_sum_parts<{T}>", "P P q q q q q q")
_sum_channel = {
    False: Kernel(_SOURCE, "conv_sum_channel<{T}, 1>", "P P q q q q"),
    True: Kernel(_SOURCE, "conv_sum_channel<{T}, {N}>", "P P q q q q", promises=("LDG.128",)),
}
_weight_sums = Kernel(_SOURCE, "conv_weight_sums<{T}>", f"{WEIGHT} q q q")


def operands(it: Correlation, grad, x, parts, steps=None, channels: int = 0) -> tuple:
    """What WEIGHT stands for; `it`: the forward correlation. steps, channels: of operands that lie in another order."""
    of = it.groups, it.outputs, channels or it.channels, *it.filters[3:]
    return grad, x, parts, *it.axes, *(steps or it.steps), *of


def new_parts(place, many: int, count: int, dtype):
    return place.empty((many, count), sum_dtype(dtype))


def add_parts(parts, result, taps: int = 1, channels: int = 1, padded: int = 0):
    """The second stage; taps and channels, where the parts have them in the other order than the result, and `padded`
    channels, where they have more."""
    _sum_parts(
        result.place, blocks_of(result.size), parts, result, result.size, *parts.shape, taps, channels,
        padded or channels, dtype=result.dtype,
    )  # fmt: skip
    return result


def bias_gradient(grad, layout: str):
    """grad summed over images and pixels."""
    height, width = pixels(grad.shape, layout)
    images, area = grad.shape[0], height * width
    if layout == "NHWC":
        channels = grad.shape[3]
        return sum_rows(grad.reshape(1, images * area, channels)).reshape(channels)
    channels = grad.shape[1]
    many, per_part = split(images * area, channels)
    parts = new_parts(grad.place, many, channels, grad.dtype)
    width = unit_width(area, grad.dtype)
    units, per_part = area // width, ceil_div(per_part, width)
    _sum_channel[width > 1](grad.place, (channels, many, 1), grad, parts, images, channels, units, per_part)
    return add_parts(parts, grad.place.empty((channels,), grad.dtype))


def weight_gradient(it: Correlation, grad, x, shape: tuple[int, ...]):
    """conv2d's gradient with respect to a weight of that shape; `it`: its forward correlation."""
    count = prod(shape)
    many, per_part = split(it.pixels, count)
    parts = new_parts(grad.place, many, count, grad.dtype)
    _weight_sums(grad.place, (count, many, 1), *operands(it, grad, x, parts), count, it.pixels, per_part)
    return add_parts(parts, grad.place.empty(shape, grad.dtype))
