"""Batch normalisation of the GPU backends, executed on the CPU, against the reference in float64."""

import inspect
from importlib import import_module

import numpy as np
import pytest
from gradcheck import assert_gradient, numerical_gradient
from tolerances import assert_close

import tilewise
from tilewise import kernels

GPU_BACKENDS = ("cuda", "cupy")
LAYOUTS = ("NCHW", "NHWC")
DTYPES = [np.float16, np.float32, np.float64]
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "sigmoid", "tanh")
# planes and rows of whole vectors and not, one element, several planes to a block, one plane to several blocks, a
# channel in several parts (more than 1024 units), more channels than a block has threads
SHAPES = [
    (2, 3, 4, 4), (3, 5, 3, 5), (2, 1, 1, 1), (1, 1, 1, 7), (3, 40, 7, 7), (2, 2, 36, 65), (1, 3, 80, 64),
    (2, 300, 2, 2), (9, 8, 16, 16),
]  # fmt: skip
CASES = [(shape, layout) for shape in SHAPES for layout in LAYOUTS] + [((1, 2056, 1, 2), "NHWC")]


def laid(x, layout):
    return np.ascontiguousarray(x if layout == "NCHW" else np.moveaxis(x, 1, -1))


def plain(y, layout):
    return y if layout == "NCHW" else np.moveaxis(y, -1, 1)


def vectors(rng, channels, dtype):
    """running_mean, running_var, weight, bias."""
    mean, weight, bias = rng.standard_normal((3, channels))
    return [a.astype(dtype) for a in (mean, rng.uniform(0.5, 2, channels), weight, bias)]


def wide(*arrays):
    return [None if a is None else a.astype(np.float64) for a in arrays]


def reference(function, *operands, **options):
    with tilewise.using(backend="reference"):
        return function(*operands, **options)


