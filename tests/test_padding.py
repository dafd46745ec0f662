"""Padding: the reference against PyTorch, the CPU kernels against the reference, gradients, wrong calls."""

import inspect
from itertools import product

import numpy as np
import pytest
from gradcheck import assert_gradient, numerical_gradient
from tolerances import assert_close

import tilewise
from tilewise import kernels
from tilewise.kernels.padding import MODES

PADDINGS = [0, 1, (2, 0), (0, 3), ((1, 0), (0, 2)), ((3, 2), (1, 4)), ((0, 4), (4, 0))]
SHAPES = [(2, 3, 5, 6), (1, 5, 5), (7, 5), (2, 1, 2, 64, 65)]


def pairs(padding):
    height, width = (padding, padding) if isinstance(padding, int) else padding
    return tuple((side, side) if isinstance(side, int) else side for side in (height, width))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("mode", MODES)
def test_pad_is_pytorchs(torch, rng, backend, mode, dtype):
    for shape, padding in product([(2, 3, 5, 6), (4, 7, 5)], PADDINGS):
        x = rng.standard_normal(shape).astype(dtype)
        (top, bottom), (left, right) = pairs(padding)
        theirs = torch.from_numpy(x).requires_grad_()
        value = 0.25 if mode == "constant" else None
        expected = torch.nn.functional.pad(theirs, (left, right, top, bottom), mode, value)
        y = kernels.pad(x, padding, mode, value or 0)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, expected.detach().numpy())
        cotangent = rng.standard_normal(y.shape).astype(dtype)
        expected.backward(torch.from_numpy(cotangent))
        grad = kernels.pad_backward(cotangent, shape, padding, mode)
        assert grad.dtype == dtype
        assert_close(grad, theirs.grad.numpy(), reduction=25)


def test_tensors_in_tensors_out(torch, rng):
    x = torch.from_numpy(rng.standard_normal((1, 2, 4, 5)))
    y = kernels.pad(x, 2, "reflect")
    torch.testing.assert_close(y, torch.nn.functional.pad(x, (2, 2, 2, 2), "reflect"))
    assert type(kernels.pad_backward(y, x.shape, 2, "reflect")) is torch.Tensor


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("mode", MODES)
def test_cpu_is_the_reference(rng, mode, dtype):
    tall = [(1, 1, 40, 3), (1, 1, 3, 20000), (700, 1, 5, 6), (2, 1, 200, 201), (3, 30, 24), (3, 24, 32)]
    for shape, padding in product(SHAPES + tall, PADDINGS):
        if np.max(padding) > min(shape[-2:]) - (mode == "reflect"):
            continue
        x = rng.standard_normal(shape).astype(dtype)
        with tilewise.using(backend="reference"):
            expected = kernels.pad(x, padding, mode, -1.5)
            cotangent = rng.standard_normal(expected.shape).astype(dtype)
            grad = kernels.pad_backward(cotangent.astype(np.float64), shape, padding, mode)
        with tilewise.using(backend="cpu"):
            np.testing.assert_array_equal(kernels.pad(x, padding, mode, -1.5), expected)
            assert_close(kernels.pad_backward(cotangent, shape, padding, mode), grad, reduction=25, dtype=dtype)


def test_limits_and_empty_arrays(backend):
    x = np.arange(6.0).reshape(2, 3)
    assert kernels.pad(x, ((1, 1), (2, 2)), "reflect").tolist()[0] == [5, 4, 3, 4, 5, 4, 3]
    assert kernels.pad(x, ((2, 2), (3, 3)), "circular").shape == (6, 9)
    assert kernels.pad(x[:, :1], ((0, 0), (7, 0)), "replicate").tolist() == [[0] * 8, [3] * 8]
    for mode in MODES:
        assert kernels.pad(np.zeros((0, 4, 4)), 1, mode).shape == (0, 6, 6)
        assert kernels.pad_backward(np.zeros((0, 6, 6)), (0, 4, 4), 1, mode).shape == (0, 4, 4)
        assert kernels.pad(np.zeros((2, 0, 4)), 0, mode).shape == (2, 0, 4)
    assert kernels.pad(np.zeros((0, 2)), 1, value=3).tolist() == [[3] * 4] * 2
    assert kernels.pad_backward(np.ones((2, 4)), (0, 2), 1).shape == (0, 2)


def test_nan_is_copied_and_summed(backend):
    x = np.array([[np.nan, 1], [2, np.inf]], np.float32)
    assert str(kernels.pad(x, ((0, 0), (0, 1)), "circular").tolist()) == "[[nan, 1.0, nan], [2.0, inf, 2.0]]"
    assert np.isnan(kernels.pad(x, 1, value=np.nan)).sum() == 13
    grad = np.zeros((2, 3), np.float32)
    grad[0, 2] = np.nan
    assert np.argwhere(np.isnan(kernels.pad_backward(grad, (2, 2), ((0, 0), (0, 1)), "replicate"))).tolist() == [[0, 1]]


