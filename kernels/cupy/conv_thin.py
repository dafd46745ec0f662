"""Convolution of few outputs on the GPU; src/conv_thin.cu says how. NHWC is turned to NCHW first, once for all phases
of a gradient."""

from math import prod

from tilewise.kernels.channel_plan import THREADS, ceil_div
from tilewise.kernels.conv_geometry import Correlation, image_steps
from tilewise.kernels.conv_plan import MOST_BLOCKS
from tilewise.kernels.cupy.conv_direct import CORRELATION, ELEMENTS_BELOW, operands
from tilewise.kernels.cupy.conv_packing import in_planes
from tilewise.kernels.cupy.launch import Kernel

MOST_OUTPUTS = 4  # of a group
_PIXELS = 4  # of a thread
_LEAST_CHANNELS, _LEAST_PIXELS = 16, 1 << 16  # for which a product would split its sums among more blocks
_MOST_TAPS = 256  # whose weights fit the shared memory beside each other, of four channels in float64

_thin = Kernel("conv_thin.cu", "conv_thin<{T}>", f"{CORRELATION} q", blocks=2, promises=("LDS.128",))


def applies(it: Correlation) -> bool:
    """Whether a tile of a product would multiply zeros mostly, and there are pixels enough to do without."""
    return (
        it.narrow and prod(it.shape_x) < ELEMENTS_BELOW and it.outputs <= MOST_OUTPUTS
        and it.channels >= _LEAST_CHANNELS and 0 < it.taps <= _MOST_TAPS
        and it.pixels * it.groups >= _LEAST_PIXELS and it.groups <= MOST_BLOCKS
    )  # fmt: skip


def correlate(it: Correlation, x, weight, y, bias, extra, code: int, kept: dict):
    """y = activation(the correlation + bias + extra); bias and extra may be None. kept: for this x."""
    steps = None
    if it.channels_last:
        if "planes" not in kept:
            kept["planes"] = in_planes(x)
        x = kept["planes"]
        steps = image_steps(x.shape, "NCHW")
    grid = ceil_div(it.pixels, THREADS * _PIXELS), 1, it.groups
    _thin(x.place, grid, *operands(it, x, weight, y, bias, extra, code, steps), it.pixels)
