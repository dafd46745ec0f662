"""Optimisers' updates of the GPU backends, executed on the CPU."""

from importlib import import_module

import numpy as np
import pytest
from test_optim import DTYPES, STEPS, arrays, check_step

from tilewise.kernels.device_arrays import DeviceArray, host_place

GPU_BACKENDS = ("cuda", "cupy")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", STEPS)
def test_steps(gpu, rng, case, dtype):
    for size in (0, 1, 8, 1030):
        check_step(rng, case, dtype, (size,))
    check_step(rng, case, dtype, (6, 8), lambda a: a[::2, ::-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_that_begin_anywhere_give_the_same_bits(gpu, rng, dtype):
    optim = import_module(f"tilewise.kernels.{gpu.backend}.optim")
    place, results = host_place(gpu.backend), []
    given = arrays(rng, dtype, ("mean", "square"), 65)
    numbers = {"first": 0.9, "second": 0.99, "eps": 1e-8, "weight_decay": 0.1, "rate": 0.1, "scale": 1.5, "kept": 1.0}
    for skipped in (0, 1):
        views = []
        for array in given:
            memory = place.copy_in(np.concatenate([np.zeros(skipped, dtype), array]))
            pointer = memory.pointer + skipped * array.itemsize
            views.append(DeviceArray(place, pointer, array.shape, array.dtype, memory.owner))
        optim.adam_step(*views, **numbers)
        results.append(
            [
                place.copy_out(DeviceArray(place, v.owner.pointer, (65 + skipped,), v.dtype, v.owner))[skipped:]
                for v in views
            ]
        )
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
