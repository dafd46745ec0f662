"""Activations in numba.cuda, executed on the CPU, against the reference."""

import numpy as np
import pytest
from tolerances import assert_close

import tilewise
from tilewise import kernels

ELEMENTWISE = {"relu": {}, "leaky_relu": {"negative_slope": 0.2}, "sigmoid": {}, "tanh": {}}
DTYPES = [np.float16, np.float32, np.float64]
# around a vector of 16 bytes, a block of 256 threads, and more than the grid takes at once
SIZES = (1, 7, 8, 9, 255, 257, 4 * 257, 70_001)


def reference(name, *operands, **options):
    with tilewise.using(backend="reference"):
        return getattr(kernels, name)(*operands, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*ELEMENTWISE, "step", "sign"])
def test_elementwise(gpu, rng, name, size, dtype):
    x = (4 * rng.standard_normal(size)).astype(dtype)
    special = np.array([0, np.nan, -np.inf], dtype)
    x[: min(size, 3)] = special[: min(size, 3)]
    options = ELEMENTWISE.get(name, {})
    y = getattr(kernels, name)(x, **options)
    assert y.dtype == dtype
    assert_close(y, reference(name, x.astype(np.float64), **options))
