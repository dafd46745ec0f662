"""The weight gradient of a depthwise convolution on the GPU; src/conv_depthwise_weight.cu says how."""

from math import prod

from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.conv_geometry import Correlation
from tilewise.kernels.conv_plan import DEPTHWISE_ROWS, split
from tilewise.kernels.cupy.conv_sums import WEIGHT, add_parts, new_parts, operands
from tilewise.kernels.cupy.launch import Kernel

_THREADS = 128


def _make(taps: int, rows: int, last: bool) -> Kernel:
    sizes = {4: ("float16", "bfloat16", "float32"), 8: ("float64",)}
    dtypes = [dtype for size in sizes if DEPTHWISE_ROWS[taps, size] == rows for dtype in sizes[size]]
    return Kernel(
        "conv_depthwise_weight.cu", f"conv_depthwise_weight<{{T}}, {taps}, {rows}, {str(last).lower()}>",
        f"{WEIGHT} q q", threads=_THREADS, dtypes=dtypes,
    )  # fmt: skip


_kernels = {
    (taps, rows, last): _make(taps, rows, last)
    for taps, rows in sorted({(taps, rows) for (taps, _), rows in DEPTHWISE_ROWS.items()}) for last in (False, True)
}  # fmt: skip


def weight_gradient(it: Correlation, grad, x, shape: tuple[int, ...]):
    """conv2d's gradient with respect to a weight of that shape; `it`: its forward correlation."""
    blocks = ceil_div(shape[0], 32) if it.channels_last else shape[0]
    many, per_part = split(it.pixels, blocks)
    parts = new_parts(grad.place, many, prod(shape), grad.dtype)
    taps = it.rows.taps
    rows = DEPTHWISE_ROWS[taps, parts.dtype.itemsize]
    run, grid = _kernels[taps, rows, it.channels_last], (blocks, many, taps // rows)
    run(grad.place, grid, *operands(it, grad, x, parts), it.pixels, per_part)
    return add_parts(parts, grad.place.empty(shape, grad.dtype))
