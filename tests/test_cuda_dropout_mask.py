"""Dropout of the GPU backends, executed on the CPU: the reference's bits."""

import inspect
from importlib import import_module

import numpy as np
import pytest

import tilewise
from tilewise.kernels import dropout, dropout_backward
from tilewise.kernels.reference import dropout_mask as reference

GPU_BACKENDS = ("cuda", "cupy")
DTYPES = [np.float16, np.float32, np.float64]
# around a vector of 16 bytes, a block of 256 threads, and more than the grid takes at once
SIZES = (0, 1, 3, 7, 8, 9, 255, 257, 4 * 257, 70_001)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_references_bits(gpu, rng, dtype):
    for size in SIZES:
        x = rng.standard_normal(size).astype(dtype)
        for p, seed, call in ((0.3, 0, 0), (1.0, 5, 1), (0.9, 2**64 - 1, 2**40 + 7)):
            with tilewise.using(backend="reference"):
                expected = dropout(x, p, seed=seed, call=call)
            y = dropout(x, p, seed=seed, call=call)
            assert y.dtype == dtype
            assert y.tobytes() == expected.tobytes(), (size, p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skip", [0, 1])
def test_arrays_that_begin_anywhere(gpu, rng, skip, dtype):
    from tilewise.kernels.device_arrays import DeviceArray, HostPlace

    place, x = HostPlace(gpu), rng.standard_normal(777).astype(dtype)
    whole = place.copy_in(np.concatenate([np.zeros(skip, dtype), x]))
    there = DeviceArray(place, whole.pointer + skip * x.itemsize, x.shape, x.dtype, whole)
    ours = import_module(f"tilewise.kernels.{gpu.backend}.dropout_mask")
    y = place.copy_out(ours.dropout(there, threshold=2**31, scale=2.0, seed=-3, call=4))
    kept = reference.numbers(777, -3, 4) >= 2**31
    np.testing.assert_array_equal(y, np.where(kept, 2 * x, 0 * x))


def test_gradient_layouts_and_out(gpu, rng):
    grad = rng.standard_normal((6, 50)).astype(np.float32)
    with tilewise.using(backend="reference"):
        expected = dropout_backward(grad, 0.4, seed=1, call=2)
    for view in (grad, np.asfortranarray(grad), np.repeat(grad, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(dropout_backward(view, 0.4, seed=1, call=2), expected)
    assert dropout_backward(grad, 0.4, seed=1, call=2, out=grad) is grad
    np.testing.assert_array_equal(grad, expected)


def test_the_same_signatures_as_the_reference(gpu):
    ours = import_module(f"tilewise.kernels.{gpu.backend}.dropout_mask")
    for name in ("dropout", "dropout_backward"):
        assert inspect.signature(getattr(ours, name)) == inspect.signature(getattr(reference, name))
