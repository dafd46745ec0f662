"""Pooling of the GPU backends, executed on the CPU, against the reference."""

import inspect
from importlib import import_module

import numpy as np
import pytest
from gradcheck import assert_gradient, numerical_gradient
from test_pool import DILATED, DIVISORS, LAYOUTS, WINDOWS, laid, plain, tied
from tolerances import assert_close

import tilewise
from tilewise import kernels
from tilewise.kernels import pool_plan
from tilewise.kernels.device_arrays import HostPlace, host_place

GPU_BACKENDS = ("cuda", "cupy")
FLOATS = [np.float16, np.float32, np.float64]
INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
# NHWC in vectors and not; NCHW with rows of whole vectors and not, images as small as a window, more than a block
SIZES = [(2, 3, 8, 8), (1, 8, 13, 11), (2, 4, 5, 16), (1, 16, 6, 5)]
# 3 x 3 and 2 x 2, two apart, over rows of whole vectors: every case of pool_columns.py
COMMON = [
    {"kernel_size": 2},
    {"kernel_size": 2, "stride": 2, "padding": ((1, 0), (0, 1))},
    {"kernel_size": 2, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": ((0, 1), (0, 1))},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": "same"},
]
COMMON_SIZES = [(2, 2, 8, 8), (1, 3, 9, 16), (1, 8, 7, 24), (3, 2, 4, 32)]


def reference(function, *operands, **options):
    with tilewise.using(backend="reference"):
        return function(*operands, **options)


def values(rng, size, dtype):
    return tied(rng, size, dtype) if np.dtype(dtype).kind != "f" else rng.standard_normal(size).astype(dtype)


def check_maximum(x, rng, options, layout):
    expected, where = reference(kernels.max_pool2d, x, **options, return_indices=True, layout=layout)
    only = kernels.max_pool2d(x, **options, layout=layout)
    y, indices = kernels.max_pool2d(x, **options, return_indices=True, layout=layout)
    assert only.dtype == y.dtype == x.dtype
    assert indices.dtype == np.int64
    for result in (only, y):
        np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(indices, where)
    if x.dtype.kind == "f":
        cotangent = rng.standard_normal(y.shape).astype(x.dtype)
        grad = kernels.max_pool2d_backward(cotangent, indices, x.shape, **options, layout=layout)
        wanted = reference(
            kernels.max_pool2d_backward, cotangent.astype(float), where, x.shape, **options, layout=layout
        )
        assert grad.dtype == x.dtype
        assert_close(grad, wanted, reduction=9)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", WINDOWS + DILATED, ids=str)
def test_max_pool(gpu, rng, options, layout, dtype):
    for size in SIZES if dtype == np.float32 else SIZES[:2]:
        check_maximum(laid(tied(rng, size, dtype), layout), rng, options, layout)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", COMMON, ids=str)
