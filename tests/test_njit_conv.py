"""Convolution inside @njit: the Python call's result, over layouts, windows, groups, dtypes and algorithms."""

import numpy as np
import pytest
from numba import njit, prange
from numba.core.errors import TypingError

import tilewise as t


@njit
def convolved(x, weight, bias, stride, padding, dilation, groups):
    return t.conv2d(x, weight, bias, stride, padding, dilation, groups, activation="relu")


@njit
def convolved_nhwc(x, weight, bias, stride, padding, dilation, groups):
    return t.conv2d(x, weight, bias, stride, padding, dilation, groups, activation="relu", layout="NHWC")


@njit
def by_winograd(x, weight):
    return t.conv2d(x, weight, padding=1, algorithm="winograd")


@njit
def other_forms(x, weight, y):
    return (
        t.conv2d(x, weight, padding="same", stride=2), t.conv2d(x, weight, None, (2, 1), ((1, 0), (0, 2))),
        t.conv2d(x, weight, padding="valid", algorithm="direct"), t.conv2d(x, weight, algorithm="gemm", dilation=2),
        t.conv2d(x, weight, padding=1, add=y, activation="tanh"),
    )  # fmt: skip


# (batch, channels, height, width), outputs, kernel, stride, padding, dilation, groups
CASES = [
    ((2, 3, 17, 19), 8, 7, 2, 3, 1, 1),
    ((2, 16, 14, 13), 24, 3, 1, 1, 1, 1),
    ((1, 8, 9, 9), 5, 5, 1, 2, 2, 1),
    ((3, 64, 14, 14), 32, 1, 1, 0, 1, 1),
    ((2, 64, 13, 14), 32, 1, 2, 0, 1, 1),
    ((2, 8, 12, 12), 16, 3, 2, 1, 1, 2),
    ((2, 6, 11, 11), 6, 3, 1, 1, 1, 6),
    ((1, 1, 4, 4), 1, 3, 1, 1, 1, 1),
    ((0, 4, 6, 6), 4, 3, 1, 1, 1, 1),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_convolution(rng, dtype, layout):
    for shape, outputs, kernel, *options in CASES:
        x = rng.standard_normal(shape).astype(dtype)
        weight = rng.standard_normal((outputs, shape[1] // options[-1], kernel, kernel)).astype(dtype)
        bias = rng.standard_normal(outputs).astype(dtype)
        function = convolved
        if layout == "NHWC":
            function, x = convolved_nhwc, np.ascontiguousarray(x.transpose(0, 2, 3, 1))
        result = function(x, weight, bias, *options)
        wanted = t.conv2d(x, weight, bias, *options, activation="relu", layout=layout)
        rtol = 1e-4 if dtype == np.float32 else 1e-12
        np.testing.assert_allclose(result, wanted, rtol=rtol, atol=rtol)
        assert result.dtype == wanted.dtype


def test_the_same_algorithm_gives_the_same_bits(rng):
    cases = ((2, 5, 20, 21), 24, 5, 2), ((8, 64, 28, 28), 64, 3, 1), ((2, 64, 16, 16), 32, 1, 0)
    for shape, outputs, kernel, padding in cases:
        x = rng.standard_normal(shape).astype(np.float32)
        weight = rng.standard_normal((outputs, shape[1], kernel, kernel)).astype(np.float32)
        bias = rng.standard_normal(outputs).astype(np.float32)
        wanted = t.conv2d(x, weight, bias, padding=padding, activation="relu")
        np.testing.assert_array_equal(convolved(x, weight, bias, 1, padding, 1, 1), wanted)
    weight = rng.standard_normal((24, 5, 3, 3)).astype(np.float32)
    x = rng.standard_normal((2, 10, 16, 16)).astype(np.float32)[:, ::2]
    np.testing.assert_array_equal(by_winograd(x, weight), t.conv2d(x, weight, padding=1, algorithm="winograd"))


def test_other_forms_of_the_options(rng):
    x = rng.standard_normal((3, 12, 11)).astype(np.float32)
    weight = rng.standard_normal((9, 3, 3, 3)).astype(np.float32)
    add = rng.standard_normal((9, 12, 11)).astype(np.float32)
    for result, wanted in zip(other_forms(x, weight, add), other_forms.py_func(x, weight, add), strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-4)


@njit(parallel=True)
def image_by_image(x, weight, bias, y):
    for i in prange(x.shape[0]):
        y[i] = t.max_pool2d(t.conv2d(x[i], weight, bias, 1, 1, 1, 1, activation="relu"), 2)


def test_inside_prange(rng):
    x = rng.standard_normal((6, 16, 12, 12)).astype(np.float32)
    weight, bias = rng.standard_normal((8, 16, 3, 3)).astype(np.float32), np.ones(8, np.float32)
    y = np.empty((6, 8, 6, 6), np.float32)
    image_by_image(x, weight, bias, y)
    wanted = [t.max_pool2d(t.conv2d(image, weight, bias, padding=1, activation="relu"), 2) for image in x]
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)


def test_wrong_shapes_raise_what_the_python_call_raises():
    x, weight, bias = np.ones((2, 6, 8, 8), np.float32), np.ones((4, 6, 3, 3), np.float32), np.ones(4, np.float32)
    wrong = [
        ((x, weight[:, :5], bias, 1, 0, 1, 1), r"conv2d: weight expects 5 channels per group but x has 6 \(x \(2, 6"),
        ((x, weight, bias[:3], 1, 0, 1, 1), r"conv2d: bias must have shape \(4,\), one value per output channel, got"),
        ((x, weight, bias, 1, 0, 1, 4), "conv2d: groups=4 does not divide the 6 channels of x"),
        ((x, weight, bias, 0, 0, 1, 1), "conv2d: stride must be at least 1, got"),
        ((x, weight, bias, 1, -1, 1, 1), "conv2d: padding must be at least 0, got"),
        ((x, weight, bias, 1, 0, 5, 1), "conv2d: the kernel spans"),
    ]
    for arguments, message in wrong:
        for function in (convolved, convolved.py_func):
            with pytest.raises(ValueError, match=message):
                function(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: t.conv2d(x, x, algorithm="depthwise"), "algorithm 'depthwise' is not supported inside @njit"),
        (lambda x: t.conv2d(x, x, algorithm="fft"), "algorithm must be one of 'auto', 'direct', 'gemm', 'winograd'"),
        (lambda x: t.conv2d(x, x, out=x), "conv2d: out is not supported inside @njit"),
        (lambda x: t.conv2d(x, x, stride=1.5), "conv2d: stride must be an int or a pair"),
        (lambda x: t.conv2d(x, x, groups=None), "conv2d: groups must be an int"),
        (lambda x: t.conv2d(x, x, padding="half"), "padding must be one of 'valid', 'same', 'same_lower'"),
        (lambda x: t.conv2d(x, x[0]), "conv2d: weight must have 4 dimensions, got 3"),
        (lambda x: t.conv2d_backward(x, x, x), "conv2d_backward: cannot be called inside @njit; call it from Python"),
    ],
    ids=lambda value: value if isinstance(value, str) else "call",
)
def test_wrong_calls_are_typing_errors_that_say_what_would_be_right(call, message):
    with pytest.raises(TypingError, match=message):
        njit(call)(np.ones((2, 2, 3, 3), np.float32))
