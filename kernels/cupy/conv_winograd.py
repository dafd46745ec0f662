"""3x3 convolution by Winograd's F(4x4, 3x3) in float32 on the GPU; src/conv_winograd.cu says how.

Error: the transforms add numbers of different size, so single results may be off by 1e-5 of the largest; the relative
2-norm is about 2e-6 of sums over 128 channels (an implicit product's: 6e-7), whether a product is float32's or three of
TF32. TF32 alone would lose too much.
"""

from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.conv_geometry import Correlation
from tilewise.kernels.conv_plan import made_of
from tilewise.kernels.conv_winograd_plan import POINTS, tiles_of
from tilewise.kernels.cupy.conv_direct import CORRELATION, operands
from tilewise.kernels.cupy.gemm import multiply
from tilewise.kernels.cupy.gemm_tile import SINGLE
from tilewise.kernels.cupy.launch import Kernel
from tilewise.kernels.gemm_matrices import Matrices

_THREADS = 128
_WIDTH = 4  # float32 of 16 bytes
_AXES = "10q 10q"


def _kernel(name: str, parameters: str, resident: int) -> Kernel:
    template = f"conv_winograd_{name}<{{T}}>"
    return Kernel("conv_winograd.cu", template, parameters, threads=_THREADS, blocks=resident, dtypes=SINGLE)


_weight = _kernel("weight", f"P P {_AXES} 7q q q", 1)
_input = _kernel("input", f"P P {_AXES} 4q 7q 7qi", 4)
_output = _kernel("output", f"P {CORRELATION} 7qi", 4)


def _whole(count: int) -> int:
    """Padded to whole vectors."""
    return ceil_div(count, _WIDTH) * _WIDTH


def _transformed(it: Correlation, weight):
    """U of the weights."""
    channels, outputs = _whole(it.channels) if it.channels_last else it.channels, _whole(it.outputs)
    blocks = ceil_div(it.groups * channels * outputs, _THREADS)

    def write(packed):
        _weight(weight.place, blocks, weight, packed, *it.axes, *it.filters, channels, outputs)

    return made_of(weight, "winograd", (it.groups * POINTS, channels, outputs), weight.dtype, write)


def _multiply(it: Correlation, packed, values, tiles: int, products):
    """products = packed and values multiplied, in the order of the images; tiles: padded."""
    matrices, channels, outputs = packed.shape
    lead = (matrices,)
    if it.channels_last:
        left = Matrices(values, lead, tiles, channels, channels, 1)
        right = Matrices(packed, lead, channels, outputs, outputs, 1)
    else:
        left = Matrices(packed, lead, outputs, channels, 1, outputs)
        right = Matrices(values, lead, channels, tiles, tiles, 1)
    multiply(left, right, lead, products, tf32=False)


def correlate(it: Correlation, x, weight, y, bias, extra, code: int, kept=None):
    """y = activation(the correlation + bias + extra); bias and extra may be None."""
    place, tiling = x.place, tiles_of(it, x.dtype.itemsize)
    packed = _transformed(it, weight)
    matrices, channels, outputs = packed.shape
    most = _whole(tiling.at_once * tiling.of_image)
    values, products = (place.empty((matrices, most, n), x.dtype) for n in (channels, outputs))
    for first, count in tiling.parts(it.images):
        tiles = _whole(count)
        about = first, count, tiles, tiling.rows, tiling.columns, channels, outputs, it.channels_last
        blocks = (ceil_div(it.groups * tiles * n, _THREADS) for n in (channels, outputs))
        _input(place, next(blocks), x, values, *it.axes, *it.steps[:4], *it.filters, *about)
        _multiply(it, packed, values, tiles, products)
        _output(place, next(blocks), products, *operands(it, x, weight, y, bias, extra, code), *about)