def assert_same(actual, expected, reduction, scales=None):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, b, reduction=reduction, scale=None if scales is None else scales[i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_training_and_its_gradient(gpu, rng, shape, layout, dtype):
    x, grad = (laid(a, layout).astype(dtype) for a in rng.standard_normal((2, *shape)))
    values = x.size // shape[1]
    *running, weight, bias = vectors(rng, shape[1], dtype)
    if values == 1:
        pytest.skip("one value for each channel has no variance")
    expected_running = wide(*running)
    options = {"training": True, "layout": layout, "return_stats": True, "momentum": 0.3}
    expected = reference(kernels.batch_norm, x.astype(float), *expected_running, *wide(weight, bias), **options)
    results = kernels.batch_norm(x, *running, weight, bias, **options)
    assert [a.dtype for a in results] == [dtype] * 3
    scales = [np.abs(expected[0]).max() + np.abs(weight).max() * np.abs(expected[2]).max(), 1, None]
    assert_same(results, expected, values, scales)
    assert_same(running, expected_running, values)
    stats = [a.astype(dtype) for a in expected[1:]]
    for training in (True, False):
        wanted = reference(
            kernels.batch_norm_backward, *wide(grad, x, *stats, weight), training=training, layout=layout
        )
        gradients = kernels.batch_norm_backward(grad, x, *stats, weight, training=training, layout=layout)
        assert [a.dtype for a in gradients] == [dtype] * 3
        scale = float(stats[1].max() * np.abs(weight).max()) * 8
        assert_same(gradients, wanted, values, [scale, values**0.5 * 4, values**0.5 * 4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_evaluation(gpu, rng, shape, layout, dtype):
    x = laid(rng.standard_normal(shape), layout).astype(dtype)
    mean, var, weight, bias = vectors(rng, shape[1], dtype)
    for scale, offset in ((weight, bias), (weight, None), (None, bias), (None, None)):
        operands = (x, mean, var, scale, offset)
        results = kernels.batch_norm(*operands, layout=layout, return_stats=True, eps=1e-3)
        expected = reference(kernels.batch_norm, *wide(*operands), layout=layout, return_stats=True, eps=1e-3)
        assert_same(results, expected, 3, [None if offset is None and scale is None else 8, None, None])
    kept = mean.copy()
    kernels.batch_norm(x, mean, var, layout=layout)
    np.testing.assert_array_equal(mean, kept)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations(gpu, rng, layout, activation, training):
    for shape in ((2, 3, 4, 8), (2, 4, 3, 5)):
        x = laid(rng.standard_normal(shape), layout).astype(np.float32)
        operands = (x, *vectors(rng, shape[1], np.float32))
        options = {"training": training, "activation": activation, "layout": layout}
        expected = reference(kernels.batch_norm, *wide(*operands), **options)
        assert_close(kernels.batch_norm(*operands, **options), expected, reduction=40, scale=8)


def test_no_weight_no_statistics(gpu, rng):
    x = rng.standard_normal((3, 4, 5, 5)).astype(np.float32)
    y, *stats = kernels.batch_norm(x, None, None, training=True, return_stats=True)
    expected = reference(kernels.batch_norm, x.astype(float), None, None, training=True)
    assert_close(y, expected, reduction=75)
    gradients = kernels.batch_norm_backward(y, x, *stats)
    assert_same(gradients, reference(kernels.batch_norm_backward, *wide(y, x, *stats)), 75, [1, 75, 75])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_without_a_batch_and_features(gpu, rng, layout):
    x = rng.standard_normal((6, 10)).astype(np.float32)
    assert_close(
        kernels.batch_norm(x, None, None, training=True, layout=layout),
        reference(kernels.batch_norm, x.astype(float), None, None, training=True, layout=layout), reduction=6,
    )  # fmt: skip
    one = laid(rng.standard_normal((1, 3, 4, 5)), layout)[0].astype(np.float32)
    y = kernels.batch_norm(one, None, None, training=True, layout=layout)
    assert_close(y, reference(kernels.batch_norm, one, None, None, training=True, layout=layout), reduction=20)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_batch(gpu, layout):
    for shape in ((0, 4, 4, 4), (4, 4, 0, 4)):
        x, mean, var = np.zeros(shape, np.float32), np.full(4, 5, np.float32), np.full(4, 7, np.float32)
        for training in (True, False):
            y, *stats = kernels.batch_norm(x, mean, var, None, None, training, layout=layout, return_stats=True)
            assert y.shape == shape
            assert np.isfinite(stats).all()
            assert mean.tolist() == [5] * 4
            assert var.tolist() == [7] * 4
            grads = kernels.batch_norm_backward(x, x, *stats, training=training, layout=layout)
            assert grads[0].shape == shape
            assert [g.tolist() for g in grads[1:]] == [[0] * 4] * 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_survive_a_large_mean_and_outliers(gpu, rng, layout):
    x = rng.standard_normal((4, 4, 50, 60)).astype(np.float32)
    x[:, 0] += 1e4
    x[:, 1] = x[:, 1] * 1e-2 - 1e4
    x[:, 2, 0] = 1e4  # the first row far from the rest
    x[:, 3] += 1e4
    x[0, 3, 0, 0] = 0  # and the first element
    state = [np.zeros(4, np.float32), np.zeros(4, np.float32)]
    y, mean, invstd = kernels.batch_norm(
        laid(x, layout), *state, training=True, momentum=1, layout=layout, return_stats=True
    )
    exact = x.astype(np.float64)
    variance = exact.var((0, 2, 3))
    np.testing.assert_allclose(mean, exact.mean((0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(invstd, 1 / np.sqrt(variance + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(state[1], variance * 12000 / 11999, rtol=1e-6)
    exact = (exact - exact.mean((0, 2, 3), keepdims=True)) / np.sqrt(variance + 1e-5).reshape(1, 4, 1, 1)
    np.testing.assert_allclose(plain(y, layout), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_stay_in_their_channel(gpu, rng, layout):
    for shape in ((2, 4, 4, 5), (2, 5, 20, 31)):
        x = rng.standard_normal(shape).astype(np.float32)
        x[1, 0, 2, 3], x[0, 1, 0, 0] = np.nan, np.inf
        y = kernels.batch_norm(laid(x, layout), None, None, training=True, layout=layout, activation="relu")
        assert np.isnan(plain(y, layout)[:, :2]).all()
        assert np.isfinite(plain(y, layout)[:, 2:]).all()
        zeros, ones = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
        y = kernels.batch_norm(laid(x, layout), zeros, ones, layout=layout)
        assert (np.isnan(y).sum(), np.isinf(y).sum()) == (1, 1)
        frozen = kernels.batch_norm_backward(
            laid(ones[0] + 0 * zeros[0] * 0 + np.zeros(shape, np.float32), layout),
            laid(x, layout),
            zeros,
            ones,
            training=False,
            layout=layout,
        )[0]
        assert (frozen == 1).all()  # frozen statistics' gradient does not know x


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_operands(gpu, rng, layout):
    x = laid(rng.standard_normal((2, 3, 6, 8)), layout).astype(np.float32)
    table = rng.uniform(0.5, 2, (3, 4)).astype(np.float32)
    expected = kernels.batch_norm(x, *table.T.copy()[:2].copy()[:, :3], training=True, layout=layout)
    running = table[:, 0], table[:, 1]
    before = table.copy()
    y = kernels.batch_norm(np.asfortranarray(x), *running, training=True, layout=layout)
    np.testing.assert_array_equal(y, expected)
    assert (table[:, :2] != before[:, :2]).all()
    np.testing.assert_array_equal(table[:, 2:], before[:, 2:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_the_numerical_ones(gpu, rng, training, layout):
    x, cotangent = (laid(a, layout) for a in rng.standard_normal((2, 3, 2, 2, 2)))
    mean, var, weight, bias = vectors(rng, 2, np.float64)

    def forward(x, weight):
        return kernels.batch_norm(x, mean.copy(), var.copy(), weight, bias, training, layout=layout)

    stats = kernels.batch_norm(x, mean.copy(), var.copy(), weight, bias, training, layout=layout, return_stats=True)[1:]
    grads = kernels.batch_norm_backward(cotangent, x, *stats, weight, training=training, layout=layout)
    assert_gradient(grads[0], numerical_gradient(lambda x: forward(x, weight), x, cotangent))
    assert_gradient(grads[1], numerical_gradient(lambda w: forward(x, w), weight, cotangent))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_in_every_schedule(gpu, rng, layout):
    from simt.emulator import SCHEDULES

    x, grad = (laid(a, layout).astype(np.float32) for a in rng.standard_normal((2, 3, 4, 40, 40)))
    results = []
    for gpu.schedule in SCHEDULES:
        forward = kernels.batch_norm(x, None, None, training=True, layout=layout, return_stats=True)
        gradients = kernels.batch_norm_backward(grad, x, *forward[1:], layout=layout)
        results.append(b"".join(a.tobytes() for a in (*forward, *gradients)))
    assert len(set(results)) == 1


def test_the_same_signatures_as_the_reference(gpu):
    from tilewise.kernels.reference import batchnorm as reference

    ours = import_module(f"tilewise.kernels.{gpu.backend}.batchnorm")
    for name, function in vars(reference).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            assert inspect.signature(getattr(ours, name)) == inspect.signature(function), name
