"""Pooling on the GPU by this backend's kernels; pool_plan.py chooses among them."""

from functools import partial

from tilewise.kernels import pool_plan
from tilewise.kernels.cupy.pool_average import average_of_planes, average_of_rows, run_average
from tilewise.kernels.cupy.pool_columns import average_columns, maximum_columns
from tilewise.kernels.cupy.pool_gradient import run_average_gradient, run_maximum_gradient
from tilewise.kernels.cupy.pool_maximum import run_maximum
from tilewise.kernels.cupy.pool_unpool import max_unpool2d, max_unpool2d_backward  # noqa: F401

HAS_BFLOAT16 = True  # operation.py asks

_KERNELS = pool_plan.PoolKernels(
    run_maximum, run_average, maximum_columns, average_columns, average_of_planes, average_of_rows,
    run_maximum_gradient, run_average_gradient,
)  # fmt: skip
max_pool2d = partial(pool_plan.max_pool2d, _KERNELS)
max_pool2d_backward = partial(pool_plan.max_pool2d_backward, _KERNELS)
adaptive_max_pool2d = partial(pool_plan.adaptive_max_pool2d, _KERNELS)
adaptive_max_pool2d_backward = partial(pool_plan.adaptive_max_pool2d_backward, _KERNELS)
avg_pool2d = partial(pool_plan.avg_pool2d, _KERNELS)
avg_pool2d_backward = partial(pool_plan.avg_pool2d_backward, _KERNELS)
adaptive_avg_pool2d = partial(pool_plan.adaptive_avg_pool2d, _KERNELS)
adaptive_avg_pool2d_backward = partial(pool_plan.adaptive_avg_pool2d_backward, _KERNELS)