def test_any_memory_layout(rng, backend):
    from tilewise.kernels.cpu import padding as cpu

    x = rng.standard_normal((2, 3, 6, 7))
    frozen = x.copy()
    frozen.flags.writeable = False
    for dtype, mode in product((np.float64, np.float32), MODES):
        y = kernels.pad(x.astype(dtype), 2, mode)
        grad = kernels.pad_backward(y, x.shape, 2, mode)
        for view in (np.asfortranarray(x), frozen, np.repeat(x, 2, axis=1)[:, ::2]):
            same = view.astype(dtype, copy=False) if dtype == np.float64 else view.astype(dtype, order="K")
            np.testing.assert_array_equal(kernels.pad(same, 2, mode), y)
        np.testing.assert_array_equal(kernels.pad_backward(np.asfortranarray(y), x.shape, 2, mode), grad)
        np.testing.assert_array_equal(kernels.pad_backward(y, list(x.shape), 2, mode), grad)
        large = kernels.pad(x.astype(dtype), 20, mode, 1) if mode in ("constant", "replicate") else None
        assert large is None or kernels.pad_backward(large, x.shape, 20, mode).shape == x.shape
    if backend == "cpu":
        for kernel in (cpu._pad, cpu._gather, cpu._pad_by_table, cpu._gather_by_table):
            assert len(kernel.serial.signatures) == 2


def test_bits_do_not_depend_on_the_thread_count(rng):
    for shape, mode in product([(3, 300, 301), (200, 30, 30), (5000, 5, 6)], ("replicate", "circular")):
        x = rng.standard_normal(shape).astype(np.float32)
        padding = ((5, 3), (4, 6)) if shape[1] == 5 else ((9, 20), (13, 5))
        results = []
        for threads in (1, 2, 3):
            with tilewise.using(backend="cpu", threads=threads):
                y = kernels.pad(x, padding, mode)
                results.append(y.tobytes() + kernels.pad_backward(y, shape, padding, mode).tobytes())
        assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_the_numerical_one(rng, backend, mode):
    x, padding = rng.standard_normal((2, 3, 4)), ((2, 1), (1, 3))
    cotangent = rng.standard_normal((2, 6, 8))
    expected = numerical_gradient(lambda x: kernels.pad(x, padding, mode, 2), x, cotangent)
    assert_gradient(kernels.pad_backward(cotangent, x.shape, padding, mode), expected)


X = np.zeros((2, 3, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, 1), TypeError, "pad: x must be an array, got None"),
        ((X.astype(int), 1), TypeError, "pad: x is int64, which is not supported"),
        ((X[0, 0], 1), ValueError, "pad: x must have at least 2 dimensions"),
        ((X, -1), ValueError, "pad: padding must be at least 0, got -1"),
        ((X, 1.0), TypeError, "pad: padding must be an int, got 1.0"),
        ((X, "same"), ValueError, "pad: padding 'same' is not known here"),
        ((X, (1, 2, 3)), ValueError, "pad: padding must be an int or a pair"),
        ((X, ((1, 2, 3), (1, 1))), ValueError, r"pad: padding must be \(\(top, bottom\), \(left, right\)\)"),
        ((X, 1, "edge"), ValueError, "pad: mode must be one of constant, reflect, replicate, circular, got 'edge'"),
        ((X, 3, "reflect"), ValueError, r"pad: reflect padding of 3 needs a larger height than 3 \(x \(2, 3, 4\)"),
        ((X, (0, 5), "circular"), ValueError, "pad: circular padding of 5 needs a larger width than 4"),
        ((X[:, :0], 1, "replicate"), ValueError, "pad: replicate padding of 1 needs a larger height than 0"),
        ((X, 1, "constant", "0"), TypeError, "pad: value must be a number, got '0'"),
    ],
)
def test_wrong_calls(backend, arguments, error, message):
    with pytest.raises(error, match=message):
        kernels.pad(*arguments)


def test_wrong_backward_calls(backend):
    with pytest.raises(ValueError, match=r"grad must have shape \(2, 5, 6\) for input_shape \(2, 3, 4\), got"):
        kernels.pad_backward(X, (2, 3, 4), 1)
    with pytest.raises(TypeError, match="input_shape must be a tuple of ints, got 3"):
        kernels.pad_backward(X, 3, 1)
    with pytest.raises(TypeError, match=r"input_shape must be an int, got 4\.0"):
        kernels.pad_backward(X, (2, 3, 4.0), 0)
    with pytest.raises(ValueError, match=r"input_shape must have at least 2 dimensions \(..., H, W\), got \(4,\)"):
        kernels.pad_backward(X, (4,), 0)


def test_both_backends_have_the_same_signatures():
    from tilewise.kernels.cpu import padding as cpu
    from tilewise.kernels.reference import padding as reference

    for name in ("pad", "pad_backward"):
        assert inspect.signature(getattr(cpu, name)) == inspect.signature(getattr(reference, name))
