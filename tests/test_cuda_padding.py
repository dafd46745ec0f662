"""Padding of the GPU backends, executed on the CPU, against the reference."""

import inspect
from importlib import import_module
from itertools import product

import numpy as np
import pytest
from gradcheck import assert_gradient, numerical_gradient
from test_padding import PADDINGS
from tolerances import assert_close

import tilewise
from tilewise import kernels
from tilewise.kernels.padding import MODES

GPU_BACKENDS = ("cuda", "cupy")
DTYPES = [np.float16, np.float32, np.float64]
# rows shorter and longer than 16 bytes, planes that end within a vector, several blocks, no leading axis
SHAPES = [(2, 3, 5, 6), (1, 5, 5), (7, 5), (2, 1, 2, 33, 35), (3, 5, 8)]


def reference(function, *operands):
    with tilewise.using(backend="reference"):
        return function(*operands)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_padding_and_its_gradient(gpu, rng, mode, dtype):
    for shape, padding in product(SHAPES, PADDINGS):
        x = rng.standard_normal(shape).astype(dtype)
        expected = reference(kernels.pad, x, padding, mode, -1.5)
        y = kernels.pad(x, padding, mode, -1.5)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, expected)
        cotangent = rng.standard_normal(y.shape).astype(dtype)
        grad = kernels.pad_backward(cotangent, shape, padding, mode)
        assert grad.dtype == dtype
        assert_close(grad, reference(kernels.pad_backward, cotangent.astype(float), shape, padding, mode), reduction=25)


def test_limits_and_empty_arrays(gpu):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert kernels.pad(x, ((1, 1), (2, 2)), "reflect").tolist()[0] == [5, 4, 3, 4, 5, 4, 3]
    assert kernels.pad(x, ((2, 2), (3, 3)), "circular").shape == (6, 9)
    circular = reference(kernels.pad_backward, np.ones((6, 9)), (2, 3), ((2, 2), (3, 3)), "circular")
    ones = np.ones((6, 9), np.float32)
    np.testing.assert_array_equal(kernels.pad_backward(ones, (2, 3), ((2, 2), (3, 3)), "circular"), circular)
    assert kernels.pad(x[:, :1], ((0, 0), (7, 0)), "replicate").tolist() == [[0] * 8, [3] * 8]
    single = np.ones((1, 1), np.float32)
    assert kernels.pad_backward(np.ones((4, 6), np.float32), (1, 1), ((1, 2), (3, 2)), "replicate") == 24
    assert kernels.pad(single, 1, "circular").sum() == 9
    for mode in MODES:
        assert kernels.pad(np.zeros((0, 4, 4), np.float32), 1, mode).shape == (0, 6, 6)
        assert kernels.pad_backward(np.zeros((0, 6, 6), np.float32), (0, 4, 4), 1, mode).shape == (0, 4, 4)
        assert kernels.pad(np.zeros((2, 0, 4), np.float32), 0, mode).shape == (2, 0, 4)
    assert kernels.pad(np.zeros((0, 2), np.float32), 1, value=3).tolist() == [[3] * 4] * 2
    assert kernels.pad_backward(np.ones((2, 4), np.float32), (0, 2), 1).shape == (0, 2)


def test_nan_is_copied_and_summed(gpu):
    x = np.array([[np.nan, 1], [2, np.inf]], np.float32)
    assert str(kernels.pad(x, ((0, 0), (0, 1)), "circular").tolist()) == "[[nan, 1.0, nan], [2.0, inf, 2.0]]"
    assert np.isnan(kernels.pad(x, 1, value=np.nan)).sum() == 13
    grad = np.zeros((2, 3), np.float32)
    grad[0, 2] = np.nan
    assert np.argwhere(np.isnan(kernels.pad_backward(grad, (2, 2), ((0, 0), (0, 1)), "replicate"))).tolist() == [[0, 1]]


def test_a_constant_beyond_the_dtype_is_infinity(gpu):
    for dtype in (np.float16, np.float32):
        for value in (1e39, -1e39, 1e300):
            y = kernels.pad(np.zeros((1, 1), dtype), 1, value=value)
            assert y.dtype == dtype
            assert y[0, 0] == np.copysign(np.inf, value)
            assert y[1, 1] == 0
    assert kernels.pad(np.zeros((1, 1)), 1, value=1e300)[0, 0] == 1e300


def test_operands(gpu, rng, torch):
    x = rng.standard_normal((2, 3, 6, 7)).astype(np.float32)
    y = kernels.pad(x, 2, "reflect")
    for view in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(kernels.pad(view, 2, "reflect"), y)
    tensor = kernels.pad(torch.from_numpy(x), 2, "reflect")
    assert type(tensor) is torch.Tensor
    np.testing.assert_array_equal(tensor.numpy(), y)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_the_numerical_one(gpu, rng, mode):
    x, padding = rng.standard_normal((2, 3, 4)), ((2, 1), (1, 3))
    cotangent = rng.standard_normal((2, 6, 8))
    expected = numerical_gradient(lambda x: kernels.pad(x, padding, mode, 2), x, cotangent)
    assert_gradient(kernels.pad_backward(cotangent, x.shape, padding, mode), expected)


def test_the_same_signatures_as_the_reference(gpu):
    from tilewise.kernels.reference import padding as reference

    own = import_module(f"tilewise.kernels.{gpu.backend}.padding")
    for name, function in vars(reference).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            assert inspect.signature(getattr(own, name)) == inspect.signature(function), name
