"""The gradient of batch normalisation on the GPU; src/batchnorm_gradient.cu says how."""

from functools import partial

from tilewise.kernels.channel_plan import Planes
from tilewise.kernels.cupy.batchnorm_statistics import start_sums, sums_of_channels
from tilewise.kernels.cupy.launch import Kernel

_SOURCE = "batchnorm_gradient.cu"
_MOVES = ("LDG.128", "STG.128")

run_gradient_sums = partial(start_sums, sums_of_channels(_SOURCE, "gradient_sums", "P P P P"))
finish = Kernel(_SOURCE, "batch_norm_backward_finish<{T}>", "P P P P P P q q i")
_planes = {
    training: Kernel(
        _SOURCE, f"batch_norm_backward_planes<{{T}}, {str(training).lower()}>", "P P P P P q q q q i i", promises=_MOVES
    )
    for training in (False, True)
}
_rows = {
    (vector, training): Kernel(
        _SOURCE, f"batch_norm_backward_rows<{{T}}, {'{N}' if vector else 1}, {str(training).lower()}>",
        "P P P P P q q i i", promises=_MOVES if vector else (),
    )
    for vector in (False, True) for training in (False, True)
}  # fmt: skip


def run_gradient(plan, grid, training, grad, x, result, mean, table, numbers):
    run = _planes[training] if isinstance(plan, Planes) else _rows[plan.width > 1, training]
    run(x.place, grid, grad, x, result, mean, table, *numbers)
