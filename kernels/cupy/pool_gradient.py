"""The gradients of pooling on the GPU; src/pool_gradient.cu says how."""

from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.cupy.launch import Kernel, blocks_of
from tilewise.kernels.cupy.pool_windows import INDICES, WINDOWS, index_type, windows_of
from tilewise.kernels.pool_plan import Pool


def _units(name: str, parameters: str) -> dict[tuple[bool, str], Kernel]:
    """For NHWC, by whether units are vectors, and by the index."""
    return {
        (vector, index): Kernel(
            "pool_gradient.cu", f"{name}<{{T}}, {'{N}' if vector else 1}, {index}>", f"{parameters} q {WINDOWS}",
            promises=("LDG.128", "STG.128") if vector else (),
        )
        for vector in (False, True) for index in INDICES
    }  # fmt: skip


def _columns(name: str, parameters: str) -> dict[str, Kernel]:
    """For NCHW, by the index."""
    return {
        index: Kernel(
            "pool_gradient.cu", f"{name}<{{T}}, {index}>", f"{parameters} q q i {WINDOWS}", promises=("STG.128",)
        )
        for index in INDICES
    }


_maximum_units, _maximum_columns = _units("max_pool_backward", "P P P"), _columns("max_pool_backward_columns", "P P P")
_average_units, _average_columns = _units("avg_pool_backward", "P P r"), _columns("avg_pool_backward_columns", "P P r")


def _run(units: dict, columns: dict, pool: Pool, layout: str, operands: tuple, result, include_pad: bool = False):
    windows = windows_of(pool, include_pad)
    if layout == "NCHW":
        width = 16 // result.dtype.itemsize
        across = ceil_div(pool.size[1], width)
        whole = pool.size[1] % width == 0 and result.pointer % 16 == 0
        groups = pool.images * pool.size[0] * across
        columns[index_type(pool)](result.place, blocks_of(groups), *operands, groups, across, whole, *windows)
    else:
        run = units[pool.width > 1, index_type(pool)]
        run(result.place, blocks_of(pool.pixels), *operands, pool.pixels, *windows)


def run_maximum_gradient(pool: Pool, layout: str, grad, indices, result):
    _run(_maximum_units, _maximum_columns, pool, layout, (grad, indices, result), result)


def run_average_gradient(pool: Pool, layout: str, grad, result, divisor, include_pad):
    """divisor: 0 where it depends on the window."""
    _run(_average_units, _average_columns, pool, layout, (grad, result, divisor), result, include_pad)
