"""Pooling: the CPU kernels against the reference, memory layouts, specialisations, threads."""

import itertools

import numpy as np
import pytest
from tolerances import assert_close

import tilewise
from tilewise import kernels

LAYOUTS = ("NCHW", "NHWC")
FLOATS = (np.float32, np.float64)
# Every path of the kernels: one, two, three and more taps; stride 1, 2 and more; padding on one side only; dilation.
WINDOWS = [
    {"kernel_size": 1},
    {"kernel_size": 2, "stride": 2, "padding": 1, "ceil_mode": True},
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 1, "padding": "same"},
    {"kernel_size": 2, "stride": 2, "padding": "same_lower"},
    {"kernel_size": (1, 5), "stride": (2, 2), "padding": (0, 2)},
    {"kernel_size": (6, 4), "stride": (1, 2), "padding": ((3, 0), (0, 3)), "ceil_mode": True},
    {"kernel_size": (4, 1), "stride": (3, 2), "padding": (1, 0)},
    {"kernel_size": (2, 7), "stride": (3, 1), "padding": ((0, 1), (6, 2))},
    {"kernel_size": 5, "stride": 3, "padding": 2, "ceil_mode": True},
    {"kernel_size": 5, "stride": 1, "padding": 2},
    {"kernel_size": 3},
    {"kernel_size": (2, 4), "stride": (1, 4)},
]
DILATED = [
    {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 3), "dilation": (3, 2), "ceil_mode": True},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 1), "dilation": (1, 4)},
]
DIVISORS = [{}, {"count_include_pad": False}, {"divisor_override": 5}]
# Widths around 4, 8, 16 and 32 outputs (quarter, half, whole vectors of either dtype) with stride 1 and 2.
WIDTHS = (7, 8, 9, 16, 17, 18, 31, 33, 34, 63, 65, 67)


def laid(x, layout):
    return np.ascontiguousarray(x if layout == "NCHW" else np.moveaxis(x, -3, -1))


def both(function, *arrays, **options):
    """(the CPU's result, the reference's)"""
    results = []
    for backend in ("cpu", "reference"):
        with tilewise.using(backend=backend):
            results.append(function(*arrays, **options))
    return results


