"""Convolution without tiles on the GPU; src/conv_direct.cu says how."""

from math import prod

from tilewise.kernels.activation_plan import LEAKY_SLOPE
from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.conv_geometry import Correlation
from tilewise.kernels.conv_plan import MOST_BLOCKS
from tilewise.kernels.cupy.launch import Kernel, blocks_of, engine_of

# x, weight, y, Epilogue, both axes, steps of x and y, Filters
CORRELATION = "P P P PPir 10q 10q 4q 4q 7q"
FEW_CHANNELS = 4  # up to here a product finds no vectors of channels, and a tap is few steps of its sum
_THREADS, _PIXELS = 256, 4
ELEMENTS_BELOW = 1 << 31  # of x, or of two images of y: places in it fit 32 bits
_ROUNDS = 2  # of blocks that a multiprocessor has at a time: each goes on with the weights that it has

_direct = Kernel("conv_direct.cu", "conv_direct<{T}>", f"{CORRELATION} q i")
_few = Kernel(
    "conv_direct.cu", "conv_direct_few<{T}>", f"{CORRELATION} q i i i", threads=_THREADS, blocks=2,
    promises=("LDS.128", "STG.128"),
)  # fmt: skip


def operands(it: Correlation, x, weight, y, bias, extra, code: int, steps=None, channels: int = 0) -> tuple:
    """What CORRELATION stands for. steps, channels: of an x that lies in another order."""
    return (
        x, weight, y, bias, extra, code, LEAKY_SLOPE, *it.axes, *(steps or it.steps[:4]), *it.steps[4:],
        it.groups, it.outputs, channels or it.channels, *it.filters[3:],
    )  # fmt: skip


def outputs_of_few(dtype) -> int:
    """Outputs that a thread of conv_direct_few sums."""
    return 8 if dtype.itemsize == 8 else 16


def is_few(it: Correlation, dtype) -> bool:
    """Whether conv_direct_few is for it: few channels, and enough outputs for a thread."""
    outputs = outputs_of_few(dtype)
    return (
        it.narrow and max(prod(it.shape_x), 2 * prod(it.shape_y[1:])) < ELEMENTS_BELOW and it.channels <= FEW_CHANNELS
        and 2 * it.outputs >= outputs and it.taps > 0 and max(it.groups, ceil_div(it.outputs, outputs)) <= MOST_BLOCKS
    )  # fmt: skip


def correlate(it: Correlation, x, weight, y, bias, extra, code: int, kept=None):
    """y = activation(the correlation + bias + extra); bias and extra may be None."""
    given = operands(it, x, weight, y, bias, extra, code)
    if is_few(it, x.dtype):
        outputs = outputs_of_few(x.dtype)
        lanes = next(lanes for lanes in (1, 2, 4) if lanes == 4 or it.outputs <= lanes * outputs)
        across = ceil_div(it.outputs, outputs * lanes)
        most = ceil_div(_ROUNDS * _few.blocks * engine_of(x.place).multiprocessors, across * it.groups)
        tiles = ceil_div(it.pixels, _THREADS // lanes * _PIXELS)
        _few(x.place, (min(tiles, most), across, it.groups), *given, it.pixels, tiles, lanes, it.channels_last)
    else:
        _direct(x.place, blocks_of(it.size), *given, it.size, it.channels_last)
