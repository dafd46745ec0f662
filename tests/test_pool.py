"""Pooling: the reference against PyTorch, the CPU kernels against the reference, gradients, NaN, wrong calls."""

import numpy as np
import pytest
from tolerances import assert_close

import tilewise
from tilewise import kernels

LAYOUTS = ("NCHW", "NHWC")
WINDOWS = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0)},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    {"kernel_size": 2, "stride": 3, "ceil_mode": True},
    {"kernel_size": (1, 5), "stride": (3, 1), "padding": (0, 2)},
    {"kernel_size": 5, "stride": 3, "padding": 2, "ceil_mode": True},
    {"kernel_size": 1, "stride": 2},
]
DILATED = [
    {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 2},
    {"kernel_size": 3, "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2), "ceil_mode": True},
]
DIVISORS = [{}, {"count_include_pad": False}, {"divisor_override": 7}]
SIZES = [(2, 3, 8, 8), (1, 2, 13, 11), (3, 1, 5, 17)]
BINS = [1, 3, (2, 5), (7, 1), (16, 19)]


def laid(x, layout):
    """An NCHW array in this layout."""
    return np.ascontiguousarray(x if layout == "NCHW" else np.moveaxis(x, -3, -1))


def plain(y, layout):
    """A result of this layout as NCHW."""
    return np.asarray(y) if layout == "NCHW" else np.moveaxis(np.asarray(y), -1, -3)


def tied(rng, shape, dtype):
    """Few different values, so that most windows have equal maxima."""
    return rng.integers(0, 5, shape).astype(dtype)


# ---------------------------------------------------------------------------------------- the reference against PyTorch


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", WINDOWS + DILATED, ids=str)
def test_reference_max_pool_is_pytorchs(torch, rng, options, layout):
    for size in SIZES:
        for x in (rng.standard_normal(size), tied(rng, size, np.float32)):
            theirs = torch.from_numpy(x).requires_grad_()
            expected, where = torch.nn.functional.max_pool2d(theirs, **options, return_indices=True)
            cotangent = rng.standard_normal(expected.shape).astype(x.dtype)
            expected.backward(torch.from_numpy(cotangent))
            with tilewise.using(backend="reference"):
                only = kernels.max_pool2d(laid(x, layout), **options, layout=layout)
                y, indices = kernels.max_pool2d(laid(x, layout), **options, return_indices=True, layout=layout)
                grad = kernels.max_pool2d_backward(
                    laid(cotangent, layout), indices, laid(x, layout).shape, **options, layout=layout
                )
            assert y.dtype == x.dtype
            assert indices.dtype == np.int64
            np.testing.assert_array_equal(plain(only, layout), expected.detach().numpy())
            np.testing.assert_array_equal(plain(y, layout), expected.detach().numpy())
            np.testing.assert_array_equal(plain(indices, layout), where.numpy())
            assert_close(plain(grad, layout), theirs.grad.numpy(), reduction=25)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("divisor", DIVISORS, ids=str)
@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_reference_avg_pool_is_pytorchs(torch, rng, options, divisor, layout):
    for size in SIZES:
        for dtype in (np.float64, np.float32):
            x = rng.standard_normal(size).astype(dtype)
            theirs = torch.from_numpy(x).requires_grad_()
            expected = torch.nn.functional.avg_pool2d(theirs, **options, **divisor)
            cotangent = rng.standard_normal(expected.shape).astype(dtype)
            expected.backward(torch.from_numpy(cotangent))
            with tilewise.using(backend="reference"):
                y = kernels.avg_pool2d(laid(x, layout), **options, **divisor, layout=layout)
                grad = kernels.avg_pool2d_backward(
                    laid(cotangent, layout), laid(x, layout).shape, **options, **divisor, layout=layout
                )
            assert y.dtype == grad.dtype == dtype
            assert_close(plain(y, layout), expected.detach().numpy(), reduction=25)
            assert_close(plain(grad, layout), theirs.grad.numpy(), reduction=25)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bins", BINS, ids=str)
def test_reference_adaptive_pools_are_pytorchs(torch, rng, bins, layout):
    functional = torch.nn.functional
    for size in SIZES:
        x = rng.standard_normal(size)
        for average in (True, False):
            theirs = torch.from_numpy(x).requires_grad_()
            if average:
                expected = functional.adaptive_avg_pool2d(theirs, bins)
            else:
                expected, where = functional.adaptive_max_pool2d(theirs, bins, return_indices=True)
            cotangent = rng.standard_normal(expected.shape)
            expected.backward(torch.from_numpy(cotangent))
            ours, grad = laid(x, layout), laid(cotangent, layout)
            with tilewise.using(backend="reference"):
                if average:
                    y = kernels.adaptive_avg_pool2d(ours, bins, layout=layout)
                    grad = kernels.adaptive_avg_pool2d_backward(grad, ours.shape, layout=layout)
                else:
                    y, indices = kernels.adaptive_max_pool2d(ours, bins, return_indices=True, layout=layout)
                    only = kernels.adaptive_max_pool2d(ours, bins, layout=layout)
                    grad = kernels.adaptive_max_pool2d_backward(grad, indices, ours.shape, layout=layout)
                    np.testing.assert_array_equal(plain(indices, layout), where.numpy())
                    np.testing.assert_array_equal(only, y)
            assert_close(plain(y, layout), expected.detach().numpy(), reduction=size[2] * size[3])
            assert_close(plain(grad, layout), theirs.grad.numpy(), reduction=16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_unpool_is_pytorchs(torch, rng, layout):
    functional = torch.nn.functional
    for options, output_size in (({"kernel_size": 2}, None), ({"kernel_size": 3, "stride": 2, "padding": 1}, (8, 10))):
        x = rng.standard_normal((2, 3, 8, 10))
        y, where = functional.max_pool2d(torch.from_numpy(x), **options, return_indices=True)
        theirs = y.clone().requires_grad_()
        expected = functional.max_unpool2d(theirs, where, **options, output_size=output_size)
        cotangent = rng.standard_normal(expected.shape)
        expected.backward(torch.from_numpy(cotangent))
        indices = laid(where.numpy(), layout)
        with tilewise.using(backend="reference"):
            ours = kernels.max_unpool2d(
                laid(y.numpy(), layout), indices, **options, output_size=output_size, layout=layout
            )
            grad = kernels.max_unpool2d_backward(laid(cotangent, layout), indices, layout=layout)
        if options["kernel_size"] == 2:  # windows apart: no pixel is written twice
            np.testing.assert_array_equal(plain(ours, layout), expected.detach().numpy())
        np.testing.assert_array_equal(plain(grad, layout), theirs.grad.numpy())


def test_asymmetric_and_same_padding_are_those_of_a_padded_image(torch, rng, backend):
    x = rng.standard_normal((2, 3, 9, 10))
    padded = torch.nn.functional.pad(torch.from_numpy(x), (1, 3, 2, 0), value=-np.inf)
    y = kernels.max_pool2d(x, 4, 2, ((2, 0), (1, 3)))
    np.testing.assert_array_equal(y, torch.nn.functional.max_pool2d(padded, 4, 2).numpy())
    padded = torch.nn.functional.pad(torch.from_numpy(x), (1, 3, 2, 0))
    y = kernels.avg_pool2d(x, 4, 2, ((2, 0), (1, 3)))
    assert_close(y, torch.nn.functional.avg_pool2d(padded, 4, 2).numpy(), reduction=16)
    for padding, sides in (("same", (1, 1, 0, 1)), ("same_lower", (1, 1, 1, 0))):  # 9 rows by 2: one, 10 by 3: two
        y = kernels.avg_pool2d(x, (2, 3), (2, 1), padding)
        padded = torch.nn.functional.pad(torch.from_numpy(x), sides)
        assert y.shape == (2, 3, 5, 10)
        assert_close(y, torch.nn.functional.avg_pool2d(padded, (2, 3), (2, 1)).numpy(), reduction=6)
    np.testing.assert_array_equal(kernels.avg_pool2d(x, 2, padding="valid"), kernels.avg_pool2d(x, 2))