def images(rng, widths, dtype):
    for width, (n, c, h) in zip(widths, itertools.cycle([(1, 1, 9), (2, 3, 8), (1, 17, 7), (3, 2, 11)]), strict=False):
        yield rng.standard_normal((n, c, h, width)).astype(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", WINDOWS + DILATED, ids=str)
def test_max_pool(rng, options, dtype, layout):
    for x in images(rng, WIDTHS, dtype):
        x = laid(np.round(x * 2), layout)  # rounded: many equal maxima
        (y, indices), (expected, where) = both(kernels.max_pool2d, x, **options, return_indices=True, layout=layout)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(indices, where)
        with tilewise.using(backend="cpu"):
            np.testing.assert_array_equal(kernels.max_pool2d(x, **options, layout=layout), expected)
        grad = rng.standard_normal(y.shape).astype(dtype)
        ours, theirs = both(kernels.max_pool2d_backward, grad, indices, input_shape=x.shape, **options, layout=layout)
        assert_close(ours, theirs, reduction=24)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_avg_pool(rng, options, dtype, layout):
    for x, divisor in zip(images(rng, WIDTHS, np.float64), itertools.cycle(DIVISORS), strict=False):
        x = laid(x, layout)
        options = {**options, **divisor, "layout": layout}
        _, expected = both(kernels.avg_pool2d, x, **options)
        y, _ = both(kernels.avg_pool2d, x.astype(dtype), **options)
        assert y.dtype == dtype
        assert_close(y, expected, reduction=25, scale=1.0)
        grad = rng.standard_normal(y.shape)
        _, expected = both(kernels.avg_pool2d_backward, grad, input_shape=x.shape, **options)
        ours, _ = both(kernels.avg_pool2d_backward, grad.astype(dtype), input_shape=x.shape, **options)
        assert_close(ours, expected, reduction=25, scale=1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bins", [1, (2, 5), (7, 1), (9, 19), (20, 70)], ids=str)
def test_adaptive_pools(rng, bins, dtype, layout):
    for x in images(rng, (1, 5, 16, 33, 67), dtype):
        x = laid(x, layout)
        shape = x.shape
        y, expected = both(kernels.adaptive_avg_pool2d, x, bins, layout=layout)
        assert_close(y, expected, reduction=x[0].size, scale=1.0)
        grad = rng.standard_normal(y.shape).astype(dtype)
        ours, theirs = both(kernels.adaptive_avg_pool2d_backward, grad, shape, layout=layout)
        assert_close(ours, theirs, reduction=x[0].size)
        x = np.round(x * 2)
        (y, indices), (expected, where) = both(kernels.adaptive_max_pool2d, x, bins, True, layout=layout)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(indices, where)
        with tilewise.using(backend="cpu"):
            np.testing.assert_array_equal(kernels.adaptive_max_pool2d(x, bins, layout=layout), expected)
        ours, theirs = both(kernels.adaptive_max_pool2d_backward, grad, indices, shape, layout=layout)
        assert_close(ours, theirs, reduction=x[0].size, scale=4.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*FLOATS, np.int8, np.uint16], ids=lambda t: t.__name__)
def test_quads(rng, dtype, layout):
    """2x2 windows with stride 2 take a kernel of their own from one vector of windows or channels on: 16 float32."""
    for wide in (7, 8, 9, 15, 16, 17, 31, 33, 64, 65):
        shape = (2, 3, 6, 2 * wide + wide % 2) if layout == "NCHW" else (2, 6, 5, wide)  # a column too many, too
        x = np.round(rng.standard_normal(shape) * 40).astype(dtype)
        np.testing.assert_array_equal(*both(kernels.max_pool2d, x, 2, layout=layout))
        if np.dtype(dtype).kind == "f":
            y, expected = both(kernels.avg_pool2d, x, 2, layout=layout)
            assert_close(y, expected, reduction=4)
            x[0, 1, 2, 0], x[1, 2, 3, -2] = np.nan, np.inf
            np.testing.assert_array_equal(*both(kernels.max_pool2d, x, 2, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_longer_than_a_part_are_cut(rng, layout):
    shape = (1, 1, 4, 9001) if layout == "NCHW" else (1, 4, 61, 300)
    x = rng.standard_normal(shape).astype(np.float32)
    for options in (
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (2, 3), "stride": 1, "padding": 1},
        {"kernel_size": (2, 5), "stride": 3, "padding": (0, 2)},
    ):
        for function in (kernels.max_pool2d, kernels.avg_pool2d):
            y, expected = both(function, x, **options, layout=layout)
            assert_close(y, expected, reduction=9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [(2, 2), (3, 2, 1), (3, 1, 1), (5, 3), (3, 4), (7, 7)], ids=str)
def test_small_planes_in_large_numbers(rng, options, dtype, layout):
    """Groups of planes, bands of equal rows of many planes, chunks of many planes: more than one of each."""
    for n, c, size in ((3, 97, 14), (1, 130, 13), (2, 33, 7)):
        x = laid(rng.integers(-9, 9, (n, c, size, size + 1)).astype(dtype), layout)
        y, indices = kernels.max_pool2d(x, *options, return_indices=True, layout=layout)
        np.testing.assert_array_equal(*both(kernels.max_pool2d, x, *options, layout=layout))
        grad = rng.integers(-9, 9, y.shape).astype(dtype)
        ours, theirs = both(kernels.max_pool2d_backward, grad, indices, x.shape, *options, layout=layout)
        np.testing.assert_array_equal(ours, theirs)
        assert_close(*both(kernels.avg_pool2d, x, *options, layout=layout), reduction=49, scale=9.0)
        ours, theirs = both(kernels.avg_pool2d_backward, grad, x.shape, *options, layout=layout)
        assert_close(ours, theirs, reduction=9, scale=9.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [(5, 3), ((2, 5), (1, 4)), ((7, 4), 3), (3, (2, 3))], ids=str)
def test_averages_of_small_planes_are_rounded_once(rng, options, dtype):
    """Around one and two vectors of columns, and one window to as many as a vector has lanes; sums are exact here."""
    divisors = (None, 3, 49, 1023)
    for width, override in zip((7, 8, 9, 14, 15, 16, 17, 31, 32, 33, 34, 47, 63), itertools.cycle(divisors)):
        for planes in (1, 2, 131):
            x = rng.integers(-99, 99, (1, planes, 7 + planes % 5, width)).astype(dtype)
            np.testing.assert_array_equal(*both(kernels.avg_pool2d, x, *options, divisor_override=override))
    x = rng.standard_normal((2, 3, 9, 14)).astype(dtype)
    x[0, 1, 2, :3] = np.inf, np.nan, -np.inf
    x[1, 1, 4, 5] = np.inf
    special = [np.where(np.isfinite(y), 0, y) for y in both(kernels.avg_pool2d, x, *options)]
    assert not np.isfinite(special[1]).all()
    np.testing.assert_array_equal(*special)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_of_averages_of_wide_windows_and_of_large_planes(rng, dtype):
    """Windows so close that a vector of columns lies in more of them than it has lanes; bands in several chunks."""
    for shape, options in (
        ((1, 3, 5, 90), ((2, 40), (2, 2))),
        ((1, 2, 310, 230), (3, 2, 1)),
        ((1, 1, 300, 200), (2, 5)),
    ):
        y, expected = both(kernels.avg_pool2d, rng.standard_normal(shape).astype(dtype), *options)
        assert_close(y, expected, reduction=80, scale=1.0)
        grad = rng.standard_normal(y.shape).astype(dtype)
        ours, theirs = both(kernels.avg_pool2d_backward, grad, shape, *options)
        assert_close(ours, theirs, reduction=40)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 3, 7, 14])
