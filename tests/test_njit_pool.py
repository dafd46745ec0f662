"""Pooling inside @njit: the bits of the Python call, over layouts, windows and dtypes."""

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError

import tilewise as t


@njit
def pooled(x, kernel, stride, padding, ceil_mode, counted):
    return (
        t.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode),
        *t.max_pool2d(x, kernel, stride, padding, 1, ceil_mode, return_indices=True),
        t.avg_pool2d(x, kernel, stride, padding, ceil_mode, counted),
    )


@njit
def pooled_nhwc(x, kernel, stride, padding, ceil_mode, counted):
    return (
        t.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode, layout="NHWC"),
        *t.max_pool2d(x, kernel, stride, padding, 1, ceil_mode, return_indices=True, layout="NHWC"),
        t.avg_pool2d(x, kernel, stride, padding, ceil_mode, counted, layout="NHWC"),
    )


def expected(x, kernel, stride, padding, ceil_mode, counted, layout):
    window = (x, kernel, stride, padding)
    return (
        t.max_pool2d(*window, ceil_mode=ceil_mode, layout=layout),
        *t.max_pool2d(*window, ceil_mode=ceil_mode, return_indices=True, layout=layout),
        t.avg_pool2d(*window, ceil_mode=ceil_mode, count_include_pad=counted, layout=layout),
    )


def same(results, wanted):
    for result, right in zip(results, wanted, strict=True):
        assert result.dtype == right.dtype
        np.testing.assert_array_equal(result, right)


@pytest.mark.parametrize("function", [pooled, pooled_nhwc])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_windows(rng, function, dtype):
    layout = "NHWC" if function is pooled_nhwc else "NCHW"
    for shape in ((2, 6, 13, 17), (1, 1, 40, 8), (1, 2, 40, 40), (0, 3, 9, 9)):  # 2x2 in NCHW by quads: 40 x 40
        x = rng.standard_normal(shape).astype(dtype)
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if layout == "NHWC" else x
        for window in ((2, 2, 0), (3, 2, 1), (3, 1, 1), (5, 3, 2), (4, 4, 0)):
            for ceil_mode, counted in ((False, True), (True, False)):
                options = (*window, ceil_mode, counted)
                same(function(x, *options), expected(x, *options, layout))
    image = x = rng.standard_normal((4, 9, 8)).astype(dtype)
    same(function(image, 3, 2, 1, False, True), expected(image, 3, 2, 1, False, True, layout))


@njit
def other_forms(x):
    return (
        t.max_pool2d(x, (3, 2)),
        t.max_pool2d(x, 3, padding=((1, 0), (0, 1)), stride=1, dilation=(2, 1)),
        t.avg_pool2d(x, 3, 2, padding="same"),
        t.avg_pool2d(x, 2, divisor_override=3),
        t.adaptive_avg_pool2d(x, 1),
        t.adaptive_avg_pool2d(x, (3, 5)),
        t.adaptive_max_pool2d(x, 4),
        *t.adaptive_max_pool2d(x, (2, 3), True),
    )


def test_other_forms_of_the_options(rng):
    x = rng.standard_normal((2, 10, 20, 7)).astype(np.float32)[:, :, ::2]
    x[0, 0, 3, 3] = np.nan
    same(other_forms(x), other_forms.py_func(x))


@njit
def gradients(grad, indices, shape):
    return t.max_pool2d_backward(grad, indices, shape, 3, 2, 1)


def test_gradient_of_maxima(rng):
    for shape in ((2, 5, 12, 14), (5, 12, 14)):
        x = rng.standard_normal(shape).astype(np.float32)
        y, indices = t.max_pool2d(x, 3, 2, 1, return_indices=True)
        grad = rng.standard_normal(y.shape).astype(np.float32)
        same([gradients(grad, indices, shape)], [t.max_pool2d_backward(grad, indices, shape, 3, 2, 1)])
    with pytest.raises(ValueError, match=r"indices must lie in 0 to 167 \(a plane of 12 x 14\), got 0 to 500"):
        gradients(grad, np.full_like(indices, 500) * (indices > 0), shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((2, 2, 0, False, True), None),
        ((0, 2, 0, False, True), "max_pool2d: kernel_size must be at least 1"),
        ((2, 0, 0, False, True), "max_pool2d: stride must be at least 1"),
        ((2, 2, -1, False, True), "max_pool2d: padding must be at least 0"),
        ((9, 2, 0, False, True), "max_pool2d: a window of 9 .kernel_size 9, dilation 1. does not fit into the padded"),
        ((2, 1, 3, False, True), "max_pool2d: the window that starts at -3 .*finds no input, only padding"),
    ],
)
def test_wrong_windows_raise(options, message):
    x = np.ones((1, 1, 8, 8), np.float32)
    if message is None:
        pooled(x, *options)
        return
    for call in (lambda: pooled(x, *options), lambda: pooled.py_func(x, *options)):
        with pytest.raises(ValueError, match=message if call.__name__ else "max_pool2d"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: t.max_pool2d(x, 2, layout="CHWN"), "max_pool2d: layout must be one of 'NCHW', 'NHWC'"),
        (lambda x: t.max_pool2d(x, 2, return_indices=x.size > 3), "return_indices must be written in the call"),
        (lambda x: t.max_pool2d(x, (1, 2, 3)), "kernel_size must be an int or a pair"),
        (lambda x: t.avg_pool2d(x, 2, 1.0), "avg_pool2d: stride must be an int or a pair"),
        (lambda x: t.avg_pool2d(x, 2, padding="full"), "padding must be one of 'valid', 'same', 'same_lower'"),
        (lambda x: t.avg_pool2d(x[0, 0], 2), "x must have 4 dimensions .N, C, H, W., or 3 without the batch"),
        (lambda x: t.adaptive_avg_pool2d(x, None), "output_size must be an int or a pair"),
    ],
    ids=lambda value: value if isinstance(value, str) else "call",
)
def test_wrong_calls_are_typing_errors_that_say_what_would_be_right(call, message):
    with pytest.raises(TypingError, match=message):
        njit(call)(np.ones((1, 1, 4, 4), np.float32))
