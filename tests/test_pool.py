"""Pooling: the reference against PyTorch, gradients, NaN and Inf, wrong calls; test_pool_cpu.py has the kernels."""

import numpy as np
import pytest
from gradcheck import assert_gradient, numerical_gradient
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
    # here the last window would start beyond the image and the padding before it, and is dropped
    {"kernel_size": 1, "stride": 2, "ceil_mode": True},
    {"kernel_size": 2, "stride": 2, "padding": 1, "ceil_mode": True},
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
            np.testing.assert_array_equal(plain(indices, layout), np.asarray(where))
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
                expected, where = functional.adaptive_avg_pool2d(theirs, bins), None
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
                    np.testing.assert_array_equal(plain(indices, layout), np.asarray(where))
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


# --------------------------------------------------------------------------------------------------- both backends


@pytest.mark.parametrize("layout", LAYOUTS)
def test_worked_numbers(backend, layout):
    x = laid(np.array([[[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]]), layout)
    y, indices = kernels.max_pool2d(x, 2, return_indices=True, layout=layout)
    assert plain(y, layout).tolist() == [[[6, 8]]]
    assert plain(indices, layout).tolist() == [[[5, 7]]]
    y = kernels.avg_pool2d(x, 2, ceil_mode=True, layout=layout)
    assert plain(y, layout).tolist() == [[[3.5, 5.5], [9.5, 11.5]]]
    y = kernels.adaptive_avg_pool2d(x, (2, 1), layout=layout)  # rows 0 and 1, rows 1 and 2
    assert plain(y, layout).tolist() == [[[4.5], [8.5]]]
    assert kernels.adaptive_avg_pool2d(x, (None, 2), layout=layout).size == 6
    y = kernels.max_unpool2d(laid(np.array([[[6.0, 8]]]), layout), indices, 2, output_size=(3, 4), layout=layout)
    assert plain(y, layout).tolist() == [[[0, 0, 0, 0], [0, 6, 0, 8], [0, 0, 0, 0]]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [WINDOWS[4], WINDOWS[5], WINDOWS[6]], ids=str)
def test_gradients_of_windows(rng, backend, options, layout):
    x = laid(rng.permutation(2 * 2 * 5 * 6).reshape(2, 2, 5, 6) * 0.1, layout)  # no ties, so differentiable
    options = {**options, "layout": layout}
    y, indices = kernels.max_pool2d(x, **options, return_indices=True)
    cotangent = rng.standard_normal(y.shape)
    expected = numerical_gradient(lambda x: kernels.max_pool2d(x, **options), x, cotangent)
    assert_gradient(kernels.max_pool2d_backward(cotangent, indices, x.shape, **options), expected)
    for divisor in DIVISORS:
        expected = numerical_gradient(lambda x, d=divisor: kernels.avg_pool2d(x, **options, **d), x, cotangent)
        assert_gradient(kernels.avg_pool2d_backward(cotangent, x.shape, **options, **divisor), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_bins_and_unpooling(rng, backend, layout):
    x = laid(rng.permutation(2 * 5 * 6).reshape(2, 5, 6) * 0.1, layout)
    for bins in (1, (2, 4), (7, 3)):
        y, indices = kernels.adaptive_max_pool2d(x, bins, True, layout=layout)
        cotangent = rng.standard_normal(y.shape)
        expected = numerical_gradient(lambda x, b=bins: kernels.adaptive_max_pool2d(x, b, layout=layout), x, cotangent)
        assert_gradient(kernels.adaptive_max_pool2d_backward(cotangent, indices, x.shape, layout=layout), expected)
        expected = numerical_gradient(lambda x, b=bins: kernels.adaptive_avg_pool2d(x, b, layout=layout), x, cotangent)
        assert_gradient(kernels.adaptive_avg_pool2d_backward(cotangent, x.shape, layout=layout), expected)
    y, indices = kernels.max_pool2d(x, 2, return_indices=True, layout=layout)
    cotangent = rng.standard_normal(x.shape)

    def unpool(y):
        return kernels.max_unpool2d(y, indices, 2, output_size=(5, 6), layout=layout)

    expected = numerical_gradient(unpool, y, cotangent)
    assert_gradient(kernels.max_unpool2d_backward(cotangent, indices, layout=layout), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_wins_and_its_last_index_is_pytorchs(torch, rng, backend, dtype, layout):
    x = rng.integers(0, 9, (2, 3, 9, 40)).astype(dtype)
    x[rng.random(x.shape) < 0.2] = np.nan
    x[rng.random(x.shape) < 0.2] = -np.inf
    x[rng.random(x.shape) < 0.1] = np.inf
    x[1, 2] = -np.inf  # padding must not win even here
    for options in ({"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": (2, 3), "stride": 1}):
        expected, where = torch.nn.functional.max_pool2d(torch.from_numpy(x), **options, return_indices=True)
        y, indices = kernels.max_pool2d(laid(x, layout), **options, return_indices=True, layout=layout)
        np.testing.assert_array_equal(plain(y, layout), expected.numpy())
        np.testing.assert_array_equal(plain(indices, layout), np.asarray(where))
        y = kernels.max_pool2d(laid(x, layout), **options, layout=layout)
        np.testing.assert_array_equal(plain(y, layout), expected.numpy())
    expected, where = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(x), (4, 7), return_indices=True)
    y, indices = kernels.adaptive_max_pool2d(laid(x, layout), (4, 7), True, layout=layout)
    np.testing.assert_array_equal(plain(y, layout), expected.numpy())
    np.testing.assert_array_equal(plain(indices, layout), np.asarray(where))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_averages_keep_nan_and_inf_in_their_windows(backend, layout):
    x = np.ones((1, 1, 9, 40))
    x[0, 0, 2, 3], x[0, 0, 6, 30] = np.nan, np.inf
    y = plain(kernels.avg_pool2d(laid(x, layout), 3, 2, 1, layout=layout), layout)[0, 0]
    assert np.argwhere(np.isnan(y)).tolist() == [[1, 1], [1, 2]]
    assert np.argwhere(np.isinf(y)).tolist() == [[3, 15]]
    g = np.zeros((1, 1, 5, 20))
    g[0, 0, 2, 7] = np.nan
    grad = plain(kernels.avg_pool2d_backward(laid(g, layout), laid(x, layout).shape, 3, 2, 1, layout=layout), layout)
    assert np.argwhere(np.isnan(grad[0, 0])).tolist() == [[h, w] for h in (3, 4, 5) for w in (13, 14, 15)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_batch_gives_an_empty_result(backend, layout):
    x = np.empty((0, 2, 6, 6) if layout == "NCHW" else (0, 6, 6, 2), np.float32)
    y, indices = kernels.max_pool2d(x, 3, return_indices=True, layout=layout)
    assert y.shape == indices.shape == ((0, 2, 2, 2))
    assert kernels.max_pool2d(x, 3, layout=layout).shape == y.shape
    assert kernels.max_pool2d_backward(y, indices, x.shape, 3, layout=layout).shape == x.shape
    assert kernels.avg_pool2d(x, 3, layout=layout).shape == y.shape
    assert kernels.avg_pool2d_backward(y, x.shape, 3, layout=layout).shape == x.shape
    assert kernels.adaptive_avg_pool2d(x, 2, layout=layout).shape == y.shape
    assert kernels.adaptive_avg_pool2d_backward(y, x.shape, layout=layout).shape == x.shape
    assert kernels.adaptive_max_pool2d(x, 2, True, layout=layout)[1].shape == y.shape
    assert kernels.max_unpool2d(y, indices, 3, layout=layout).shape == x.shape
    assert kernels.max_unpool2d_backward(x, indices, layout=layout).shape == y.shape


def test_torch_tensors_in_and_out(torch, backend):
    x = torch.randn(2, 3, 8, 8)
    y, indices = kernels.max_pool2d(x, 2, return_indices=True)
    expected, where = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
    assert isinstance(y, torch.Tensor)
    assert torch.equal(y, expected)
    assert torch.equal(indices, where)
    unpooled = kernels.max_unpool2d(y, indices, 2)
    assert torch.equal(unpooled, torch.nn.functional.max_unpool2d(y, where, 2))
    assert isinstance(kernels.avg_pool2d_backward(y, x.shape, 2), torch.Tensor)
    nhwc = x.permute(0, 2, 3, 1)  # a strided tensor
    assert torch.equal(kernels.max_pool2d(nhwc, 2, layout="NHWC"), expected.permute(0, 2, 3, 1))


# ----------------------------------------------------------------------------------------------------- wrong calls

IMAGE = np.zeros((1, 2, 4, 6), np.float32)
POOLED = np.zeros((1, 2, 2, 3), np.float32)
INDICES = np.zeros((1, 2, 2, 3), np.int64)

WRONG = [
    (ValueError, "kernel_size must be at least 1, got 0", lambda k: k.max_pool2d(IMAGE, 0)),
    (ValueError, "padding must be at least 0, got -1", lambda k: k.max_pool2d(IMAGE, 2, padding=-1)),
    (ValueError, "stride must be at least 1, got 0", lambda k: k.avg_pool2d(IMAGE, 2, 0)),
    (TypeError, "stride must be an int, got 1.5", lambda k: k.max_pool2d(IMAGE, 2, 1.5)),
    (TypeError, "ceil_mode must be True or False, got 'NHWC'", lambda k: k.max_pool2d(IMAGE, 2, 1, 0, 1, "NHWC")),
    (TypeError, "return_indices must be True or False", lambda k: k.adaptive_max_pool2d(IMAGE, 2, 3)),
    (TypeError, "x must be a NumPy array", lambda k: k.max_pool2d([[1.0]], 1)),
    (TypeError, "max_pool2d: x must be an array, got None", lambda k: k.max_pool2d(None, 1)),
    (TypeError, "avg_pool2d: x is int64", lambda k: k.avg_pool2d(INDICES, 2)),
    (TypeError, "max_pool2d: x is bool", lambda k: k.max_pool2d(IMAGE > 0, 2)),
    (ValueError, "x must have 4 dimensions", lambda k: k.max_pool2d(IMAGE[0, 0], 2)),
    (ValueError, "at least 1 channel", lambda k: k.max_pool2d(IMAGE[:, :0], 2)),
    (ValueError, 'layout must be "NCHW" or "NHWC"', lambda k: k.max_pool2d(IMAGE, 2, layout="CHW")),
    (ValueError, r"a window of 5 .*does not fit into the padded height of 4", lambda k: k.max_pool2d(IMAGE, 5)),
    (ValueError, r"a window of 7 \(kernel_size 3, dilation 3\)", lambda k: k.max_pool2d(IMAGE, 3, dilation=3)),
    (ValueError, "starts at -2 along the height finds no input", lambda k: k.max_pool2d(IMAGE, 2, padding=2)),
    (
        ValueError,
        "starts at 6 along the width finds no input",
        lambda k: k.avg_pool2d(IMAGE, 2, padding=((0, 0), (0, 2))),
    ),
    (ValueError, "starts at -1 along the height", lambda k: k.max_pool2d(IMAGE[:, :, :1], 2, 1, (1, 0), (2, 1))),
    (ValueError, "divisor_override must be at least 1", lambda k: k.avg_pool2d(IMAGE, 2, divisor_override=0)),
    (TypeError, "output_size must be an int", lambda k: k.adaptive_avg_pool2d(IMAGE, "2")),
    (ValueError, "output_size must be at least 1", lambda k: k.adaptive_avg_pool2d(IMAGE, (2, 0))),
    (ValueError, "output_size must be an int or a pair", lambda k: k.adaptive_avg_pool2d(IMAGE, (2, None, 3))),
    (ValueError, "at least 1 pixel", lambda k: k.adaptive_avg_pool2d(IMAGE[:, :, :0], 2)),
    (
        ValueError,
        r"grad must have shape \(1, 2, 2, 3\) for input_shape \(1, 2, 4, 6\), got \(1, 2, 4, 6\)",
        lambda k: k.avg_pool2d_backward(IMAGE, IMAGE.shape, 2),
    ),
    (TypeError, "input_shape must be x's shape", lambda k: k.avg_pool2d_backward(POOLED, 4, 2)),
    (ValueError, "both have a batch axis", lambda k: k.avg_pool2d_backward(POOLED, (2, 4, 6), 2)),
    (
        TypeError,
        "indices must be int64, got int32",
        lambda k: k.max_pool2d_backward(POOLED, INDICES.astype(np.int32), IMAGE.shape, 2),
    ),
    (ValueError, "indices must have grad's shape", lambda k: k.max_pool2d_backward(POOLED, INDICES[0], IMAGE.shape, 2)),
    (TypeError, "indices must be an array, got None", lambda k: k.max_unpool2d(POOLED, None, 2)),
    (ValueError, "output height of 6 cannot be", lambda k: k.max_unpool2d(POOLED, INDICES, 2, output_size=(6, 6))),
    (ValueError, "does not belong to x", lambda k: k.max_unpool2d(POOLED, INDICES, 2, output_size=(1, 3, 4, 6))),
    (ValueError, "padding 'same' needs output_size", lambda k: k.max_unpool2d(POOLED, INDICES, 2, padding="same")),
    (ValueError, "batch and channels of grad", lambda k: k.max_unpool2d_backward(IMAGE, INDICES[:, :1])),
]


@pytest.mark.parametrize(("error", "message", "call"), WRONG, ids=[message for _, message, _ in WRONG])
def test_a_wrong_call_says_what_is_wrong(error, message, call):
    with pytest.raises(error, match=message):
        call(kernels)


@pytest.mark.parametrize("wrong", [-1, 24, 2**40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_index_outside_the_plane_is_refused(backend, layout, wrong):
    image, pooled = laid(IMAGE, layout), laid(POOLED, layout)
    shape = image.shape
    indices = np.zeros(pooled.shape, np.int64)
    indices[0, 1, 1, 1] = wrong
    message = rf"indices must lie in 0 to 23 \(a plane of 4 x 6\), got {min(wrong, 0)} to {max(wrong, 0)}"
    with pytest.raises(ValueError, match=f"max_pool2d_backward: {message}"):
        kernels.max_pool2d_backward(pooled, indices, shape, 2, layout=layout)
    with pytest.raises(ValueError, match=f"adaptive_max_pool2d_backward: {message}"):
        kernels.adaptive_max_pool2d_backward(pooled, indices, shape, layout=layout)
    with pytest.raises(ValueError, match=f"max_unpool2d: {message}"):
        kernels.max_unpool2d(pooled, indices, 2, layout=layout)
    with pytest.raises(ValueError, match=f"max_unpool2d_backward: {message}"):
        kernels.max_unpool2d_backward(image, indices, layout=layout)


def test_explain_counts_the_work():
    decision = tilewise.explain(kernels.max_pool2d, IMAGE, 2, return_indices=True)
    assert decision.backend == "cpu"
    assert decision.flops == 12 * 4
    assert decision.bytes == (48 + 12) * 4 + 12 * 8
