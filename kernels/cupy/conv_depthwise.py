"""Depthwise convolution on the GPU; src/conv_depthwise.cu says how."""

from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.conv_geometry import Correlation, weight_view
from tilewise.kernels.conv_plan import DEPTHWISE_COLUMNS, DEPTHWISE_PLANES
from tilewise.kernels.cupy.conv_direct import CORRELATION, operands
from tilewise.kernels.cupy.copying import contiguous
from tilewise.kernels.cupy.launch import Kernel

_SOURCE, _THREADS = "conv_depthwise.cu", 128

_planes = {
    (taps, stride): Kernel(
        _SOURCE, f"conv_depthwise_planes<{{T}}, {taps}, {stride}, {results}>", f"{CORRELATION} q", threads=_THREADS
    )
    for (taps, stride), results in DEPTHWISE_PLANES.items()
}
_channels = Kernel(
    _SOURCE, "conv_depthwise_channels<{T}>", f"{CORRELATION} q", threads=_THREADS, promises=("LDG.128", "STG.128")
)


def correlate(it: Correlation, x, weight, y, bias, extra, code: int, kept=None):
    """y = activation(the depthwise correlation + bias + extra); bias and extra may be None."""
    rows, columns = it.rows, it.columns
    if it.channels_last:
        run, weight = _channels, contiguous(weight_view(weight, it, "tg"))
        vectors = it.groups * x.dtype.itemsize // 16
        work = it.images * rows.count * ceil_div(columns.count, DEPTHWISE_COLUMNS) * vectors
    else:
        plane = rows.taps, rows.stride
        run = _planes[plane]
        work = it.images * it.groups * it.outputs * ceil_div(rows.count, DEPTHWISE_PLANES[plane]) * columns.count
    run(x.place, ceil_div(work, _THREADS), *operands(it, x, weight, y, bias, extra, code), work)