def test_common_windows(gpu, rng, options, layout, dtype):
    for size in COMMON_SIZES if dtype == np.float32 else COMMON_SIZES[1:3]:
        x = laid(tied(rng, size, dtype), layout)
        check_maximum(x, rng, options, layout)
        for divisor in DIVISORS if dtype == np.float32 else DIVISORS[1:2]:
            check_average(x, rng, {**options, **divisor}, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_max_pool_of_integers(gpu, rng, dtype, layout):
    limits = np.iinfo(dtype)
    for size in ((2, 3, 7, 8), (1, 16, 5, 6)):
        x = rng.integers(limits.min, limits.max, size, dtype=dtype, endpoint=True)
        x[0, 0, 0, :2], x[0, 1] = limits.max, limits.min
        for options in ({"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 2}, DILATED[0]):
            check_maximum(laid(x, layout), rng, options, layout)
        y, indices = kernels.adaptive_max_pool2d(laid(x, layout), (2, 3), True, layout=layout)
        expected = reference(kernels.adaptive_max_pool2d, laid(x, layout), (2, 3), True, layout=layout)
        np.testing.assert_array_equal(y, expected[0])
        np.testing.assert_array_equal(indices, expected[1])
        y, indices = kernels.max_pool2d(laid(x, layout), 2, return_indices=True, layout=layout)
        back = kernels.max_unpool2d(y, indices, 2, output_size=size[2:], layout=layout)
        wanted = reference(kernels.max_unpool2d, y, indices, 2, output_size=size[2:], layout=layout)
        np.testing.assert_array_equal(back, wanted)


def check_average(x, rng, options, layout):
    wide = x.astype(np.float64)
    y = kernels.avg_pool2d(x, **options, layout=layout)
    expected = reference(kernels.avg_pool2d, wide, **options, layout=layout)
    assert y.dtype == x.dtype
    assert_close(y, expected, reduction=25, scale=np.abs(wide).max())
    cotangent = rng.standard_normal(y.shape).astype(x.dtype)
    grad = kernels.avg_pool2d_backward(cotangent, x.shape, **options, layout=layout)
    wanted = reference(kernels.avg_pool2d_backward, cotangent.astype(float), x.shape, **options, layout=layout)
    assert grad.dtype == x.dtype
    assert_close(grad, wanted, reduction=25)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("divisor", DIVISORS, ids=str)
@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_avg_pool(gpu, rng, options, divisor, layout, dtype):
    for size in SIZES if dtype == np.float32 else SIZES[1:2]:
        check_average(laid(values(rng, size, dtype), layout), rng, {**options, **divisor}, layout)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bins", [1, 3, (2, 5), (7, 1), (16, 19)], ids=str)
def test_adaptive_pools(gpu, rng, bins, layout, dtype):
    for size in (*SIZES, (3, 2, 33, 40)) if dtype == np.float32 else SIZES[:2]:
        x = laid(values(rng, size, dtype), layout)
        wide = x.astype(np.float64)
        y = kernels.adaptive_avg_pool2d(x, bins, layout=layout)
        expected = reference(kernels.adaptive_avg_pool2d, wide, bins, layout=layout)
        assert_close(y, expected, reduction=size[2] * size[3], scale=1)
        cotangent = rng.standard_normal(y.shape).astype(dtype)
        grad = kernels.adaptive_avg_pool2d_backward(cotangent, x.shape, layout=layout)
        wanted = reference(kernels.adaptive_avg_pool2d_backward, cotangent.astype(float), x.shape, layout=layout)
        assert_close(grad, wanted, reduction=25)
        only = kernels.adaptive_max_pool2d(x, bins, layout=layout)
        y, indices = kernels.adaptive_max_pool2d(x, bins, True, layout=layout)
        expected, where = reference(kernels.adaptive_max_pool2d, x, bins, True, layout=layout)
        np.testing.assert_array_equal(only, expected)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(indices, where)
        grad = kernels.adaptive_max_pool2d_backward(cotangent, indices, x.shape, layout=layout)
        wide = cotangent.astype(float)
        wanted = reference(kernels.adaptive_max_pool2d_backward, wide, where, x.shape, layout=layout)
        assert_close(grad, wanted, reduction=25)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_global_average(gpu, rng, dtype, layout):
    # a warp for a plane, a block for a large one, planes of whole vectors and not; more channels than a block takes
    for size in ((3, 5, 7, 7), (1, 3, 16, 16), (2, 1, 60, 64), (1, 2, 61, 63), (2, 1030, 2, 3), (1, 24, 5, 9)):
        x = laid(rng.standard_normal(size), layout).astype(dtype)
        expected = reference(kernels.adaptive_avg_pool2d, x.astype(float), 1, layout=layout)
        y = kernels.adaptive_avg_pool2d(x, 1, layout=layout)
        assert_close(y, expected, reduction=size[2] * size[3], scale=1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_wins_and_the_last_one_tells_the_index(gpu, rng, layout, dtype):
    x = rng.integers(0, 9, (2, 8, 9, 40)).astype(dtype)
    x[rng.random(x.shape) < 0.2] = np.nan
    x[rng.random(x.shape) < 0.2] = -np.inf
    x[rng.random(x.shape) < 0.1] = np.inf
    x[1, 2] = -np.inf  # padding must not win even here
    x = laid(x, layout)
    for options in (COMMON[0], COMMON[3], COMMON[5], {"kernel_size": (2, 3), "stride": 1}, DILATED[0]):
        expected = reference(kernels.max_pool2d, x, **options, return_indices=True, layout=layout)
        results = kernels.max_pool2d(x, **options, return_indices=True, layout=layout)
        for a, b in zip(results, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(kernels.max_pool2d(x, **options, layout=layout), expected[0])
    expected = reference(kernels.adaptive_max_pool2d, x, (4, 7), True, layout=layout)
    for a, b in zip(kernels.adaptive_max_pool2d(x, (4, 7), True, layout=layout), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_averages_keep_nan_and_inf_in_their_windows(gpu, layout):
    x = np.ones((1, 4, 9, 40), np.float32)
    x[0, 0, 2, 3], x[0, 0, 6, 30] = np.nan, np.inf
    y = plain(kernels.avg_pool2d(laid(x, layout), 3, 2, 1, layout=layout), layout)[0]
    assert np.argwhere(np.isnan(y)).tolist() == [[0, 1, 1], [0, 1, 2]]
    assert np.argwhere(np.isinf(y)).tolist() == [[0, 3, 15]]
    g = np.zeros((1, 4, 5, 20), np.float32)
    g[0, 0, 2, 7] = np.nan
    grad = plain(kernels.avg_pool2d_backward(laid(g, layout), laid(x, layout).shape, 3, 2, 1, layout=layout), layout)
    assert np.argwhere(np.isnan(grad[0])).tolist() == [[0, h, w] for h in (3, 4, 5) for w in (13, 14, 15)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unpooling(gpu, rng, layout, dtype):
    for options, size in (({"kernel_size": 2}, (8, 10)), ({"kernel_size": 3, "stride": 2, "padding": 1}, (9, 12))):
        x = laid(tied(rng, (2, 3, *size), dtype), layout)
        y, indices = kernels.max_pool2d(x, **options, return_indices=True, layout=layout)
        # windows that share their maximum: the last one's element stays, so they must differ
        y = y + np.arange(y.size).reshape(y.shape).astype(dtype)
        expected = reference(kernels.max_unpool2d, y, indices, **options, output_size=size, layout=layout)
        back = kernels.max_unpool2d(y, indices, **options, output_size=size, layout=layout)
        assert back.dtype == dtype
        np.testing.assert_array_equal(back, expected)
        cotangent = rng.standard_normal(back.shape).astype(dtype)
        grad = kernels.max_unpool2d_backward(cotangent, indices, layout=layout)
        np.testing.assert_array_equal(grad, reference(kernels.max_unpool2d_backward, cotangent, indices, layout=layout))


def test_indices_outside_the_plane_reach_no_memory(gpu):
    """On arrays of the GPU's own they are ignored; see below for arrays of the host."""
    place = host_place(gpu.backend)
    x, four = place.copy_in(np.ones((1, 1, 2, 2), np.float32)), place.copy_in(np.ones((1, 1, 4, 4), np.float32))
    indices = place.copy_in(np.array([-1, 16, 5, 2**40]).reshape(x.shape))
    assert kernels.max_unpool2d(x, indices, 2).sum() == 1
    assert kernels.max_unpool2d_backward(four, indices).ravel().tolist() == [0, 0, 1, 0]
    assert kernels.max_pool2d_backward(x, indices, (1, 1, 4, 4), 2).sum() == 0


@pytest.mark.parametrize("wrong", [-1, 16])
def test_indices_outside_the_plane_are_refused_where_they_come_from_the_host(gpu, wrong):
    x, whole = np.ones((1, 2, 2), np.float32), np.ones((1, 4, 4), np.float32)
    indices = np.array([0, 2, wrong, 10]).reshape(x.shape)
    calls = {
        "max_unpool2d": lambda i: kernels.max_unpool2d(x, i, 2),
        "max_unpool2d_backward": lambda i: kernels.max_unpool2d_backward(whole, i),
        "max_pool2d_backward": lambda i: kernels.max_pool2d_backward(x, i, whole.shape, 2),
        "adaptive_max_pool2d_backward": lambda i: kernels.adaptive_max_pool2d_backward(x, i, whole.shape),
    }
    for name, call in calls.items():
        call(np.abs(indices) % 16)  # its plan is kept, and the next call is looked at all the same
        with pytest.raises(ValueError, match=rf"{name}: indices must lie in 0 to 15 \(a plane of 4 x 4\), got"):
            call(indices)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [WINDOWS[4], WINDOWS[6]], ids=str)
def test_gradients_are_the_numerical_ones(gpu, rng, options, layout):
    x = laid(rng.permutation(2 * 2 * 4 * 5).reshape(2, 2, 4, 5) * 0.1, layout)  # no ties, so differentiable
    options = {**options, "layout": layout}
    y, indices = kernels.max_pool2d(x, **options, return_indices=True)
    cotangent = rng.standard_normal(y.shape)
    expected = numerical_gradient(lambda x: kernels.max_pool2d(x, **options), x, cotangent)
    assert_gradient(kernels.max_pool2d_backward(cotangent, indices, x.shape, **options), expected)
    expected = numerical_gradient(lambda x: kernels.avg_pool2d(x, **options), x, cotangent)
    assert_gradient(kernels.avg_pool2d_backward(cotangent, x.shape, **options), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_and_single_images(gpu, rng, layout):
    x = np.empty((0, 2, 6, 6) if layout == "NCHW" else (0, 6, 6, 2), np.float32)
    y, indices = kernels.max_pool2d(x, 3, return_indices=True, layout=layout)
    assert y.shape == indices.shape == ((0, 2, 2, 2))
    assert kernels.max_pool2d_backward(y, indices, x.shape, 3, layout=layout).shape == x.shape
    assert kernels.avg_pool2d(x, 3, layout=layout).shape == y.shape
    assert kernels.avg_pool2d_backward(y, x.shape, 3, layout=layout).shape == x.shape
    assert kernels.adaptive_avg_pool2d(x, 1, layout=layout).shape[0] == 0
    assert kernels.max_unpool2d(y, indices, 3, layout=layout).shape == x.shape
    assert kernels.max_unpool2d_backward(x, indices, layout=layout).shape == y.shape
    one = laid(rng.standard_normal((1, 3, 6, 8)), layout).astype(np.float32)
    for function, options in ((kernels.max_pool2d, (3, 2, 1)), (kernels.adaptive_avg_pool2d, (2,))):
        y = function(one[0], *options, layout=layout)
        np.testing.assert_array_equal(y, function(one, *options, layout=layout)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(gpu, rng, torch, layout):
    x = laid(rng.standard_normal((2, 4, 8, 8)), layout).astype(np.float32)
    y, indices = kernels.max_pool2d(x, 3, 2, 1, return_indices=True, layout=layout)
    for view in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(kernels.max_pool2d(view, 3, 2, 1, layout=layout), y)
    grad = kernels.max_pool2d_backward(y, indices, x.shape, 3, 2, 1, layout=layout)
    both = np.asfortranarray(y), np.asfortranarray(indices)
    np.testing.assert_array_equal(kernels.max_pool2d_backward(*both, x.shape, 3, 2, 1, layout=layout), grad)
    tensor, where = kernels.max_pool2d(torch.from_numpy(x), 3, 2, 1, return_indices=True, layout=layout)
    assert type(tensor) is type(where) is torch.Tensor
    np.testing.assert_array_equal(tensor.numpy(), y)


def test_the_same_signatures_as_the_reference(gpu):
    from tilewise.kernels.reference import pool as reference

    ours = import_module(f"tilewise.kernels.{gpu.backend}.pool")
    for name, function in vars(reference).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            assert inspect.signature(getattr(ours, name)) == inspect.signature(function), name


def test_unpooling_refuses_planes_whose_positions_32_bits_cannot_count(gpu, monkeypatch):
    x, indices = np.ones((1, 1, 2, 2), np.float32), np.zeros((1, 1, 2, 2), np.int64)
    monkeypatch.setattr(pool_plan, "_MOST_OWNERS", 3)
    allocated, allocate = [], HostPlace.empty
    monkeypatch.setattr(HostPlace, "empty", lambda *a: allocated.append(a[1]) or allocate(*a))
    with pytest.raises(NotImplementedError, match="max_unpool2d: planes of more than 3 pooled elements"):
        kernels.max_unpool2d(x, indices, 2)
    assert allocated == [x.shape, indices.shape], "the result's memory was taken before the refusal"
