"""3x3 convolution by Winograd's F(4x4, 3x3) in float32 on the GPU; src/conv_winograd.cu says how.

Error: the transforms add numbers of different size, so single results may be off by 1e-5 of the largest; the relative
2-norm is about 2e-6 of sums over 128 channels (an implicit product's: 6e-7), whether a product is float32's or three of
TF32. TF32 alone would lose too much.
"""

from types import SimpleNamespace

from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.conv_geometry import Correlation
from tilewise.kernels.conv_plan import made_of
from tilewise.kernels.conv_winograd_plan import POINTS, is_narrow, tiles_of
from tilewise.kernels.cupy import gemm_plan
from tilewise.kernels.cupy.conv_direct import CORRELATION, operands
from tilewise.kernels.cupy.gemm import multiply
from tilewise.kernels.cupy.gemm_tile import SINGLE
from tilewise.kernels.cupy.launch import Kernel
from tilewise.kernels.gemm_matrices import Matrices
from tilewise.kernels.gemm_plan import MOST_MATRICES

THREADS = 128
_WIDTH = 4  # float32 of 16 bytes
AXES = "10q 10q"


def make(name: str, parameters: str, resident: int, source: str = "conv_winograd.cu") -> Kernel:
    template = f"conv_winograd_{name}<{{T}}>"
    return Kernel(source, template, parameters, threads=THREADS, blocks=resident, dtypes=SINGLE)


_weight = make("weight", f"P P {AXES} 7q q q", 1)
transform_input = make("input", f"P P {AXES} 4q 7q 7qi", 4)
_output = make("output", f"P {CORRELATION} 7qi", 4)


def tf32_is_faster(it: Correlation) -> bool:
    """By an H100, benchmarks/results/gpu: of 64 channels, and not of 96."""
    return is_narrow(it, 96)


def whole(count: int) -> int:
    """Padded to whole vectors."""
    return ceil_div(count, _WIDTH) * _WIDTH


def _shape(it: Correlation) -> tuple[int, int, int]:
    """Of U: matrices, channels, outputs."""
    return it.groups * POINTS, whole(it.channels) if it.channels_last else it.channels, whole(it.outputs)


def _transformed(it: Correlation, weight):
    """U of the weights."""
    shape = _, channels, outputs = _shape(it)
    blocks = ceil_div(it.groups * channels * outputs, THREADS)

    def write(packed):
        _weight(weight.place, blocks, weight, packed, *it.axes, *it.filters, channels, outputs)

    return made_of(weight, "winograd", shape, weight.dtype, write)


def _factors(it: Correlation, packed, values, tiles: int) -> tuple[Matrices, Matrices]:
    """What is multiplied, in the order of the images; tiles: padded."""
    matrices, channels, outputs = packed.shape
    lead = (matrices,)
    if it.channels_last:
        left = Matrices(values, lead, tiles, channels, channels, 1)
        return left, Matrices(packed, lead, channels, outputs, outputs, 1)
    left = Matrices(packed, lead, outputs, channels, 1, outputs)
    return left, Matrices(values, lead, channels, tiles, tiles, 1)


def describe(it: Correlation, dtype, engine) -> str:
    """Which product the largest part takes."""
    shape = _shape(it)
    packed, values = (SimpleNamespace(shape=s, dtype=dtype) for s in (shape, ()))
    left, right = _factors(it, packed, values, whole(tiles_of(it, dtype.itemsize).at_once))
    name, _, tile, *_ = gemm_plan.choose(left, right, min(shape[0], MOST_MATRICES), engine, tf32=False)
    way = "" if name == "tiles" else f"{name}, "
    return f"{shape[0]} products: {way}tiles of {tile.rows} x {tile.columns}"


def correlate(it: Correlation, x, weight, y, bias, extra, code: int, kept=None):
    """y = activation(the correlation + bias + extra); bias and extra may be None."""
    place, tiling = x.place, tiles_of(it, x.dtype.itemsize)
    packed = _transformed(it, weight)
    matrices, channels, outputs = packed.shape
    most = whole(tiling.at_once)
    values, products = (place.empty((matrices, most, n), x.dtype) for n in (channels, outputs))
    for first, count in tiling.parts(it.images):
        tiles = whole(count)
        about = first, count, tiles, tiling.rows, tiling.columns, channels, outputs, it.channels_last
        blocks = (ceil_div(it.groups * tiles * n, THREADS) for n in (channels, outputs))
        transform_input(place, next(blocks), x, values, *it.axes, *it.steps[:4], *it.filters, *about)
        multiply(*_factors(it, packed, values, tiles), (matrices,), products, tf32=False)
        _output(place, next(blocks), products, *operands(it, x, weight, y, bias, extra, code), *about)
