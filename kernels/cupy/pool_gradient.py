"""The gradients of pooling on the GPU; src/pool_gradient.cu says how."""

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


def _run(units: dict, columns: dict, pool: Pool, groups, operands: tuple, include_pad: bool = False):
    windows, place = windows_of(pool, include_pad), operands[0].place
    if groups:
        columns[index_type(pool)](place, blocks_of(groups[0]), *operands, *groups, *windows)
    else:
        units[pool.width > 1, index_type(pool)](place, blocks_of(pool.pixels), *operands, pool.pixels, *windows)


def run_maximum_gradient(pool: Pool, groups, grad, indices, result):
    _run(_maximum_units, _maximum_columns, pool, groups, (grad, indices, result))


def run_average_gradient(pool: Pool, groups, grad, result, divisor, include_pad):
    _run(_average_units, _average_columns, pool, groups, (grad, result, divisor), include_pad)