def test_short_rows_of_a_gradient_end_with_their_chunk(rng, width, dtype):
    """They are written in whole vectors, but not into rows that belong to another chunk, or to nobody."""
    from tilewise.kernels.cpu import pool_spread

    options = {"kernel_size": (5, 1), "stride": (3, 1)}
    shape, done = (1, 1, 40, width), 9
    grad = rng.standard_normal((1, 1, 12, width)).astype(dtype)
    expected = both(kernels.avg_pool2d_backward, grad, shape, **options)[1]
    rows, columns = pool_spread.windows(12, 40, 5, 3, 0), pool_spread.windows(width, width, 1, 1, 0)
    weights = np.full(12, 0.2), np.ones(width)
    plan, bands, *rest = pool_spread.plan_of(
        shape, grad.shape, np.dtype(dtype), "NCHW", (*rows, weights[0]), (*columns, weights[1]), 1, 0
    )
    plan[pool_spread.BANDS] = done
    ours = np.full(shape, np.nan, dtype)
    pool_spread.averages_backward.serial(grad, ours, plan, bands, *rest)
    end = bands[4 * done]
    assert_close(ours[:, :, :end], expected[:, :, :end], reduction=5)
    assert np.isnan(ours[:, :, end:]).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_of_one_window_to_a_plane(rng, dtype):
    """Planes shorter than a vector, as long as one or two, and one pixel longer or shorter; powers of two are exact."""
    for size in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 49):
        for planes in (1, 37):
            grad = rng.integers(-9, 9, (1, planes, 1, 1)).astype(dtype)
            ours = kernels.avg_pool2d_backward(grad, (1, planes, size, 1), (size, 1), divisor_override=4)
            np.testing.assert_array_equal(ours, np.repeat(grad / dtype(4), size, axis=2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_global_averages_of_every_length(rng, dtype, layout):
    for height, width in (
        (1, 1),
        (3, 5),
        (4, 4),
        (1, 17),
        (7, 7),
        (8, 8),
        (1, 63),
        (5, 13),
        (64, 64),
        (65, 64),
        (91, 97),
    ):
        x = laid(rng.standard_normal((2, 3, height, width)).astype(dtype), layout)
        for bins in (1, (min(2, height), 1)):
            y, expected = both(kernels.adaptive_avg_pool2d, x, bins, layout=layout)
            assert_close(y, expected, reduction=height * width, scale=1.0)
            ours, theirs = both(kernels.adaptive_avg_pool2d_backward, y, x.shape, layout=layout)
            assert_close(ours, theirs, reduction=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 7, 16, 33])
def test_a_maximum_outside_its_window_still_gets_its_gradient(rng, channels, layout):
    """max_pool2d never returns such indices, but a caller may bring them."""
    x = laid(rng.permutation(2 * channels * 60).reshape(2, channels, 6, 10).astype(np.float32), layout)
    for options in ((2, 2), (3, 2, 1), (3, 1, 1)):
        y, indices = kernels.max_pool2d(x, *options, return_indices=True, layout=layout)
        strange = indices.copy()
        strange.flat[rng.integers(indices.size)] = 59 - strange.flat[0]
        for where in (strange, rng.integers(0, 60, indices.shape)):
            ours, theirs = both(kernels.max_pool2d_backward, y, where, x.shape, *options, layout=layout)
            assert_close(ours, theirs, reduction=60)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_index_beyond_32_bits_is_refused(rng, layout):
    """Its lower half lies inside the window, and is all that is compared where windows overlap."""
    x = laid(rng.standard_normal((1, 19, 6, 7)).astype(np.float32), layout)  # a vector of channels, and a rest
    y, indices = kernels.max_pool2d(x, 3, 1, 1, return_indices=True, layout=layout)
    for place in (0, -1):
        indices.flat[place] += 2**32
        with pytest.raises(ValueError, match="indices must lie in 0 to 41"):
            kernels.max_pool2d_backward(y, indices, x.shape, 3, 1, 1, layout=layout)
        indices.flat[place] -= 2**32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bins_taller_than_a_group_of_rows(rng, layout):
    for height, bins in ((53, 1), (57, 1), (64, 1), (53, (2, 3)), (57, (5, 6))):  # 57: a last group of one row
        x = laid(rng.standard_normal((2, 3, height, 6)).astype(np.float32), layout)
        y, expected = both(kernels.adaptive_avg_pool2d, x, bins, layout=layout)
        assert_close(y, expected, reduction=height * 6, scale=0.1)
        np.testing.assert_array_equal(*both(kernels.adaptive_max_pool2d, x, bins, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64], ids=lambda t: t.__name__)
def test_integers(rng, dtype, layout):
    info = np.iinfo(dtype)
    for width in (9, 40, 150):
        x = laid(rng.integers(info.min, info.max, (1, 2, 7, width), dtype, endpoint=True), layout)
        x[..., :5] = info.min  # windows that hold nothing but the lowest number
        for options in ({"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 2, "stride": 1}):
            ours, theirs = both(kernels.max_pool2d, x, **options, return_indices=True, layout=layout)
            np.testing.assert_array_equal(ours[0], theirs[0])
            np.testing.assert_array_equal(ours[1], theirs[1])
            with tilewise.using(backend="cpu"):
                np.testing.assert_array_equal(kernels.max_pool2d(x, **options, layout=layout), theirs[0])
    if dtype == np.int64:
        y, indices = kernels.adaptive_max_pool2d(x, (2, 3), True, layout=layout)
        np.testing.assert_array_equal(y, both(kernels.adaptive_max_pool2d, x, (2, 3), layout=layout)[1])
        size = x.shape[2:] if layout == "NCHW" else x.shape[1:3]
        ours, theirs = both(kernels.max_unpool2d, y, indices, (4, 50), output_size=size, layout=layout)
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_unpool(rng, dtype, layout):
    for shape in ((2, 3, 8, 10), (1, 70, 6, 5), (3, 1, 9, 9)):  # 70 channels: three chunks of an NHWC image
        x = laid(rng.standard_normal(shape).astype(dtype), layout)
        options = {"kernel_size": 3, "stride": 2, "padding": 1}
        y, indices = kernels.max_pool2d(x, **options, return_indices=True, layout=layout)
        ours, theirs = both(
            kernels.max_unpool2d,
            y,
            indices,
            **options,
            output_size=x.shape if layout == "NCHW" else shape[2:],
            layout=layout,
        )
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(*both(kernels.max_unpool2d_backward, x, indices, layout=layout))


def steps(x, grad=None):
    """Every function of the family once, in a chain; the results."""
    options = {"kernel_size": 3, "stride": 2, "padding": 1}
    y, indices = kernels.max_pool2d(x, **options, return_indices=True)
    shape = x.shape
    m, where = kernels.adaptive_max_pool2d(x, 3, True)
    return [
        y,
        indices,
        kernels.max_pool2d(x, **options),
        kernels.max_pool2d_backward(y, indices, shape, **options),
        kernels.avg_pool2d(x, **options),
        kernels.avg_pool2d_backward(y, shape, **options),
        kernels.adaptive_avg_pool2d(x, 3),
        kernels.adaptive_avg_pool2d_backward(m, shape),
        kernels.adaptive_max_pool2d(x, 3),
        kernels.adaptive_max_pool2d_backward(m, where, shape),
        kernels.max_unpool2d(y, indices, **options, output_size=shape[-2:]),
        kernels.max_unpool2d_backward(x, indices),
    ]


def views(x):
    """The same numbers in other memory: strided, reversed, transposed, read-only, unaligned."""
    spaced = np.repeat(x, 2, axis=-1)[..., ::2]
    backwards = x[..., ::-1].copy()[..., ::-1]
    turned = np.asfortranarray(x)
    frozen = x.copy()
    frozen.flags.writeable = False
    raw = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    raw[...] = x
    return [spaced, backwards, turned, frozen, raw]


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_strides_give_the_same_and_one_array_type_reaches_a_kernel(rng, dtype):
    from tilewise.kernels.cpu.jit import KERNELS

    def signatures():
        return {k.__qualname__: len(k.serial.signatures) + len(k.parallel.signatures) for k in KERNELS}

    x = rng.standard_normal((2, 3, 9, 10)).astype(dtype)
    with tilewise.using(backend="cpu", threads=1):
        expected = steps(x)
        before = signatures()
        for view in views(x):
            copy = view.copy()
            for ours, theirs in zip(steps(view), expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)
            np.testing.assert_array_equal(view, copy)
        for image, *alone in zip(x, *expected, strict=True):
            for ours, theirs in zip(steps(image), alone, strict=True):
                np.testing.assert_array_equal(ours, theirs)
        assert signatures() == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_threads_gives_the_same_bits(rng, layout):
    x = laid(rng.standard_normal((2, 40, 60, 57)).astype(np.float32), layout)
    options = {"kernel_size": 3, "stride": 2, "padding": 1, "layout": layout}

    def run():
        y, indices = kernels.max_pool2d(x, **options, return_indices=True)
        m, where = kernels.adaptive_max_pool2d(x, 11, True, layout=layout)
        return [
            y,
            indices,
            kernels.max_pool2d(x, **options),
            kernels.max_pool2d_backward(y, indices, x.shape, **options),
            kernels.avg_pool2d(x, **options),
            kernels.avg_pool2d_backward(y, x.shape, **options),
            kernels.adaptive_avg_pool2d(x, 11, layout=layout),
            kernels.adaptive_avg_pool2d_backward(m, x.shape, layout=layout),
            kernels.adaptive_max_pool2d(x, 11, layout=layout),
            kernels.adaptive_max_pool2d_backward(m, where, x.shape, layout=layout),
            kernels.max_unpool2d(y, indices, 3, 2, 1, (60, 57), layout=layout),
            kernels.max_unpool2d_backward(x, indices, layout=layout),
            *[
                f(x, *o, layout=layout)
                for f in (kernels.max_pool2d, kernels.avg_pool2d)
                for o in ((2,), (3, 1), (5, 3))
            ],
        ]

    with tilewise.using(backend="cpu", threads=1):
        expected = run()
    for threads in (2, 3):
        with tilewise.using(backend="cpu", threads=threads):
            for ours, theirs in zip(run(), expected, strict=True):
                assert ours.tobytes() == theirs.tobytes()
